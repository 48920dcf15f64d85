"""One decoder layer as a plan: what is normalised, added and multiplied in which order, said once for all that compute.

A family is a plan (`formats.families`); `run_block` walks through it with whatever computes: torch modules, ONNX nodes,
operations of an ML program. What an attention or an MLP is made of, the operations read from the same plan. Knows no
family, and imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

Place = Literal["before_attention", "after_attention", "before_mlp", "after_mlp"]
Source = Literal["attention", "mlp"]
PLACES: tuple[Place, ...] = ("before_attention", "after_attention", "before_mlp", "after_mlp")


@dataclass(frozen=True)
class Norms:
    """Which norms a layer has, by their tensors' names within it; None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    def find(self, place: Place) -> str | None:
        """The norm of a place."""
        name: str | None = getattr(self, place)
        return name


@dataclass(frozen=True)
class HeadNorm:
    """A norm on queries and keys, of the kind of the layer's others and without a bias.

    Attributes:
        query, key: tensors' names within self_attn.
        width: "head": over each head, one vector for all of them, (D,); "each": over each head, a vector for each,
            (heads * D,); "all": over all heads at once, (heads * D,).
        rotated: it comes after the rotation.
    """

    query: str = "q_norm"
    key: str = "k_norm"
    width: Literal["head", "each", "all"] = "head"
    rotated: bool = False


@dataclass(frozen=True)
class BlockPlan:
    """What one layer computes; the defaults are Llama's.

    Attributes:
        norm: "rms", x / rms(x) * w, or "layer", which subtracts the mean first. norm_bias: it adds a bias.
        norms: where. parallel: the MLP reads what attention reads, and both are added at once.
        head_norm: on queries and keys. interleaved: the rotation turns neighbours, not half against half.
        cap: scores s become cap * tanh(s / cap) before the mask.
        activation: of the MLP. gated: it is activation(gate) * up; else activation(up).
        fused: products that the checkpoint, and so an adapter, knows as one layer: "qkv", "gate_up".
    Source: arXiv 1910.07467 (RMS norm), 2408.00118 (Gemma 2: norms on both sides, caps), 2501.00656 (OLMo 2: norms
        behind), 2302.05442 (parallel layers).
    """

    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norms: Norms = Norms()
    parallel: bool = False
    head_norm: HeadNorm | None = None
    interleaved: bool = False
    cap: float | None = None
    activation: str = "silu"
    gated: bool = True
    fused: tuple[str, ...] = ()


Stream = TypeVar("Stream")
Value = TypeVar("Value")


class Operations(Protocol[Stream, Value]):
    """What a plan is computed with, for one layer. A Stream is the residual stream, a Value what is computed of it."""

    def read(self, place: Place, stream: Stream) -> tuple[Value, Stream]:
        """The stream through the norm of that place (through nothing, where there is none), and the stream itself.

        It is handed back because who fuses adding and normalising has added only now.
        """

    def normalise(self, place: Place, x: Value) -> Value:
        """x through the norm of that place, which is there."""

    def attend(self, x: Value) -> Value:
        """Attention with the products before and after it."""

    def feed(self, x: Value) -> Value:
        """The MLP."""

    def add(self, stream: Stream, x: Value, source: Source) -> Stream:
        """The stream with x added; source: what gave it."""


def run_block(plan: BlockPlan, operations: Operations[Stream, Value], stream: Stream) -> Stream:
    """The residual stream after one layer."""
    x, stream = operations.read("before_attention", stream)
    attended = operations.attend(x)
    if plan.norms.after_attention is not None:
        attended = operations.normalise("after_attention", attended)
    stream = operations.add(stream, attended, "attention")
    if not plan.parallel:
        x, stream = operations.read("before_mlp", stream)
    fed = operations.feed(x)
    if plan.norms.after_mlp is not None:
        fed = operations.normalise("after_mlp", fed)
    return operations.add(stream, fed, "mlp")
