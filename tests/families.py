"""Tiny models of every decoder family beyond the first: what each can switch on, with odd and unequal sizes.

`tools/model_table.py` runs the same cases for docs/models.md.
"""

from __future__ import annotations

from typing import Any

from models import ALL_LINEARS, ATTENTION, Case

FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
HALF_FUSED = (*ATTENTION, "gate_up_proj", "down_proj")
WINDOW = 5
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
ODD: dict[str, Any] = {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80}
THREE: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96}
SLIDING: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": TYPES, "sliding_window": WINDOW}


def rope(kind: str = "default", theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    """rope_parameters of one rotation."""
    return {"rope_type": kind, "rope_theta": theta, **values}


def two_bases(**values: Any) -> dict[str, Any]:
    """rope_parameters of two rotations: the sliding layers' turns faster."""
    return {"rope_parameters": {"full_attention": rope(theta=1e6, **values), "sliding_attention": rope(theta=1e3)}}


def long_rope(pairs: int, part: float = 1.0) -> dict[str, Any]:
    """LongRoPE from 64 tokens to 256."""
    short, long = [1.0 + 0.1 * i for i in range(pairs)], [2.0 + 0.5 * i for i in range(pairs)]
    scaled = rope("longrope", short_factor=short, long_factor=long, partial_rotary_factor=part)
    return {"rope_parameters": scaled, "max_position_embeddings": 256, "original_max_position_embeddings": 64}


GEMMA: dict[str, Any] = {"head_dim": 16, "tie_word_embeddings": True}
CAPS: dict[str, Any] = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 4}
FAMILY_CASES: dict[str, Case] = {
    "gemma": Case("gemma", GEMMA, ALL_LINEARS),
    "gemma2": Case("gemma2", {**GEMMA, **SLIDING, **CAPS}, ALL_LINEARS, shared=True),
    "gemma2-biases": Case(
        "gemma2", {**THREE, **SLIDING, "head_dim": 24, "attention_bias": True}, ("q_proj", "up_proj")
    ),
    "gemma3": Case("gemma3_text", {**GEMMA, **SLIDING, **two_bases(), "query_pre_attn_scalar": 4}, ALL_LINEARS),
    "gemma3-linear": Case(
        "gemma3_text",
        {
            **THREE,
            **SLIDING,
            "head_dim": 16,
            "rope_parameters": {"full_attention": rope("linear", 1e6, factor=8.0), "sliding_attention": rope()},
            "attention_bias": True,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 2.0,
        },
    ),
    "phi3": Case("phi3", {"sliding_window": WINDOW}, FUSED, shared=True),
    "phi3-longrope": Case("phi3", {**ODD, **long_rope(6, 0.75), "tie_word_embeddings": True}, FUSED),
    "olmo2": Case("olmo2", {}, ALL_LINEARS, shared=True),
    "olmo2-biases": Case("olmo2", {**THREE, "attention_bias": True, "tie_word_embeddings": True}, ("k_proj", "o_proj")),
    "olmo3": Case("olmo3", {**SLIDING, **two_bases()}, ALL_LINEARS),
    "olmo3-yarn": Case(
        "olmo3",
        {
            **ODD,
            **SLIDING,
            "rope_parameters": {
                "full_attention": rope("yarn", factor=4.0, original_max_position_embeddings=16),
                "sliding_attention": rope(),
            },
        },
    ),
    "ministral": Case("ministral", {**SLIDING, "head_dim": 32}, ALL_LINEARS),
    "hunyuan": Case("hunyuan_v1_dense", {"head_dim": 16, "tie_word_embeddings": True}, ALL_LINEARS, shared=True),
    "hunyuan-alpha": Case(
        "hunyuan_v1_dense",
        {**THREE, "attention_bias": True, "head_dim": 32, "rope_parameters": rope("dynamic", alpha=1000.0, factor=1.0)},
    ),
    "ernie4_5": Case("ernie4_5", {"head_dim": 16, "use_bias": True}, ALL_LINEARS),
    "ernie4_5-tied": Case("ernie4_5", {**ODD, "head_dim": 24, "tie_word_embeddings": True}),
    "exaone4": Case("exaone4", SLIDING, ALL_LINEARS),
    "exaone4-full": Case(
        "exaone4",
        {**THREE, "sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
    ),
    "arcee": Case(
        "arcee", {"attention_bias": True, "mlp_bias": True}, (*ATTENTION, "up_proj", "down_proj"), shared=True
    ),
    "arcee-yarn": Case(
        "arcee",
        {
            **THREE,
            "tie_word_embeddings": True,
            "rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16),
        },
    ),
    "helium": Case("helium", {**ODD, "head_dim": 16}, ALL_LINEARS),
    "stablelm": Case("stablelm", {"use_qkv_bias": True}, ALL_LINEARS, shared=True),
    "stablelm-parallel": Case(
        "stablelm",
        {
            **ODD,
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "rope_parameters": rope(partial_rotary_factor=0.5),
            "tie_word_embeddings": True,
        },
        ALL_LINEARS,
    ),
    "glm": Case("glm", {"head_dim": 32, "rope_parameters": rope(partial_rotary_factor=0.5)}, HALF_FUSED),
    "glm4": Case("glm4", {"head_dim": 16, "rope_parameters": rope(partial_rotary_factor=0.5)}, HALF_FUSED, shared=True),
    "glm4-plain": Case("glm4", {**THREE, "head_dim": 32, "attention_bias": False, "tie_word_embeddings": True}),
    "cohere": Case("cohere", {"use_qk_norm": True, "logit_scale": 0.25}, ALL_LINEARS),
    "cohere2": Case("cohere2", {**SLIDING, "tie_word_embeddings": True, "logit_scale": 2.0}, ALL_LINEARS, shared=True),
    "cohere2-biases": Case(
        "cohere2", {**THREE, **SLIDING, "attention_bias": True, "logit_scale": 1.5}, ("v_proj", "down_proj")
    ),
    "llama-dynamic": Case("llama", {"rope_parameters": rope("dynamic", factor=4.0)}, ("q_proj", "v_proj")),
}
