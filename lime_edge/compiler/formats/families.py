"""The decoder families: what each one's config says, as facts of the one decoder that we build.

A new family is one function here, an entry in FAMILIES, and a case in tests/families.py: docs/add-a-model-family.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lime_edge.compiler.maths.block import BlockPlan, HeadNorm, Norms


@dataclass(frozen=True)
class Attention:
    """One layer's attention: whether it rotates, its sliding window in tokens (None: all), and by which base.

    base: of several rotations, the one of layers of this kind; empty where the model has but one.
    """

    rope: bool = True
    window: int | None = None
    base: str = ""


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
        block: what a layer computes.
        qkv_bias, o_bias, mlp_bias: which linears have one.
        layers: one Attention a layer; empty for the default everywhere.
        partial: the config may rotate only the first part of every head.
        alpha: stretches the rotation's base by alpha^(D / (D - 2)), whatever the length; None: it does not.
        offset_norms: the checkpoint holds a norm's weight less 1.
        logit_cap: logits l become cap * tanh(l / cap).
        gguf: llama.cpp's name of the family, and whether its rows of query and key are interleaved although the
            checkpoint's are not; None: it has none.
            Source: ggml-org/llama.cpp, convert_hf_to_gguf.py: classes derived from LlamaModel permute.
    """

    block: BlockPlan = BlockPlan()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    layers: tuple[Attention, ...] = ()
    partial: bool = False
    alpha: float | None = None
    offset_norms: bool = False
    logit_cap: float | None = None
    scales: Scales = Scales()
    gguf: tuple[str, bool] | None = None


BEHIND = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
AROUND = Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def read_llama(config: Any) -> Facts:
    """Llama: one switch for the biases of attention, one for the MLP's."""
    bias, block = bool(config.attention_bias), BlockPlan(activation=config.hidden_act)
    return Facts(block, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.mlp_bias), gguf=("llama", True))


def read_mistral(config: Any) -> Facts:
    """Mistral: one window for all layers, if any."""
    layers = (Attention(window=config.sliding_window),) * config.num_hidden_layers
    return Facts(BlockPlan(activation=config.hidden_act), layers=layers, gguf=("llama", True))


def read_qwen2(config: Any) -> Facts:
    """Qwen2: biases on query, key and value only; windows in some layers."""
    block = BlockPlan(activation=config.hidden_act)
    return Facts(block, qkv_bias=True, layers=read_windows(config), gguf=("qwen2", False))


def read_qwen3(config: Any) -> Facts:
    """Qwen3: norms on the heads of query and key."""
    bias, block = bool(config.attention_bias), BlockPlan(activation=config.hidden_act, head_norm=HeadNorm())
    return Facts(block, qkv_bias=bias, o_bias=bias, layers=read_windows(config), gguf=("qwen3", False))


def read_smollm3(config: Any) -> Facts:
    """SmolLM3: some layers do not rotate."""
    windows = [layer.window for layer in read_windows(config)]
    layers = tuple(Attention(bool(rope), window) for rope, window in zip(config.no_rope_layers, windows, strict=True))
    return replace(read_llama(config), layers=layers, gguf=("smollm3", True))


def read_seed_oss(config: Any) -> Facts:
    """Seed-OSS: Llama with a switch of its own for the bias of attention's output."""
    return replace(read_llama(config), o_bias=bool(config.attention_out_bias), gguf=("seed_oss", False))


def read_granite(config: Any) -> Facts:
    """Granite: Llama with four constants."""
    head_dim = config.hidden_size // config.num_attention_heads
    scales = Scales(
        embedding=config.embedding_multiplier,
        logits=1.0 / config.logits_scaling,
        query=config.attention_multiplier * math.sqrt(head_dim),
        residual=config.residual_multiplier,
    )
    return replace(read_llama(config), scales=scales, gguf=("granite", True))


def read_arcee(config: Any) -> Facts:
    """Arcee: Llama without a gate."""
    facts = read_llama(config)
    return replace(facts, block=replace(facts.block, gated=False), gguf=("arcee", True))


def read_ministral(config: Any) -> Facts:
    """Ministral: Llama without biases; windows in some layers."""
    return Facts(BlockPlan(activation=config.hidden_act), layers=read_windows(config))


def read_hunyuan(config: Any) -> Facts:
    """Hunyuan: Llama with norms on the heads of query and key, after the rotation; alpha stretches its base."""
    bias, rope = bool(config.attention_bias), config.rope_parameters
    norm = HeadNorm("query_layernorm", "key_layernorm", rotated=True)
    return Facts(
        BlockPlan(activation=config.hidden_act, head_norm=norm),
        qkv_bias=bias,
        o_bias=bias,
        alpha=rope.get("alpha") or None if rope.get("rope_type") == "dynamic" else None,
        gguf=("hunyuan-dense", False),
    )


