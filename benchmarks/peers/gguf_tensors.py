"""What a GGUF file of a published shape holds: tensors and settings, from the Hugging Face config alone.

Dense and MoE decoders with grouped heads (Qwen3, Qwen3-MoE, ERNIE 4.5 and its MoE) and DeepSeek-V2's latent attention.
Nothing here needs the gguf package; ``workers/make_gguf.py`` writes the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# transformers' model_type -> llama.cpp's architecture
ARCHITECTURES = {
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5-moe",
    "deepseek_v2": "deepseek2",
}
_EXPERTS_KEYS = ("num_experts", "moe_num_experts", "n_routed_experts")
_USED_KEYS = ("num_experts_per_tok", "moe_k")
_SHARED_KEYS = ("n_shared_experts", "moe_num_shared_experts")
_DENSE_FIRST_KEYS = ("first_k_dense_replace", "moe_layer_start_index")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file; ``shape`` as in torch, rows first."""

    name: str
    shape: tuple[int, ...]
    is_quantized: bool = True

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True, slots=True)
class Moe:
    """The routed part of a MoE config, whatever the family calls it. No experts in a dense one."""

    experts: int
    used: int
    shared: int
    dense_first: int
    has_bias: bool  # ERNIE corrects its router's scores


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    return next((int(config[key]) for key in keys if config.get(key) is not None), 0)


def moe_of(config: Mapping[str, Any], model_type: str) -> Moe:
    return Moe(
        experts=_first(config, _EXPERTS_KEYS),
        used=_first(config, _USED_KEYS),
        shared=_first(config, _SHARED_KEYS),
        dense_first=_first(config, _DENSE_FIRST_KEYS),
        has_bias=model_type == "ernie4_5_moe",
    )


def head_dim_of(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def tensors(config: Mapping[str, Any], model_type: str) -> Iterator[Tensor]:
    """All tensors in the order of the file. A tied head is no tensor of its own."""
    hidden, moe = config["hidden_size"], moe_of(config, model_type)
    yield Tensor("token_embd.weight", (config["vocab_size"], hidden))
    yield Tensor("output_norm.weight", (hidden,), False)
    if not config["tie_word_embeddings"]:
        yield Tensor("output.weight", (config["vocab_size"], hidden))
    for i in range(config["num_hidden_layers"]):
        block = f"blk.{i}."
        yield Tensor(f"{block}attn_norm.weight", (hidden,), False)
        yield Tensor(f"{block}ffn_norm.weight", (hidden,), False)
        if config.get("kv_lora_rank"):
            yield from _latent_attention(block, config)
        else:
            yield from _grouped_attention(block, config, model_type.startswith("qwen3"))
        if moe.experts and i >= moe.dense_first:
            yield from _experts(block, config, moe)
        else:
            yield from _mlp(block, "", hidden, config["intermediate_size"])


def _grouped_attention(block: str, config: Mapping[str, Any], has_qk_norm: bool) -> Iterator[Tensor]:
    hidden, dim = config["hidden_size"], head_dim_of(config)
    rows, kv_rows = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield Tensor(f"{block}attn_q.weight", (rows, hidden))
    yield Tensor(f"{block}attn_k.weight", (kv_rows, hidden))
    yield Tensor(f"{block}attn_v.weight", (kv_rows, hidden))
    yield Tensor(f"{block}attn_output.weight", (hidden, rows))
    if has_qk_norm:
        yield Tensor(f"{block}attn_q_norm.weight", (dim,), False)
        yield Tensor(f"{block}attn_k_norm.weight", (dim,), False)


def _latent_attention(block: str, config: Mapping[str, Any]) -> Iterator[Tensor]:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    assert not config.get("q_lora_rank"), "only DeepSeek-V2-Lite's form"
    yield Tensor(f"{block}attn_q.weight", (heads * (nope + rope), hidden))
    yield Tensor(f"{block}attn_kv_a_mqa.weight", (rank + rope, hidden))
    yield Tensor(f"{block}attn_kv_a_norm.weight", (rank,), False)
    yield Tensor(f"{block}attn_kv_b.weight", (heads * (nope + value), rank))
    yield Tensor(f"{block}attn_output.weight", (hidden, heads * value))


def _mlp(block: str, suffix: str, hidden: int, inner: int) -> Iterator[Tensor]:
    yield Tensor(f"{block}ffn_gate{suffix}.weight", (inner, hidden))
    yield Tensor(f"{block}ffn_up{suffix}.weight", (inner, hidden))
    yield Tensor(f"{block}ffn_down{suffix}.weight", (hidden, inner))


def _experts(block: str, config: Mapping[str, Any], moe: Moe) -> Iterator[Tensor]:
    hidden, inner, n = config["hidden_size"], config["moe_intermediate_size"], moe.experts
    yield Tensor(f"{block}ffn_gate_inp.weight", (n, hidden), False)
    yield Tensor(f"{block}ffn_gate_exps.weight", (n, inner, hidden))
    yield Tensor(f"{block}ffn_up_exps.weight", (n, inner, hidden))
    yield Tensor(f"{block}ffn_down_exps.weight", (n, hidden, inner))
    if moe.has_bias:
        yield Tensor(f"{block}exp_probs_b.bias", (n,), False)
    if moe.shared:
        yield from _mlp(block, "_shexp", hidden, moe.shared * inner)
