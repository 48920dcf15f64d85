"""Zero-parameter routing: expert weights from two activations. Knows nothing of variants.

Every function is a plain composition of tensor operators with no data-dependent Python branch, so
that torch.export takes it with symbolic batch and time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lime_edge.errors import Faults, LimeEdgeError

# Source of the constants: Kowsher/LiME at 82f981f (guards of the scales and of the renormalisations).
_SMALLEST_SCALE = 1e-6
_SMALLEST_SUM = 1e-9


@dataclass(frozen=True)
class RoutingConfig:
    """Hyper-parameters of routing, named and defaulted as in the reference.

    Attributes:
        top_k: experts kept by soft, hard and sparse top-k (Auto Top-K looks at 2 * top_k when sparse).
        temperature: of the softmax over experts.
        gamma_routing: share of the adapter's output in the logits; 0 routes on the frozen output.
        n_gram: tokens per window; a window takes the routing of its last token.
        soft_topk: weigh smoothly around the k-th largest weight (dense, when Auto Top-K is off).
        soft_topk_temperature: of the sigmoid in soft top-k and dense Auto Top-K.
        auto_topk: keep what reaches auto_topk_threshold * max instead of a fixed number.
        auto_topk_threshold: theta, in (0, 1].
        sparse_mode: keep few experts exactly instead of weighing all of them.
    Raises:
        LimeEdgeError: a value out of range or of the wrong type.
    """

    top_k: int = 2
    temperature: float = 1.0
    gamma_routing: float = 0.5
    n_gram: int = 1
    soft_topk: bool = True
    soft_topk_temperature: float = 0.5
    auto_topk: bool = False
    auto_topk_threshold: float = 0.5
    sparse_mode: bool = False

    def __post_init__(self) -> None:
        with Faults("routing hyper-parameters", "take them from the training run of the adapter") as faults:
            for name in ("top_k", "n_gram"):
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    faults.add(name, "an integer of at least 1", repr(value))
            for name in ("soft_topk", "auto_topk", "sparse_mode"):
                if not isinstance(getattr(self, name), bool):
                    faults.add(name, "true or false", repr(getattr(self, name)))
            for name in ("temperature", "soft_topk_temperature", "auto_topk_threshold"):
                if not _is_number(getattr(self, name)) or getattr(self, name) <= 0:
                    faults.add(name, "a number above 0", repr(getattr(self, name)))
            if not _is_number(self.gamma_routing):
                faults.add("gamma_routing", "a finite number", repr(self.gamma_routing))
            if _is_number(self.auto_topk_threshold) and self.auto_topk_threshold > 1:
                faults.add("auto_topk_threshold", "at most 1", repr(self.auto_topk_threshold))

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> RoutingConfig:
        """Read the routing keys of a hyper-parameter file; other keys are somebody else's.

        Args:
            values: keys as in the reference; missing ones take the reference's defaults.
        Raises:
            LimeEdgeError: as the constructor.
        """
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})  # type: ignore[arg-type]


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
    Source: paper, zero-parameter routing and n-gram windows; conformance README; Kowsher/LiME at 82f981f.
    """
    experts = frozen.shape[-1]
    if config.top_k > experts:
        raise LimeEdgeError(f"top_k: expected at most the number of experts, {experts}, found {config.top_k}")
    if config.n_gram > 1 or length is not None:
        anchors = find_anchors(frozen.shape[1], config.n_gram, length, frozen.device)
        frozen = frozen.index_select(1, anchors)
        delta = None if delta is None else delta.index_select(1, anchors)
    logits = measure_logits(frozen, delta, config.gamma_routing)
    return select(torch.softmax(logits / max(config.temperature, _SMALLEST_SCALE), dim=-1), config)


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


def measure_logits(frozen: Tensor, delta: Tensor | None, gamma_routing: float) -> Tensor:
    """l = (1-g) frozen / max|frozen| + g delta / max|delta|, the maxima over the whole call.

    Args:
        frozen: (B, T, E); delta: (B, T, E) or None (then l = frozen / max|frozen|).
        gamma_routing: g.
    Returns:
        (B, T, E).
    Source: conformance README, "What the reference computes"; SliceFine's form from its fixtures.
    """
    relative = frozen / frozen.abs().max().clamp_min(_SMALLEST_SCALE)
    if delta is None:
        return relative
    adapted = delta / delta.abs().max().clamp_min(_SMALLEST_SCALE)
    return (1.0 - gamma_routing) * relative + gamma_routing * adapted


def select(probs: Tensor, config: RoutingConfig) -> Tensor:
    """Apply the configured selection to softmax weights (..., E); the result sums to 1 over E.

    Source: conformance README, "Selections".
    """
    if config.sparse_mode:
        if config.auto_topk:
            limit = min(2 * config.top_k, probs.shape[-1])
            return select_sparse_auto_topk(probs, limit, config.auto_topk_threshold)
        return select_top1(probs) if config.top_k == 1 else select_hard_topk(probs, config.top_k)
    if config.auto_topk:
        return select_auto_topk(probs, config.auto_topk_threshold, config.soft_topk_temperature)
    if config.soft_topk:
        return select_soft_topk(probs, config.top_k, config.soft_topk_temperature)
    return select_hard_topk(probs, config.top_k)


def select_soft_topk(probs: Tensor, k: int, temperature: float) -> Tensor:
    """w sigmoid((w - k-th largest w) / temperature), renormalised. (..., E) to (..., E)."""
    kth = torch.topk(probs, k, dim=-1).values[..., -1:]
    return _gate(probs, kth, temperature)


def select_auto_topk(probs: Tensor, threshold: float, temperature: float) -> Tensor:
    """w sigmoid((w - theta max w) / temperature), renormalised. (..., E) to (..., E)."""
    return _gate(probs, threshold * probs.amax(dim=-1, keepdim=True), temperature)


def select_hard_topk(probs: Tensor, k: int) -> Tensor:
    """The k largest w, renormalised; the rest 0. (..., E) to (..., E)."""
    values, indices = torch.topk(probs, k, dim=-1)
    return torch.zeros_like(probs).scatter(-1, indices, _renormalise(values))


def select_top1(probs: Tensor) -> Tensor:
    """1 at the largest w. (..., E) to (..., E)."""
    best = probs.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, best, torch.ones_like(probs[..., :1]))


def select_sparse_auto_topk(probs: Tensor, limit: int, threshold: float) -> Tensor:
    """The `limit` largest w that reach theta max w, renormalised. (..., E) to (..., E)."""
    values, indices = torch.topk(probs, limit, dim=-1)
    kept = values * (values >= threshold * values[..., :1]).to(values.dtype)
    return torch.zeros_like(probs).scatter(-1, indices, _renormalise(kept))


def _gate(probs: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    gated = probs * torch.sigmoid((probs - threshold) / temperature)
    return gated / (gated.sum(dim=-1, keepdim=True) + _SMALLEST_SUM)


def _renormalise(values: Tensor) -> Tensor:
    return values / values.sum(dim=-1, keepdim=True).clamp_min(_SMALLEST_SUM)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