def read_ernie(config: Any) -> Facts:
    """ERNIE 4.5: Llama, neighbours rotated; one switch for all biases."""
    bias, block = bool(config.use_bias), BlockPlan(activation=config.hidden_act, interleaved=True)
    return Facts(block, qkv_bias=bias, o_bias=bias, mlp_bias=bias, gguf=("ernie4_5", False))


def read_helium(config: Any) -> Facts:
    """Helium: Llama, neighbours rotated, no bias on attention's output."""
    facts = read_llama(config)
    return replace(facts, block=replace(facts.block, interleaved=True), o_bias=False, gguf=None)


def read_phi3(config: Any) -> Facts:
    """Phi-3, Phi-4-mini: one product for query, key and value, one for gate and up; part of a head may rotate."""
    block = BlockPlan(activation=config.hidden_act, fused=("qkv", "gate_up"))
    layers = (Attention(window=config.sliding_window),) * config.num_hidden_layers
    return Facts(block, layers=layers, partial=True, gguf=("phi3", False))


def read_glm(config: Any) -> Facts:
    """GLM: gate and up as one product; neighbours rotated in part of every head."""
    block = BlockPlan(activation=config.hidden_act, interleaved=True, fused=("gate_up",))
    return Facts(block, qkv_bias=bool(config.attention_bias), partial=True)


def read_glm4(config: Any) -> Facts:
    """GLM-4: GLM with norms on both sides."""
    facts = read_glm(config)
    norms = Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    return replace(facts, block=replace(facts.block, norms=norms), gguf=("glm4", False))


def read_stablelm(config: Any) -> Facts:
    """StableLM: LayerNorm with a bias; part of a head rotates; some sizes norm the heads, or run in parallel."""
    norm = HeadNorm("q_layernorm", "k_layernorm", "each") if config.qk_layernorm else None
    parallel = bool(config.use_parallel_residual)
    block = BlockPlan(
        norm="layer",
        norm_bias=True,
        norms=Norms(before_mlp=None) if parallel else Norms(),
        parallel=parallel,
        head_norm=norm,
        activation=config.hidden_act,
    )
    return Facts(block, qkv_bias=bool(config.use_qkv_bias), partial=True, gguf=("stablelm", False))


def read_cohere(config: Any) -> Facts:
    """Command R: LayerNorm without a bias, parallel, neighbours rotated, logits scaled."""
    bias = bool(config.attention_bias)
    block = BlockPlan(
        norm="layer",
        norms=Norms(before_mlp=None),
        parallel=True,
        head_norm=HeadNorm(width="each") if getattr(config, "use_qk_norm", False) else None,
        interleaved=True,
        activation=config.hidden_act,
    )
    scales = Scales(logits=config.logit_scale)
    return Facts(block, qkv_bias=bias, o_bias=bias, scales=scales, gguf=("command-r", False))


def read_cohere2(config: Any) -> Facts:
    """Command R7B: Command R whose layers rotate where they slide."""
    layers = tuple(Attention(rope=layer.window is not None, window=layer.window) for layer in read_windows(config))
    return replace(read_cohere(config), layers=layers, gguf=("cohere2", False))


def read_olmo2(config: Any) -> Facts:
    """OLMo 2: norms behind attention and MLP, and over all heads of query and of key."""
    bias = bool(config.attention_bias)
    block = BlockPlan(norms=BEHIND, head_norm=HeadNorm(width="all"), activation=config.hidden_act)
    return Facts(block, qkv_bias=bias, o_bias=bias, gguf=("olmo2", False))


def read_olmo3(config: Any) -> Facts:
    """OLMo 3: OLMo 2 with windows, whose layers have a rotation of their own."""
    return replace(read_olmo2(config), layers=read_windows(config, own_base=True))


def read_exaone4(config: Any) -> Facts:
    """EXAONE 4: norms behind attention and MLP, and on the heads of query and key; with windows, only they rotate."""
    hybrid = config.sliding_window is not None
    layers = tuple(Attention(not hybrid or one.window is not None, one.window) for one in read_windows(config))
    block = BlockPlan(norms=BEHIND, head_norm=HeadNorm(), activation=config.hidden_act)
    return Facts(block, layers=layers, gguf=("exaone4", False))


