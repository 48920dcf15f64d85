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
    int8: some of PLACES. size: bytes that the bundle may take, or bits: mean bits of a stored weight, scales included;
    with either one, sensitivity says what an int4 model keeps at int8, and `keep_int8` nothing.
    """

    quant: str = "int4"
    group: int = INT4_GROUP
    fold: str = "shared"
    single: bool = False
    rounding: str = "gptq"
    keep_int8: tuple[str, ...] = KEPT_INT8
    size: int | None = None
    bits: float | None = None

    @property
    def spends(self) -> bool:
        """Whether bits go where they matter most, up to a size."""
        return self.size is not None or self.bits is not None

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
        if self.spends:
            self._check_spending()
        if self.single and self.fold in ("shared", "none"):
            raise LimeEdgeError(
                f"`single`: needs an expert's name in `fold`, found {self.fold!r}",
                "one expert is folded then and no other can be used; without it all experts stay",
            )

    def _check_spending(self) -> None:
        name = "bits" if self.size is None else "size"
        if self.size is not None and self.bits is not None:
            raise LimeEdgeError("`size` and `bits`: expected one of them, found both", "they say the same in two ways")
        if self.quant != "int4":
            raise LimeEdgeError(
                f"`{name}`: goes with `quant=int4`, found {self.quant!r}", "int8 and none have one size"
            )
        if self.keep_int8 != KEPT_INT8:
            raise LimeEdgeError(
                f"`{name}` and `keep_int8`: expected one of them, found both",
                f"with `{name}` the compiler measures what to keep",
            )
        if (self.size or self.bits or 0) <= 0:
            raise LimeEdgeError(
                f"`{name}`: expected more than 0, found {self.size or self.bits}", "size=110MB, bits=5.5"
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
