"""Qwen3 MoE: Qwen3's attention, softmax routing, no shared experts."""

from __future__ import annotations

from llmopt.models.base import AttentionSpec, ModelFamily, MoeSpec

FAMILY = ModelFamily(
    model_type="qwen3_moe",
    attention=AttentionSpec(
        kind="gqa",
        rope="half_split",
        stages=(("q_proj", "k_proj", "v_proj"), ("o_proj",)),
        qk_norms=("q_norm", "k_norm"),
    ),
    moe=MoeSpec(
        scoring="softmax",
        num_experts_key="num_experts",
        shared=None,
        renormalize=True,  # where config.norm_topk_prob says so, as in every published model
    ),
    tiny_config={
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
