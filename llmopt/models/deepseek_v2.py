"""DeepSeek V2: multi-head latent attention, softmax routing limited to groups of experts, shared experts."""

from __future__ import annotations

from llmopt.models.base import AttentionSpec, ModelFamily, MoeSpec

FAMILY = ModelFamily(
    model_type="deepseek_v2",
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
    ),
    moe=MoeSpec(
        scoring="softmax",
        num_experts_key="n_routed_experts",
        group_limited=True,  # where config.topk_method is "group_limited_greedy"; V2-Lite is "greedy"
    ),
    tiny_config={
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
