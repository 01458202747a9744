"""DeepSeek V3 and R1: latent attention with compressed queries, sigmoid routing with a correction bias."""

from __future__ import annotations

from llmopt.models.base import AttentionSpec, ModelFamily, MoeSpec

FAMILY = ModelFamily(
    model_type="deepseek_v3",
    attention=AttentionSpec(
        kind="mla",
        rope="interleaved",
        stages=(
            ("q_proj?!q_lora_rank", "q_a_proj?q_lora_rank"),
            ("q_b_proj?q_lora_rank",),
            ("kv_b_proj",),
            ("o_proj",),
        ),
        qk_norms=("q_a_layernorm?q_lora_rank", "kv_a_layernorm"),
        keep=("kv_a_proj_with_mqa",),
        rope_key="rope_interleave",
        rotated_as_halves=True,
    ),
    moe=MoeSpec(
        scoring="sigmoid",
        num_experts_key="n_routed_experts",
        correction_bias="gate.e_score_correction_bias",  # buffer [E]
        group_limited=True,
        group_best=2,
        sum_eps=1e-20,
        renormalize=True,  # where config.norm_topk_prob says so, as in every published model
    ),
    tiny_config={
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 256,
        },
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
