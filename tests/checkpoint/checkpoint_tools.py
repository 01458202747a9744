"""What several test files share: tiny models, quantizing them by rounding, and checkpoints as AutoGPTQ writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmopt.checkpoint import load
from llmopt.errors import CheckpointError
from llmopt.models import FAMILIES, family_for, resolve_model
from llmopt.models.base import LinearSite, ResolvedModel
from llmopt.ops.int4_linear import layout
from llmopt.packed import QuantEmbedding, QuantExperts, QuantLinear, kernel_group_size
from llmopt.passes.quantize_gptq.rounding import Grid, round_to_nearest

MODEL_TYPES = [family.model_type for family in FAMILIES]
MOE_TYPES = [family.model_type for family in FAMILIES if family.moe is not None]
IDS = torch.tensor([[5, 17, 300, 44, 9, 210, 33, 7]])


def tiny(model_type: str, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A random model of the family's tiny config."""
    config = CONFIG_MAPPING[model_type](**{**family_for(model_type).tiny_config, **changes})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.uniform_(-0.1, 0.1)
    fp32 = family_for(model_type).keep_fp32
    kept = {n: t.clone() for n, t in model.state_dict().items() if any(f in n for f in fp32)}
    model.to(dtype)
    for name, value in kept.items():
        module, _, attr = name.rpartition(".")
        getattr(model.get_submodule(module), attr).data = value
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).eval()
    model.config.dtype = dtype
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


