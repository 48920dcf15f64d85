"""Spending a size: every matrix at four bits, then eight for those that gain the most by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Weigh = Callable[[int, int, int, int, bool], int]  # rows, columns, bits, group, token table or not -> bytes stored


@dataclass(frozen=True)
class Candidate:
    """Matrices that get their bits together.

    narrow, wide: bytes at four and at eight bits; equal where four are not to be had. loss: what four bits cost, in
    nats a token.
    """

    name: str
    narrow: int
    wide: int
    loss: float

    @property
    def worth(self) -> float:
        """Loss spared per byte."""
        return self.loss / max(1, self.wide - self.narrow)


def rank(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that can be widened, the most worthwhile first."""
    return sorted((one for one in candidates if one.wide > one.narrow), key=lambda one: (-one.worth, one.name))


def spend(candidates: Sequence[Candidate], allowed: int) -> frozenset[str]:
    """Names of what gets eight bits: by worth, passing over what no longer fits.

    Args:
        allowed: bytes for all candidates together.
    """
    left, chosen = allowed - weigh_all(candidates, frozenset()), set()
    for one in rank(candidates):
        if one.wide - one.narrow <= left:
            left -= one.wide - one.narrow
            chosen.add(one.name)
    return frozenset(chosen)


def weigh_all(candidates: Sequence[Candidate], wide: frozenset[str]) -> int:
    """Bytes of all candidates, some of them at eight bits."""
    return sum(one.wide if one.name in wide else one.narrow for one in candidates)


def spread(candidates: Sequence[Candidate], count: int) -> list[int]:
    """Sizes from all narrow to all wide in equal steps: the points of a curve."""
    low, high = weigh_all(candidates, frozenset()), sum(one.wide for one in candidates)
    return [low + (high - low) * step // (count - 1) for step in range(count)]
