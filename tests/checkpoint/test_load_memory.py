"""Loading holds the model and little else: the process grows by at most 1.3 times the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import quant_linear
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmopt.checkpoint import save
from llmopt.models import family_for, resolve_model
from llmopt.ops.int4_linear import layout
from llmopt.packed import QuantEmbedding, QuantExperts, QuantLinear
from llmopt.passes.quantize_gptq.rounding import Grid

SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16, "head_dim": 128, "vocab_size": 32000,
        "num_attention_heads": 16, "num_key_value_heads": 8,
    },
    "qwen3_moe": {
        "hidden_size": 1024, "intermediate_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 4,
        "head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 32, "vocab_size": 16000,
    },
}  # fmt: skip

CHILD = """
import sys
import torch
torch.set_num_threads(1)
from llmopt.checkpoint import load

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

# what the first load of a process brings in: modules of transformers, torch's operators
load(sys.argv[1])
before = status("VmRSS")
model = load(sys.argv[2])
print(status("VmHWM") - before, status("VmRSS") - before)
"""


def build(model_type: str, *, quantized: bool, **sizes: Any) -> Any:
    """A model of these sizes; quantized ones share one packed weight per shape, so that building is quick."""
    config = CONFIG_MAPPING[model_type](**{**family_for(model_type).tiny_config, **sizes})
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if quantized:
        _quantize(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            filled = torch.full(parameter.shape, 0.01, dtype=torch.bfloat16)
            setattr(module, name, torch.nn.Parameter(filled, requires_grad=False))
    if not quantized:
        model.tie_weights()
    return model.eval()


def _quantize(model: Any) -> None:
    made: dict[tuple[int, int, int], torch.Tensor] = {}

    def packed(n: int, k: int, bits: int = 4) -> torch.Tensor:
        if (n, k, bits) not in made:
            weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.02
            linear = torch.nn.Linear(1, 1)
            linear.weight, linear.bias = torch.nn.Parameter(weight), None
            made[n, k, bits] = quant_linear(linear, Grid(bits, True), 128).packed
        return made[n, k, bits]

    def linear(n: int, k: int, bits: int = 4) -> QuantLinear:
        return QuantLinear(
            packed(n, k, bits), None, in_features=k, out_features=n, bits=bits, group_size=128, asymmetric=False
        )

    resolved = resolve_model(model)
    for layer in resolved.layers:
        for site in layer.linears():
            setattr(site.parent, site.attr, linear(site.module.out_features, site.module.in_features))
        if layer.experts is not None:
            count, wide, inner = layer.experts.down.shape
            gate_up, down = packed(2 * inner, wide), packed(wide, inner)
            module = QuantExperts(
                gate_up.expand(count, *gate_up.shape), down.expand(count, *down.shape), hidden_dim=wide,
                intermediate_dim=inner, group_size=128, asymmetric=False,
            )  # fmt: skip
            setattr(layer.experts.parent, layer.experts.attr, module)
    rows, columns = resolved.embedding.weight.shape
    model.lm_head = linear(rows, columns, 8)
    model.model.embed_tokens = QuantEmbedding(
        packed(rows, columns, 8), num_embeddings=rows, embedding_dim=columns, bits=8, group_size=128,
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert layout.TILE_ROWS == 16


def measured(small: Path, big: Path) -> tuple[int, int]:
    """Bytes that loading takes at most, and afterwards."""
    done = subprocess.run([sys.executable, "-c", CHILD, small, big], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, rest = map(int, done.stdout.split())
    return peak, rest


@pytest.mark.parametrize("quantized", [True, False], ids=["gptq", "plain"])
@pytest.mark.parametrize("model_type", SIZES)
def test_peak(tmp_path: Path, model_type: str, quantized: bool) -> None:
    small = save(build(model_type, quantized=quantized), tmp_path / "small")
    sizes = SIZES[model_type] if quantized else {**SIZES[model_type], "num_hidden_layers": 3}
    big = save(build(model_type, quantized=quantized, **sizes), tmp_path / "big")
    nbytes = sum(p.stat().st_size for p in big.iterdir())
    assert nbytes > 80e6
    # pages of the mapped files count as long as the system leaves them: the least of a few runs is the loader's own
    peak, rest = min(measured(small, big) for _ in range(3))
    print(json.dumps({"file": nbytes, "peak": peak / nbytes, "rest": rest / nbytes}))
    assert peak < 1.3 * nbytes
    # and it did load something
    assert rest > (0.5 if quantized else 0.9) * nbytes