def quantize(
    model: Any, *, group_size: int = 32, sym: bool = True, head_bits: int | None = 8, skip: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Round a model's weights to codes in place, as the quantize_gptq pass would lay them out; returns the originals."""
    resolved = resolve_model(model)
    grid = Grid(4, sym)
    originals = {f"{resolved.family.embedding}.weight": resolved.embedding.weight.detach().clone()}
    originals[resolved.head.name + ".weight"] = resolved.head.module.weight.detach().clone()
    for layer in resolved.layers:
        for site in layer.linears():
            if not any(part in site.name for part in skip):
                setattr(site.parent, site.attr, quant_linear(site.module, grid, group_size))
        if layer.experts is not None and not any(part in layer.experts.name for part in skip):
            experts = layer.experts
            setattr(experts.parent, experts.attr, _quant_experts(experts.gate_up, experts.down, grid, group_size))
    if head_bits is not None:
        quantize_head(resolved, head_bits)
    return originals


def quant_linear(linear: Any, grid: Grid, group_size: int) -> QuantLinear:
    q, scales, zeros = round_to_nearest(linear.weight, grid, group_size)
    return QuantLinear.from_codes(q, scales, zeros, linear.bias, bits=grid.bits, group_size=group_size).eval()


def quantize_head(resolved: ResolvedModel, bits: int) -> None:
    head, embedding = resolved.head, resolved.embedding
    tied = resolved.tied
    group = kernel_group_size(embedding.embedding_dim, 128)
    module = quant_linear(head.module, Grid(bits, True), group)
    packed = module.packed
    if not tied:
        q, scales, _ = round_to_nearest(embedding.weight, Grid(bits, True), group)
        packed = layout.pack(q, scales, None, group_size=group, bits=bits)
    parent, attr = resolved.parent_of_embedding()
    table = QuantEmbedding(
        packed, num_embeddings=embedding.num_embeddings, embedding_dim=embedding.embedding_dim, bits=bits,
        group_size=group, dtype=embedding.weight.dtype, padding_idx=embedding.padding_idx,
    )  # fmt: skip
    setattr(head.parent, head.attr, module)
    setattr(parent, attr, table.eval())


def _quant_experts(gate_up: torch.Tensor, down: torch.Tensor, grid: Grid, group_size: int) -> QuantExperts:
    packed = []
    for weight in (gate_up, down):
        q, scales, zeros = round_to_nearest(weight, grid, group_size)
        k = weight.shape[-1]
        group = kernel_group_size(k, group_size)
        if group_size == -1:
            groups = -(-k // group)
            scales = scales.expand(*scales.shape[:-1], groups)
            zeros = None if zeros is None else zeros.expand(*zeros.shape[:-1], groups)
        packed.append(layout.pack(q, scales, zeros, group_size=group, bits=4))
    return QuantExperts(
        packed[0], packed[1], hidden_dim=gate_up.shape[-1], intermediate_dim=down.shape[-1], group_size=group_size,
        asymmetric=not grid.symmetric,
    ).eval()  # fmt: skip


class AutoGptq:
    """Writes a model's checkpoint the way AutoGPTQ and GPTQModel do, with its own packing loops.

    ``weights`` holds, by name on disk, the float weight that each quantized linear stands for.
    """

    def __init__(
        self, *, bits: int = 4, group_size: int = 32, sym: bool = True, desc_act: bool = False, v2: bool = False,
        scales: torch.dtype = torch.float16,
    ) -> None:  # fmt: skip
        self.bits, self.group_size, self.sym, self.desc_act, self.v2 = bits, group_size, sym, desc_act, v2
        self.scales = scales
        self.tensors: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.overrides: dict[str, dict[str, Any]] = {}
        self.random = torch.Generator().manual_seed(7)

    def write(self, model: Any, directory: Path, *, zero_biases: bool = False, **config: Any) -> Path:
        """Quantize every linear and every routed expert, and write the directory."""
        model.save_pretrained(directory)
        plain = load_file(directory / "model.safetensors")
        resolved = resolve_model(model)
        sites: list[LinearSite] = [site for layer in resolved.layers for site in layer.linears()]
        names = [site.name for site in sites]
        names += [n.removesuffix(".weight") for n in plain if ".experts." in n and n.endswith("_proj.weight")]
        for name in dict.fromkeys(names):
            self.add(name, plain.pop(f"{name}.weight").float(), zero_bias=zero_biases)
        save_file({**plain, **self.tensors}, directory / "model.safetensors", metadata={"format": "pt"})
        path = directory / "config.json"
        data = json.loads(path.read_text())
        data["quantization_config"] = {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "sym": self.sym,
            "desc_act": self.desc_act, "checkpoint_format": "gptq_v2" if self.v2 else "gptq", **config,
        }  # fmt: skip
        path.write_text(json.dumps(data))
        return directory

    def add(self, name: str, weight: torch.Tensor, *, zero_bias: bool = False) -> None:
        """Quantize one linear to nearest codes and pack it."""
        own = self.overrides.get(name, {})
        bits, group_size = own.get("bits", self.bits), own.get("group_size", self.group_size)
        n, k = weight.shape
        order = torch.randperm(k, generator=self.random) if self.desc_act else torch.arange(k)
        q, scales, zeros = round_to_nearest(weight[:, order], Grid(bits, own.get("sym", self.sym)), group_size)
        if zeros is None:
            zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
        scales = scales.to(self.scales)
        group = torch.arange(k) // (k if group_size == -1 else group_size)
        g_idx, codes = torch.empty(k, dtype=torch.int64), torch.empty_like(q)
        g_idx[order], codes[:, order] = group, q
        self.weights[name] = scales.float()[:, g_idx] * (codes.float() - zeros.float()[:, g_idx])
        qweight, qzeros = pack_by_hand(codes.numpy(), zeros.numpy(), bits, v2=self.v2)
        self.tensors |= {
            f"{name}.qweight": torch.from_numpy(qweight), f"{name}.qzeros": torch.from_numpy(qzeros),
            f"{name}.scales": scales.t().contiguous(), f"{name}.g_idx": g_idx.to(torch.int32),
        }  # fmt: skip
        if zero_bias:
            self.tensors[f"{name}.bias"] = torch.zeros(n, dtype=torch.float16)


def pack_by_hand(codes: Any, zeros: Any, bits: int, *, v2: bool) -> tuple[Any, Any]:
    """``qweight`` and ``qzeros`` row by row, as the format is published: first code in the lowest bits."""
    per_word = 32 // bits
    n, k = codes.shape
    qweight = np.zeros((-(-k // per_word), n), dtype=np.uint32)
    for column in range(k):
        qweight[column // per_word] |= codes[:, column].astype(np.uint32) << np.uint32(bits * (column % per_word))
    groups = zeros.shape[1]
    qzeros = np.zeros((groups, -(-n // per_word)), dtype=np.uint32)
    for row in range(n):
        shift = np.uint32(bits * (row % per_word))
        qzeros[:, row // per_word] |= zeros[row].astype(np.uint32) << shift
    if not v2:
        # GPTQModel subtracts from whole words, so that a zero point of 0 borrows from its neighbour
        qzeros -= np.uint32(0x11111111 if bits == 4 else 0x01010101)
    return qweight.view(np.int32), qzeros.view(np.int32)


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; a value of ``...`` removes the key."""
    path = directory / "config.json"
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            data.pop(key, None)
        else:
            data[key] = value
    path.write_text(json.dumps(data))


def edit_tensors(directory: Path, **changes: Any) -> None:
    """Change tensors of model.safetensors; a value of ``...`` removes the tensor, a function maps it."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        if value is ...:
            del tensors[name]
        else:
            tensors[name] = (value(tensors[name]) if callable(value) else value).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def refused(directory: Path, *parts: str) -> None:
    """Loading the directory is a CheckpointError whose message has all the parts."""
    with pytest.raises(CheckpointError) as error:
        load(directory)
    for part in parts:
        assert part in str(error.value), f"{part!r} not in {error.value}"
