"""Which decoder to build: the facts of a Hugging Face config that our own decoder needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lime_edge.compiler.formats.backbone import Layer
from lime_edge.compiler.formats.families import FAMILIES, Attention, Scales
from lime_edge.errors import Faults

HEAD = "lm_head"
PLACES = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Decoder:
    """Shape and options of a decoder-only language model; widths in elements, lengths in tokens."""

    family: str
    vocab: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    activation: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    layers: tuple[Attention, ...]
    rope_type: str
    rope_frequencies: tuple[float, ...]
    rope_scale: float
    scales: Scales = Scales()
    gguf: tuple[str, bool] | None = None
    stem: str = "model"  # its module in the model: names of tensors begin with it, the head's apart

    @property
    def embedding(self) -> str:
        """The token table's module name."""
        return f"{self.stem}.embed_tokens"

    @property
    def norm(self) -> str:
        """The last norm's module name."""
        return f"{self.stem}.norm"

    def prefix(self, layer: int) -> str:
        """What the names of one layer's modules begin with."""
        return f"{self.stem}.layers.{layer}."

    def rope_tables(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for positions 0..length-1, each (length, head_dim/2) float32.

        Source: RoFormer (arXiv 2104.09864) eq. 34; scaling as `transformers` computes it.
        """
        inverse = torch.tensor(self.rope_frequencies, dtype=torch.float32)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse
        return angles.cos() * self.rope_scale, angles.sin() * self.rope_scale

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """Every linear of one layer in computation order: name -> (out, in)."""
        prefix = self.prefix(layer)
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            f"{prefix}self_attn.q_proj": (query, self.hidden),
            f"{prefix}self_attn.k_proj": (key, self.hidden),
            f"{prefix}self_attn.v_proj": (key, self.hidden),
            f"{prefix}self_attn.o_proj": (self.hidden, query),
            f"{prefix}mlp.gate_proj": (self.intermediate, self.hidden),
            f"{prefix}mlp.up_proj": (self.intermediate, self.hidden),
            f"{prefix}mlp.down_proj": (self.hidden, self.intermediate),
        }

    def has_bias(self, name: str) -> bool:
        """Whether the linear of that module name carries a bias."""
        kind = name.rsplit(".", 1)[-1]
        if kind in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        if kind == "o_proj":
            return self.o_bias
        return self.mlp_bias and kind in ("gate_proj", "up_proj", "down_proj")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the state dict: name -> shape. A tied head is not listed."""
        shapes: dict[str, tuple[int, ...]] = {f"{self.embedding}.weight": (self.vocab, self.hidden)}
        for index in range(len(self.layers)):
            prefix = self.prefix(index)
            for name, shape in self.linears(index).items():
                shapes[f"{name}.weight"] = shape
                if self.has_bias(name):
                    shapes[f"{name}.bias"] = (shape[0],)
            if self.qk_norm:
                shapes[f"{prefix}self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[f"{prefix}input_layernorm.weight"] = (self.hidden,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (self.hidden,)
        shapes[f"{self.norm}.weight"] = (self.hidden,)
        if not self.tied:
            shapes[f"{HEAD}.weight"] = (self.vocab, self.hidden)
        return shapes


def list_layers(decoder: Decoder) -> dict[str, Layer]:
    """Every module that can be a site, in computation order."""
    layers = {decoder.embedding: Layer((decoder.vocab, decoder.hidden), True, False, (-1, "head"))}
    for index in range(len(decoder.layers)):
        for name, shape in decoder.linears(index).items():
            place = PLACES[name.rsplit(".", 1)[-1].removesuffix("_proj")]
            layers[name] = Layer(shape, False, decoder.has_bias(name), (index, place))
    return layers


def list_scales(decoder: Decoder) -> dict[str, float]:
    """Constants to fold, by the module whose output they multiply; logits by way of the last norm.

    A tied head multiplies by the scaled table: the last norm takes that back.
    """
    scales = decoder.scales
    found = {decoder.embedding: scales.embedding, decoder.norm: scales.logits}
    if decoder.tied:
        found |= {HEAD: scales.embedding, decoder.norm: scales.logits / scales.embedding}
    for index in range(len(decoder.layers)):
        prefix = decoder.prefix(index)
        found[f"{prefix}self_attn.q_proj"] = scales.query
        found[f"{prefix}self_attn.o_proj"] = found[f"{prefix}mlp.down_proj"] = scales.residual
    return {name: scale for name, scale in found.items() if scale != 1.0}


def read_decoder(config: PreTrainedConfig, where: str) -> Decoder:
    """Turn a `transformers` config into a Decoder.

    Args:
        config: a loaded config of one of FAMILIES.
        where: named in errors, usually the model's path.
    Raises:
        LimeEdgeError: the family or an option of it is not supported; all reasons at once.
    """
    hint = f"supported decoder families: {', '.join(FAMILIES)}; RoPE types: {', '.join(ROPE_TYPES)}"
    with Faults(where, hint) as faults:
        family = config.model_type
        if family not in FAMILIES:
            faults.add("config.json: model_type", " or ".join(FAMILIES), family)
            faults.raise_any()
        rope = dict(getattr(config, "rope_parameters", None) or {})
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            faults.add("config.json: rope_type", " or ".join(ROPE_TYPES), rope_type)
        if config.hidden_act not in ACTIVATIONS:
            faults.add("config.json: hidden_act", " or ".join(ACTIVATIONS), config.hidden_act)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            faults.add("config.json: partial_rotary_factor", 1.0, rope["partial_rotary_factor"])
        if config.num_attention_heads % config.num_key_value_heads:
            faults.add(
                "config.json: num_attention_heads",
                "a multiple of num_key_value_heads",
                f"{config.num_attention_heads} and {config.num_key_value_heads}",
            )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies, scale = _rope_frequencies(config, rope_type, rope, head_dim)
    facts = FAMILIES[family](config)
    decoder = Decoder(
        family=family,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        context=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        activation=config.hidden_act,
        qkv_bias=facts.qkv_bias,
        o_bias=facts.o_bias,
        mlp_bias=facts.mlp_bias,
        qk_norm=facts.qk_norm,
        tied=bool(config.tie_word_embeddings),
        layers=facts.layers or (Attention(),) * config.num_hidden_layers,
        rope_type=rope_type,
        rope_frequencies=frequencies,
        rope_scale=scale,
        scales=facts.scales,
        gguf=facts.gguf,
    )
    check_numbers(decoder, where)
    return decoder


def check_numbers(decoder: Decoder, where: str) -> None:
    """Refuse a decoder that computes nothing: widths are looked at where config.json is read (configs.SIZES).

    Raises:
        LimeEdgeError: all such numbers at once.
    """
    scales = decoder.scales
    numbers = {
        "rms_norm_eps": decoder.norm_eps,
        "rope_scaling": decoder.rope_scale,
        "embedding_multiplier": scales.embedding,
        "logits_scaling": scales.logits,
        "attention_multiplier": scales.query,
        "residual_multiplier": scales.residual,
    }
    with Faults(where, "is this what save_pretrained writes?") as faults:
        for name, number in numbers.items():
            if not isinstance(number, (int, float)) or not (math.isfinite(number) and 0 < number <= 1e9):
                faults.add(f"config.json: {name}", "a number above 0", f"{number!r:.40}")
        if decoder.head_dim % 2 or decoder.head_dim < 2:
            faults.add("config.json: head_dim", "an even number", decoder.head_dim)
        if not all(math.isfinite(one) and one > 0 for one in decoder.rope_frequencies):
            faults.add("config.json: rope_parameters: frequencies that are none")
        windows = {layer.window for layer in decoder.layers} - {None}
        if any(not isinstance(window, int) or window < 1 for window in windows):
            faults.add("config.json: sliding_window", "at least 1", f"{windows!r:.40}")


def _rope_frequencies(
    config: Any, rope_type: str, rope: dict[str, Any], head_dim: int
) -> tuple[tuple[float, ...], float]:
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return tuple((1.0 / rope["rope_theta"] ** exponents).tolist()), 1.0
    inverse, scale = ROPE_INIT_FUNCTIONS[rope_type](config)
    return tuple(inverse.tolist()), float(scale)
