"""Which decoder to build: the facts of a Hugging Face config that our own decoder needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lime_edge.compiler.formats.backbone import Layer
from lime_edge.compiler.formats.families import FAMILIES, Attention, Facts, Scales, explain
from lime_edge.compiler.maths.block import PLACES as NORM_PLACES
from lime_edge.compiler.maths.block import BlockPlan
from lime_edge.errors import Faults, LimeEdgeError

HEAD = "lm_head"
PLACES = {
    **{"q": "qkv", "k": "qkv", "v": "qkv", "qkv": "qkv", "o": "o"},
    **{"gate": "gate_up", "up": "gate_up", "gate_up": "gate_up", "down": "down"},
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu2")


@dataclass(frozen=True)
class Rotation:
    """One rotation of queries and keys: a frequency for each pair that it turns, and what cos and sin are times.

    base: which layers' it is, see `Attention`.
    """

    kind: str
    frequencies: tuple[float, ...]
    scale: float = 1.0
    base: str = ""

    @property
    def width(self) -> int:
        """How many elements of a head are turned; the others stay."""
        return 2 * len(self.frequencies)


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
    block: BlockPlan
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool
    layers: tuple[Attention, ...]
    rotations: tuple[Rotation, ...]
    logit_cap: float | None = None
    offset_norms: bool = False
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

    @property
    def head_widths(self) -> tuple[int, int, int]:
        """Of all heads of query, key and value: how the product of the three is split."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    def rotation_of(self, layer: int) -> int | None:
        """Which of the rotations a layer's is; None where it does not rotate."""
        attention = self.layers[layer]
        return [one.base for one in self.rotations].index(attention.base) if attention.rope else None

    def rope_tables(self, length: int, which: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for positions 0..length-1, each (length, pairs) float32; a pair for each two elements turned.

        Source: RoFormer (arXiv 2104.09864) eq. 34; scaling as `transformers` computes it.
        """
        rotation = self.rotations[which]
        inverse = torch.tensor(rotation.frequencies, dtype=torch.float32)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse
        return angles.cos() * rotation.scale, angles.sin() * rotation.scale

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """Every linear of one layer in computation order: name -> (out, in)."""
        attention, mlp = f"{self.prefix(layer)}self_attn.", f"{self.prefix(layer)}mlp."
        query, key, value = self.head_widths
        if "qkv" in self.block.fused:
            widths = {f"{attention}qkv_proj": query + key + value}
        else:
            widths = {f"{attention}q_proj": query, f"{attention}k_proj": key, f"{attention}v_proj": value}
        found = {name: (width, self.hidden) for name, width in widths.items()}
        found[f"{attention}o_proj"] = (self.hidden, query)
        if "gate_up" in self.block.fused:
            found[f"{mlp}gate_up_proj"] = (2 * self.intermediate, self.hidden)
        else:
            names = ("gate_proj", "up_proj") if self.block.gated else ("up_proj",)
            found |= {f"{mlp}{name}": (self.intermediate, self.hidden) for name in names}
        return found | {f"{mlp}down_proj": (self.hidden, self.intermediate)}

    def has_bias(self, name: str) -> bool:
        """Whether the linear of that module name carries a bias."""
        kind = name.rsplit(".", 1)[-1]
        if kind == "o_proj":
            return self.o_bias
        if PLACES.get(kind.removesuffix("_proj")) == "qkv":
            return self.qkv_bias
        return self.mlp_bias and kind.removesuffix("_proj") in PLACES

    def norms(self, layer: int) -> dict[str, int]:
        """Every norm of one layer: name -> width of its weight."""
        found, prefix, plan = {}, self.prefix(layer), self.block
        if plan.head_norm is not None:
            norm, (query, key, _) = plan.head_norm, self.head_widths
            one = norm.width == "head"
            found[f"{prefix}self_attn.{norm.query}"] = self.head_dim if one else query
            found[f"{prefix}self_attn.{norm.key}"] = self.head_dim if one else key
        places = [plan.norms.find(place) for place in NORM_PLACES]
        return found | {f"{prefix}{name}": self.hidden for name in places if name is not None}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the state dict: name -> shape. A tied head is not listed."""
        shapes: dict[str, tuple[int, ...]] = {f"{self.embedding}.weight": (self.vocab, self.hidden)}
        for index in range(len(self.layers)):
            prefix = self.prefix(index)
            for name, shape in self.linears(index).items():
                shapes[f"{name}.weight"] = shape
                if self.has_bias(name):
                    shapes[f"{name}.bias"] = (shape[0],)
            shapes |= {f"{name}.weight": (width,) for name, width in self.norms(index).items()}
            if self.block.norm_bias:
                names = (self.block.norms.find(place) for place in NORM_PLACES)
                shapes |= {f"{prefix}{name}.bias": (self.hidden,) for name in names if name is not None}
        shapes[f"{self.norm}.weight"] = (self.hidden,)
        if self.block.norm_bias:
            shapes[f"{self.norm}.bias"] = (self.hidden,)
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

    A tied head multiplies by the scaled table: the last norm takes that back. A norm on queries forgets what scaled
    them, so that their scale is the norm's.
    """
    scales, norm = decoder.scales, decoder.block.head_norm
    query = "q_proj" if norm is None else norm.query
    found = {decoder.embedding: scales.embedding, decoder.norm: scales.logits}
    if decoder.tied:
        found |= {HEAD: scales.embedding, decoder.norm: scales.logits / scales.embedding}
    for index in range(len(decoder.layers)):
        prefix = decoder.prefix(index)
        found[f"{prefix}self_attn.{query}"] = scales.query
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
    family = config.model_type
    if family not in FAMILIES:
        raise LimeEdgeError(
            f"{where}: config.json: model_type: {explain(family)}", f"supported decoder families: {', '.join(FAMILIES)}"
        )
    facts, heads = FAMILIES[family](config), config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    ropes = read_ropes(config, facts)
    check_options(config, facts, ropes, where)
    rotations = tuple(make_rotation(config, facts, base, rope, head_dim) for base, rope in ropes.items())
    shared = len({replace(one, base="") for one in rotations}) == 1  # two kinds of layers, and one rotation after all
    layers = facts.layers or (Attention(),) * config.num_hidden_layers
    decoder = Decoder(
        family=family,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        context=find_context(config, ropes),
        norm_eps=config.layer_norm_eps if facts.block.norm == "layer" else config.rms_norm_eps,
        block=facts.block,
        qkv_bias=facts.qkv_bias,
        o_bias=facts.o_bias,
        mlp_bias=facts.mlp_bias,
        tied=bool(config.tie_word_embeddings),
        layers=tuple(replace(layer, base="") for layer in layers) if shared else layers,
        rotations=tuple(replace(one, base="") for one in rotations[:1]) if shared else rotations,
        logit_cap=facts.logit_cap,
        offset_norms=facts.offset_norms,
        scales=facts.scales,
        gguf=facts.gguf,
    )
    check_numbers(decoder, where)
    return decoder


def read_ropes(config: Any, facts: Facts) -> dict[str, dict[str, Any]]:
    """What the config says of every rotation, by the kind of layers whose it is."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    bases = sorted({layer.base for layer in facts.layers if layer.base})
    return {base: dict(found.get(base) or {}) for base in bases} if bases else {"": found}


def check_options(config: Any, facts: Facts, ropes: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Refuse what a config may say and the decoder does not do.

    Raises:
        LimeEdgeError: all reasons at once.
    """
    with Faults(where, "docs/models.md says what is supported") as faults:
        for rope in ropes.values():
            kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
            if kind not in ROPE_TYPES:
                faults.add("config.json: rope_type", " or ".join(ROPE_TYPES), kind)
            if not (part == 1.0 or (facts.partial and isinstance(part, float) and 0 < part < 1)):
                faults.add("config.json: partial_rotary_factor", "0 to 1" if facts.partial else 1.0, part)
        if facts.block.activation not in ACTIVATIONS:
            faults.add("config.json: hidden_act", " or ".join(ACTIVATIONS), facts.block.activation)
        if getattr(config, "use_bidirectional_attention", None):
            faults.add("config.json: use_bidirectional_attention: attention looks back here", False, True)
        if config.num_attention_heads % config.num_key_value_heads:
            faults.add(
                "config.json: num_attention_heads",
                "a multiple of num_key_value_heads",
                f"{config.num_attention_heads} and {config.num_key_value_heads}",
            )


def find_context(config: Any, ropes: Mapping[str, Mapping[str, Any]]) -> int:
    """Tokens that the model takes at most.

    LongRoPE's frequencies change for ALL tokens where a text grows beyond the original context, so that a cache would
    have to be computed anew: a bundle has the original context. Dynamic scaling begins beyond the whole context only.
    """
    originals = [
        rope["original_max_position_embeddings"] for rope in ropes.values() if rope.get("rope_type") == "longrope"
    ]
    return int(min([config.max_position_embeddings, *originals]))


def check_numbers(decoder: Decoder, where: str) -> None:
    """Refuse a decoder that computes nothing: widths are looked at where config.json is read (configs.SIZES).

    Raises:
        LimeEdgeError: all such numbers at once.
    """
    scales = decoder.scales
    numbers = {
        "norm_eps": decoder.norm_eps,
        **{f"rope_parameters {rotation.base}": rotation.scale for rotation in decoder.rotations},
        "softcapping of attention": decoder.block.cap or 1.0,
        "softcapping of logits": decoder.logit_cap or 1.0,
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
        frequencies = [one for rotation in decoder.rotations for one in rotation.frequencies]
        if not all(math.isfinite(one) and one > 0 for one in frequencies):
            faults.add("config.json: rope_parameters: frequencies that are none")
        if any(not 2 <= rotation.width <= decoder.head_dim for rotation in decoder.rotations):
            widths = " and ".join(str(rotation.width) for rotation in decoder.rotations)
            faults.add("config.json: partial_rotary_factor", f"2 to {decoder.head_dim} elements of a head", widths)
        windows = {layer.window for layer in decoder.layers} - {None}
        if any(not isinstance(window, int) or window < 1 for window in windows):
            faults.add("config.json: sliding_window", "at least 1", f"{windows!r:.40}")


def make_rotation(config: Any, facts: Facts, base: str, rope: Mapping[str, Any], head_dim: int) -> Rotation:
    """A rotation's frequencies, as `transformers` computes them.

    Args:
        base: the kind of layers whose it is, or empty. rope: what the config says of it.
    Source: RoFormer (arXiv 2104.09864) section 3.2.2; alpha: transformers, HunYuanDenseV1RotaryEmbedding.
    """
    kind = rope.get("rope_type", "default")
    if kind == "default" or facts.alpha is not None:
        width = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        theta = rope["rope_theta"]
        if facts.alpha is not None:
            theta = theta * facts.alpha ** (width / (width - 2))
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return Rotation(kind, tuple((1.0 / theta**exponents).tolist()), base=base)
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, layer_type=base or None)
    return Rotation(kind, tuple(inverse.tolist()), float(scale), base)
