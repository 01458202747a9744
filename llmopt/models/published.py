"""Configs of published models, as on the Hugging Face hub, for benchmarks on real shapes without a checkpoint.

Only what sets sizes and numerics is kept of each config.json; fields that are at their default, or that only concern
training, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one published model, in the words of its own config.json."""

    source: str  # model id on the Hugging Face hub
    model_type: str
    config: Mapping[str, Any]


_QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_ERNIE_4_5 = {
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "use_bias": False,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}

SHAPES: Mapping[str, Shape] = {
    "qwen3-0.6b": Shape(
        "Qwen/Qwen3-0.6B",
        "qwen3",
        {
            **_QWEN3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-1.7b": Shape(
        "Qwen/Qwen3-1.7B",
        "qwen3",
        {
            **_QWEN3,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-4b": Shape(
        "Qwen/Qwen3-4B",
        "qwen3",
        {
            **_QWEN3,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": Shape(
        "Qwen/Qwen3-8B",
        "qwen3",
        {
            **_QWEN3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-30b-a3b": Shape(
        "Qwen/Qwen3-30B-A3B",
        "qwen3_moe",
        {
            **_QWEN3,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "tie_word_embeddings": False,
        },
    ),
    "ernie-4.5-0.3b": Shape(
        "baidu/ERNIE-4.5-0.3B-PT",
        "ernie4_5",
        {
            **_ERNIE_4_5,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 18,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 128,
        },
    ),
    "ernie-4.5-21b-a3b": Shape(
        "baidu/ERNIE-4.5-21B-A3B-PT",
        "ernie4_5_moe",
        {
            **_ERNIE_4_5,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "moe_num_experts": 64,
            "moe_k": 6,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 27,
            "moe_layer_interval": 1,
        },
    ),
    "deepseek-v2-lite": Shape(
        "deepseek-ai/DeepSeek-V2-Lite",
        "deepseek_v2",
        {
            **_DEEPSEEK,
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "rope_scaling": {**_DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            "bos_token_id": 100000,
            "eos_token_id": 100001,
        },
    ),
    "deepseek-r1-distill-qwen-1.5b": Shape(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
        },
    ),
    "deepseek-r1-distill-llama-8b": Shape(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    # 671 B parameters: for its sizes (kernels, meta_model, a few layers), not to be built whole
    "deepseek-v3": Shape(
        "deepseek-ai/DeepSeek-V3",
        "deepseek_v3",
        {
            **_DEEPSEEK,
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_scaling": {**_DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
}


def find(name: str) -> Shape:
    """A published shape, or of ``NAME@LAYERS`` its first so many layers, for what does not fit into memory whole.

    Raises:
        KeyError: no such shape, or it does not have so many layers.
    """
    base, _, layers = name.partition("@")
    shape = SHAPES[base]
    if base == name:
        return shape
    if not layers.isdecimal() or not 1 <= int(layers) <= shape.config["num_hidden_layers"]:
        raise KeyError(name)
    fewer = {"num_hidden_layers": int(layers)}
    if "moe_layer_end_index" in shape.config:
        fewer["moe_layer_end_index"] = int(layers) - 1
    return replace(shape, config={**shape.config, **fewer})
