"""The decoder families: what each one's config says, as facts of the one decoder that we build.

A new family is one function here, an entry in FAMILIES, and a case in tests/models.py; see docs/add-a-model-family.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Attention:
    """One layer's attention: whether it rotates, and its sliding window in tokens (None: all)."""

    rope: bool = True
    window: int | None = None


@dataclass(frozen=True)
class Scales:
    """Constants that a family multiplies with: folded into the layers, so that nothing that runs knows of them.

    Attributes:
        embedding: on a token's row, before the first layer. logits: on the logits.
        query: on a query, beside attention's 1 / sqrt(head_dim).
        residual: on what attention and MLP add to the residual stream.
    """

    embedding: float = 1.0
    logits: float = 1.0
    query: float = 1.0
    residual: float = 1.0


@dataclass(frozen=True)
class Facts:
    """What one family says and another does not; the defaults are Llama's.

    Attributes:
        qkv_bias, o_bias, mlp_bias: which linears have one. qk_norm: an RMSNorm on every head of query and key.
        layers: one Attention a layer; empty for the default everywhere.
        gguf: llama.cpp's name of the family, and whether its rows of query and key are interleaved; None: it has none.
            Source: ggml-org/llama.cpp, convert_hf_to_gguf.py: classes derived from LlamaModel permute.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layers: tuple[Attention, ...] = ()
    scales: Scales = Scales()
    gguf: tuple[str, bool] | None = None


def read_llama(config: Any) -> Facts:
    """Llama: one switch for the biases of attention, one for the MLP's."""
    bias = bool(config.attention_bias)
    return Facts(qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.mlp_bias), gguf=("llama", True))


def read_mistral(config: Any) -> Facts:
    """Mistral: one window for all layers, if any."""
    layer = Attention(window=config.sliding_window)
    return Facts(layers=(layer,) * config.num_hidden_layers, gguf=("llama", True))


def read_qwen2(config: Any) -> Facts:
    """Qwen2: biases on query, key and value only; windows in some layers."""
    return Facts(qkv_bias=True, layers=read_windows(config), gguf=("qwen2", False))


def read_qwen3(config: Any) -> Facts:
    """Qwen3: norms on the heads of query and key."""
    bias = bool(config.attention_bias)
    return Facts(qkv_bias=bias, o_bias=bias, qk_norm=True, layers=read_windows(config), gguf=("qwen3", False))


def read_smollm3(config: Any) -> Facts:
    """SmolLM3: some layers do not rotate."""
    windows = [layer.window for layer in read_windows(config)]
    layers = tuple(Attention(bool(rope), window) for rope, window in zip(config.no_rope_layers, windows, strict=True))
    bias = bool(config.attention_bias)
    return Facts(qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.mlp_bias), layers=layers, gguf=("smollm3", True))


def read_seed_oss(config: Any) -> Facts:
    """Seed-OSS: Llama with a switch of its own for the bias of attention's output."""
    return Facts(
        qkv_bias=bool(config.attention_bias),
        o_bias=bool(config.attention_out_bias),
        mlp_bias=bool(config.mlp_bias),
        gguf=("seed_oss", False),
    )


def read_granite(config: Any) -> Facts:
    """Granite: Llama with four constants."""
    head_dim = config.hidden_size // config.num_attention_heads
    bias = bool(config.attention_bias)
    scales = Scales(
        embedding=config.embedding_multiplier,
        logits=1.0 / config.logits_scaling,
        query=config.attention_multiplier * math.sqrt(head_dim),
        residual=config.residual_multiplier,
    )
    return Facts(qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.mlp_bias), scales=scales, gguf=("granite", True))


def read_windows(config: Any) -> tuple[Attention, ...]:
    """Layers of which some slide: `layer_types` says which."""
    kinds = {"sliding_attention": Attention(window=config.sliding_window), "full_attention": Attention()}
    return tuple(kinds[kind] for kind in config.layer_types)


FAMILIES: dict[str, Callable[[Any], Facts]] = {
    "llama": read_llama,
    "mistral": read_mistral,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
    "smollm3": read_smollm3,
    "seed_oss": read_seed_oss,
    "granite": read_granite,
}
