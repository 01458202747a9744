"""Qwen3: GQA with a norm on each head of q and k, rope over half-split pairs, gated dense MLP."""

from __future__ import annotations

from llmopt.models.base import AttentionSpec, ModelFamily

FAMILY = ModelFamily(
    model_type="qwen3",
    attention=AttentionSpec(
        kind="gqa",
        rope="half_split",
        stages=(("q_proj", "k_proj", "v_proj"), ("o_proj",)),
        qk_norms=("q_norm", "k_norm"),
    ),
    tiny_config={
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
