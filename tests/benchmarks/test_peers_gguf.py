"""A GGUF of a published shape holds as many weights as the model it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.gguf_tensors import ARCHITECTURES, tensors
from benchmarks.peers.model_files import is_moe
from llmopt.models import shapes
from llmopt.models.published import SHAPES

WRITABLE = [name for name, shape in SHAPES.items() if shape.model_type in ARCHITECTURES]
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip


def parameters(name: str) -> int:
    model = shapes.meta_model(name)
    seen = {id(p): p.numel() for p in model.parameters()}
    # ERNIE keeps its router's correction in a buffer
    seen |= {id(b): b.numel() for key, b in model.named_buffers() if key.endswith("e_score_correction_bias")}
    return sum(seen.values())


@pytest.mark.parametrize("name", WRITABLE)
def test_the_file_holds_the_models_weights(name: str) -> None:
    listed = list(tensors(SHAPES[name].config, SHAPES[name].model_type))
    assert len({tensor.name for tensor in listed}) == len(listed)
    assert sum(tensor.numel for tensor in listed) == parameters(name)
    assert all(tensor.shape[-1] % 32 == 0 for tensor in listed if tensor.is_quantized), "Q4_0 has blocks of 32"


def test_only_moe_shapes_are_written_without_an_unquantized_file() -> None:
    assert {name for name in WRITABLE if is_moe(name)} == {"qwen3-30b-a3b", "ernie-4.5-21b-a3b", "deepseek-v2-lite"}


@pytest.mark.parametrize(("kind", "bits"), [("f16", 16), ("q4_0", 4.5)])
def test_the_writer_writes_what_is_listed(tmp_path: Path, kind: str, bits: float) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks.peers.workers import make_gguf

    path = tmp_path / "small.gguf"
    make_gguf.write({"model_type": "qwen3", "config": SMALL}, path, kind)
    written = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
    for tensor in tensors(SMALL, "qwen3"):
        found = written.pop(tensor.name)
        # GGUF lists sizes from the fastest-running one
        assert tuple(int(n) for n in reversed(found.shape)) == tensor.shape
        assert 8 * int(found.n_bytes) / tensor.numel == (bits if tensor.is_quantized else 32)
    assert not written
