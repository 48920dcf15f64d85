"""Zero-parameter routing on torch tensors: expert weights from two activations.

Every function is a plain composition of tensor operators with no data-dependent Python branch, so
that torch.export takes it with symbolic batch and time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lime_edge.compiler.maths.routing import (
    SMALLEST_SCALE,
    SMALLEST_SUM,
    RoutingConfig,
    RoutingPlan,
    plan_routing,
    weigh,
)


def route(frozen: Tensor, delta: Tensor | None, config: RoutingConfig, length: Tensor | None = None) -> Tensor:
    """Weigh the experts of one site, per token.

    Args:
        frozen: (B, T, E) float, the first E columns of the output that the variant routes on.
        delta: (B, T, E) float, the first E columns of the adapter's output; None routes on `frozen` alone.
        config: the hyper-parameters.
        length: 0-dim int64, real tokens of a call whose time axis a static shape has padded on the
            right: the padding then moves neither scale nor windows, and its own weights mean nothing.
            None: all T are real.
    Returns:
        (B, T, E), weights that sum to 1 over E.
    Raises:
        LimeEdgeError: fewer experts than top_k.
    Source: maths.routing.
    """
    reads = (frozen,) if delta is None else (frozen, delta)
    return weigh(plan_routing(config, frozen.shape[-1], len(reads)), TensorOperations(length), reads)


def find_anchors(tokens: int, n_gram: int, length: Tensor | None, device: torch.device) -> Tensor:
    """For every token, the index of the token whose routing it takes: the last one of its window.

    Every window has a member that is its own anchor, so statistics over the gathered tokens are
    statistics over the anchors. That is what the reference does: with windows, the scales of
    `measure_logits` see anchors only.

    Args:
        tokens: T.
        n_gram: n, tokens per window; the last window may be shorter.
        length: as in `route`.
        device: of the result.
    Returns:
        (T,) int64.
    Source: Kowsher/LiME at 82f981f (anchor tokens); conformance README, "n_gram".
    """
    position = torch.arange(tokens, device=device)
    window_end = torch.div(position, n_gram, rounding_mode="floor") * n_gram + (n_gram - 1)
    last = tokens - 1 if length is None else length - 1
    return torch.minimum(window_end, torch.zeros_like(position) + last)


def measure_logits(reads: tuple[Tensor, ...], shares: tuple[float, ...]) -> Tensor:
    """sum_k share_k x_k / max|x_k|, the maxima over the whole call; a lone operand has a share of 1.

    Args:
        reads: (B, T, E) each.
    Returns:
        (B, T, E).
    Source: conformance README, "What the reference computes"; SliceFine's form from its fixtures.
    """
    relative = [x / x.abs().max().clamp_min(SMALLEST_SCALE) for x in reads]
    if len(relative) == 1:
        return relative[0]
    return shares[0] * relative[0] + shares[1] * relative[1]


@dataclass(frozen=True)
class TensorOperations:
    """`routing.Operations` on tensors: reads are one or two (B, T, E), weights (..., E). length: as in `route`."""

    length: Tensor | None = None

    def measure(self, reads: tuple[Tensor, ...], plan: RoutingPlan) -> Tensor:
        """(B, T, E)."""
        first = reads[0]
        if plan.window > 1 or self.length is not None:
            anchors = find_anchors(first.shape[1], plan.window, self.length, first.device)
            reads = tuple(x.index_select(1, anchors) for x in reads)
        return measure_logits(reads, plan.shares) / plan.temperature

    def soften(self, logits: Tensor) -> Tensor:
        """Softmax."""
        return torch.softmax(logits, dim=-1)

    def take(self, weights: Tensor) -> Tensor:
        """1 at the largest, the first of equals."""
        best = weights.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(weights).scatter(-1, best, torch.ones_like(weights[..., :1]))

    def sort_out(self, weights: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """(..., most) each."""
        values, places = torch.topk(weights, most, dim=-1)
        return values, places

    def drop(self, values: Tensor, reach: float) -> Tensor:
        """The first value is the largest."""
        return values * (values >= reach * values[..., :1]).to(values.dtype)

    def place(self, weights: Tensor, places: Tensor, values: Tensor) -> Tensor:
        """Values renormalised at their places."""
        shares = torch.zeros_like(weights)
        return shares.scatter(-1, places, values / values.sum(dim=-1, keepdim=True).clamp_min(SMALLEST_SUM))

    def find_share(self, weights: Tensor, factor: float) -> Tensor:
        """(..., 1)."""
        return factor * weights.amax(dim=-1, keepdim=True)

    def find_rank(self, weights: Tensor, place: int) -> Tensor:
        """(..., 1)."""
        return torch.topk(weights, place, dim=-1).values[..., -1:]

    def gate(self, weights: Tensor, threshold: Tensor, heat: float) -> Tensor:
        """w sigmoid((w - threshold) / heat), renormalised."""
        gated = weights * torch.sigmoid((weights - threshold) / heat)
        return gated / (gated.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
