"""ERNIE 4.5 dense: GQA, rope over interleaved pairs computed in float32."""

from __future__ import annotations

from llmopt.models.base import AttentionSpec, ModelFamily

FAMILY = ModelFamily(
    model_type="ernie4_5",
    attention=AttentionSpec(
        kind="gqa",
        rope="interleaved",
        stages=(("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    ),
    tiny_config={
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
