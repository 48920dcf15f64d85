"""How to compile: every option, checked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lime_edge.compiler.maths.quantize import INT4_GROUP
from lime_edge.errors import LimeEdgeError

QUANTS = {"none": 0, "int8": 8, "int4": 4}
ROUNDINGS = ("nearest", "search", "gptq")
PLACES = ("head", "qkv", "o", "gate_up", "down")  # where a matrix stands; head: embedding tables and the head
KEPT_INT8 = ("head", "qkv", "down")  # what an int4 model keeps at int8, see `rounding.model.choose_bits`
Progress = Callable[[str, int, int], None]  # called with (step, done, total)


@dataclass(frozen=True)
class CompileOptions:
    """How to compile.

    quant: "int4", "int8" or "none". group: elements per int4 scale along the input axis.
    fold: "shared", "none" or an expert's name. single: emit that fold without branches.
    rounding: "nearest", "search" or "gptq". keep_int8: what an int4 model keeps at
    int8: some of PLACES.
    """

    quant: str = "int4"
    group: int = INT4_GROUP
    fold: str = "shared"
    single: bool = False
    rounding: str = "gptq"
    keep_int8: tuple[str, ...] = KEPT_INT8

    def __post_init__(self) -> None:
        if self.quant not in QUANTS:
            raise LimeEdgeError(
                f"`quant`: expected {', '.join(QUANTS)}, found {self.quant!r}",
                "int4 is the smallest, int8 more exact, none keeps float32",
            )
        if self.rounding not in ROUNDINGS:
            raise LimeEdgeError(
                f"`rounding`: expected {', '.join(ROUNDINGS)}, found {self.rounding!r}",
                "gptq (calibrated) is the most exact for int4",
            )
        if unknown := [place for place in self.keep_int8 if place not in PLACES]:
            raise LimeEdgeError(
                f"`keep_int8`: expected none or some of {', '.join(PLACES)}, found {', '.join(unknown)}",
                "head, qkv and down gain the most; none makes the smallest bundle",
            )
        if not 16 <= self.group <= 256 or self.group & (self.group - 1):
            raise LimeEdgeError(
                f"`group`: expected a power of two from 16 to 256, found {self.group}",
                "32 suits every target; larger groups are smaller and less exact",
            )
        if self.single and self.fold in ("shared", "none"):
            raise LimeEdgeError(
                f"`single`: needs an expert's name in `fold`, found {self.fold!r}",
                "one expert is folded then and no other can be used; without it all experts stay",
            )


def check_fold(fold: str, names: Sequence[str]) -> None:
    """Refuse what a fold cannot mean.

    Raises:
        LimeEdgeError: neither a policy nor one of the experts.
    """
    if fold not in ("shared", "none", *names):
        raise LimeEdgeError(
            f"`fold`: expected shared, none or an expert's name, found {fold!r}",
            f"experts of this adapter: {', '.join(names)}",
        )
