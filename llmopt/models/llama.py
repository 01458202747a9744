"""Llama 2 and 3 (DeepSeek-R1-Distill-Llama is this class): GQA, rope over half-split pairs."""

from __future__ import annotations

from llmopt.models.base import AttentionSpec, ModelFamily

FAMILY = ModelFamily(
    model_type="llama",
    attention=AttentionSpec(
        kind="gqa",
        rope="half_split",
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
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 128,
        },
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
