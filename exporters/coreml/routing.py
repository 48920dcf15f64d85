"""Zero-parameter routing as operations of an ML program, for several sites at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lime_edge.compiler.maths.routing import SMALLEST_SCALE, RoutingPlan
from lime_edge.exporters.coreml.graph import Var, mb, scale


@dataclass(frozen=True)
class ProgramOperations:
    """`routing.Operations`: reads are one or two (1, S, G, E), weights (1, S, G, E).

    Of the guarded divisors float16 holds SMALLEST_SCALE; a sum of selected weights is never near SMALLEST_SUM, for the
    largest weight is always among them.

    real: (1, S, 1, 1), 1 where a row is no padding; anchors: (1, S, S) one-hot, the row whose routing each row takes,
    where there are windows. Both None: no padding, and what is read has been taken at the anchors.
    """

    real: Var | None
    anchors: Var | None

    def measure(self, reads: Sequence[Var], plan: RoutingPlan) -> Var:
        """The maxima per site, over the whole call; a lone operand has a share of 1."""
        shared = [self._relate(x, share) for x, share in zip(reads, plan.heated_shares, strict=True)]
        return shared[0] if len(shared) == 1 else mb.add(x=shared[0], y=shared[1])

    def _relate(self, x: Var, share: float) -> Var:
        """share / T * x / max|x|, padding zeroed or replaced."""
        if self.anchors is not None:
            sites, experts = x.shape[2:]
            flat = mb.matmul(x=self.anchors, y=mb.reshape(x=x, shape=[1, -1, sites * experts]))
            x = mb.reshape(x=flat, shape=[1, -1, sites, experts])
        elif self.real is not None:
            x = mb.mul(x=x, y=self.real)
        peak = mb.reduce_max(x=mb.abs(x=x), axes=[1, 3], keep_dims=True)
        return scale(mb.real_div(x=x, y=mb.maximum(x=peak, y=np.float16(SMALLEST_SCALE))), share)

    def soften(self, logits: Var) -> Var:
        """Softmax."""
        return mb.softmax(x=logits, axis=-1)

    def take(self, weights: Var) -> Var:
        """1 at the largest: what is left of it after renormalising."""
        values, places = self.sort_out(weights, 1)
        return self.place(weights, places, values)

    def sort_out(self, weights: Var, most: int) -> tuple[Var, Var]:
        """The largest first."""
        values, places = mb.topk(x=weights, k=most, axis=-1, ascending=False)
        return values, places

    def drop(self, values: Var, reach: float) -> Var:
        """Times 1 or 0."""
        kept = mb.cast(x=mb.greater_equal(x=values, y=self.find_share(values, reach)), dtype="fp16")
        return mb.mul(x=values, y=kept)

    def place(self, weights: Var, places: Var, values: Var) -> Var:
        """Values renormalised at their places."""
        zeros = mb.sub(x=weights, y=weights)
        return mb.scatter_along_axis(data=zeros, indices=places, updates=renormalise(values), axis=-1, mode="update")

    def find_share(self, weights: Var, factor: float) -> Var:
        """factor * the largest."""
        return scale(mb.reduce_max(x=weights, axes=[-1], keep_dims=True), factor)

    def find_rank(self, weights: Var, place: int) -> Var:
        """The least of the largest."""
        values, _ = self.sort_out(weights, place)
        return mb.reduce_min(x=values, axes=[-1], keep_dims=True)

    def gate(self, weights: Var, threshold: Var, heat: float) -> Var:
        """w sigmoid((w - threshold) / heat), renormalised."""
        above = scale(mb.sub(x=weights, y=threshold), 1.0 / heat)
        return renormalise(mb.mul(x=weights, y=mb.sigmoid(x=above)))


def renormalise(values: Var) -> Var:
    """Divided by their sum over the last axis."""
    return mb.real_div(x=values, y=mb.reduce_sum(x=values, axes=[-1], keep_dims=True))
