"""ERNIE 4.5 MoE: softmax routing with a correction bias, shared experts, dense first layers, float32 router."""

from __future__ import annotations

from llmopt.models.base import AttentionSpec, ModelFamily, MoeSpec

FAMILY = ModelFamily(
    model_type="ernie4_5_moe",
    attention=AttentionSpec(
        kind="gqa",
        rope="interleaved",
        stages=(("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    ),
    moe=MoeSpec(
        scoring="softmax",
        num_experts_key="moe_num_experts",
        correction_bias="gate.moe_statics.e_score_correction_bias",  # parameter [1, E]
        renormalize=True,
        sum_min_key="moe_norm_min",
    ),
    tiny_config={
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