def read_gemma(config: Any) -> Facts:
    """Gemma: norms of 1 + w, scaled embeddings."""
    bias = bool(config.attention_bias)
    return Facts(
        BlockPlan(activation=getattr(config, "hidden_activation", None) or config.hidden_act),
        qkv_bias=bias,
        o_bias=bias,
        offset_norms=True,
        scales=Scales(embedding=math.sqrt(config.hidden_size)),
        gguf=("gemma", False),
    )


def read_gemma2(config: Any) -> Facts:
    """Gemma 2: Gemma with norms on both sides, capped scores and logits, windows, a scale of its own on queries."""
    facts = read_gemma(config)
    scales = replace(facts.scales, query=math.sqrt(config.head_dim / config.query_pre_attn_scalar))
    return replace(
        facts,
        block=replace(facts.block, norms=AROUND, cap=config.attn_logit_softcapping),
        layers=read_windows(config),
        logit_cap=config.final_logit_softcapping,
        scales=scales,
        gguf=("gemma2", False),
    )


def read_gemma3(config: Any) -> Facts:
    """Gemma 3: Gemma 2 with norms on the heads of query and key, whose sliding layers have a rotation of their own.

    Its attention is given no cap, whatever the config says. Source: transformers, Gemma3Attention.forward.
    """
    facts = read_gemma2(config)
    block = replace(facts.block, head_norm=HeadNorm(), cap=None)
    return replace(facts, block=block, layers=read_windows(config, own_base=True), gguf=("gemma3", False))


def read_windows(config: Any, own_base: bool = False) -> tuple[Attention, ...]:
    """Layers of which some slide: `layer_types` says which; own_base: each kind has a rotation of its own."""
    windows = {"sliding_attention": config.sliding_window, "full_attention": None}
    return tuple(Attention(window=windows[kind], base=kind if own_base else "") for kind in config.layer_types)


FAMILIES: dict[str, Callable[[Any], Facts]] = {
    "llama": read_llama,
    "mistral": read_mistral,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
    "smollm3": read_smollm3,
    "seed_oss": read_seed_oss,
    "granite": read_granite,
    "gemma": read_gemma,
    "gemma2": read_gemma2,
    "gemma3_text": read_gemma3,
    "phi3": read_phi3,
    "olmo2": read_olmo2,
    "olmo3": read_olmo3,
    "ministral": read_ministral,
    "hunyuan_v1_dense": read_hunyuan,
    "ernie4_5": read_ernie,
    "exaone4": read_exaone4,
    "arcee": read_arcee,
    "helium": read_helium,
    "stablelm": read_stablelm,
    "glm": read_glm,
    "glm4": read_glm4,
    "cohere": read_cohere,
    "cohere2": read_cohere2,
}


@dataclass(frozen=True)
class Wrapped:
    """A model of several parts of which the decoder is one; what is left of the others is dropped.

    stem: the decoder's module in it. older: where older files keep it. dropped: what other tensors begin with.
    """

    stem: str
    older: str
    dropped: tuple[str, ...]


TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
WRAPPED = {"gemma3": Wrapped("model.language_model", "language_model", TOWERS)}  # its text; images are not read
MIXTURE = "a mixture of experts, whose feed-forward is another program for every token"
RECURRENT = "a recurrent model: it has a state of its own, and no cache of keys and values alone"
OLDER = "an older design: learned or ALiBi positions, or no gate and no RMS norm"
UNSUPPORTED: dict[str, tuple[str, ...]] = {
    MIXTURE: (
        "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared",
        "phimoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "gpt_oss", "llama4", "llama4_text", "glm4_moe",
        "ernie4_5_moe", "hunyuan_v1_moe", "exaone_moe", "dbrx", "jetmoe", "minimax", "dots1", "lfm2_moe", "cohere2_moe",
        "afmoe",
    ),
    RECURRENT: (
        "mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "rwkv", "recurrent_gemma",
        "xlstm", "nemotron_h", "granitemoehybrid", "olmo_hybrid",
    ),
    "it has blocks of convolutions between those of attention": ("lfm2", "lfm3"),
    "it has embeddings for every layer, and layers that share keys and values": ("gemma3n", "gemma4", "gemma4_text"),
    OLDER: ("gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "mpt", "falcon", "phi", "starcoder2"),
    "its keys and values are compressed (latent attention)": ("minicpm3", "youtu"),
}  # fmt: skip


def explain(family: str) -> str:
    """Why a family is not supported."""
    for reason, names in UNSUPPORTED.items():
        if family in names:
            return f"{family} is not supported: {reason}"
    return f"{family} is not supported: nobody has written down what its layers compute"
