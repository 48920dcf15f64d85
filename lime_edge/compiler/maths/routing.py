"""Zero-parameter routing as a plan: what is computed, said once, for tensors and for the nodes of every target.

`plan_routing` turns hyper-parameters into a `RoutingPlan`; `weigh` walks through it with whatever computes: torch
tensors (`maths.route`), ONNX nodes, operations of an ML program. Knows nothing of variants, and imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol, TypeVar

from lime_edge.errors import Faults, LimeEdgeError

# Guards of the scales and of the renormalisations. Source: Kowsher/LiME at 82f981f.
SMALLEST_SCALE = 1e-6
SMALLEST_SUM = 1e-9


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


# the selections: what becomes of the softmax weights of one token


@dataclass(frozen=True)
class Take:
    """1 for the expert of the largest weight, 0 for the others."""


@dataclass(frozen=True)
class Keep:
    """The `most` largest weights, renormalised, 0 for the others; of those only what reaches `reach` * the largest."""

    most: int
    reach: float | None = None


@dataclass(frozen=True)
class Share:
    """A threshold: `factor` * the largest weight."""

    factor: float


@dataclass(frozen=True)
class Rank:
    """A threshold: the `place`-th largest weight."""

    place: int


@dataclass(frozen=True)
class Gate:
    """w sigmoid((w - threshold) / heat), renormalised."""

    threshold: Share | Rank
    heat: float


Selection = Take | Keep | Gate


@dataclass(frozen=True)
class RoutingPlan:
    """What routing computes at one site, in this order.

    Attributes:
        experts: E. window: every token takes the routing of the last token of its window of so many.
        shares: of each operand in the logits, l = sum_k share_k x_k / max|x_k| / temperature: of the frozen output
            and of delta, or of the frozen output alone. The maxima run over the whole call.
        temperature: of the softmax over l. selection: what becomes of its weights.
    Source: paper, zero-parameter routing and n-gram windows; conformance README, "What the reference computes".
    """

    experts: int
    window: int
    shares: tuple[float, ...]
    temperature: float
    selection: Selection

    @property
    def heated_shares(self) -> tuple[float, ...]:
        """The shares with the temperature in them."""
        return tuple(share / self.temperature for share in self.shares)


def plan_routing(config: RoutingConfig, experts: int, operands: int = 2) -> RoutingPlan:
    """What the hyper-parameters mean for a site.

    Args:
        experts: E. operands: 2, the frozen output and delta; 1, the frozen output alone (SliceFine).
    Raises:
        LimeEdgeError: fewer experts than top_k.
    """
    if config.top_k > experts:
        raise LimeEdgeError(f"top_k: expected at most the number of experts, {experts}, found {config.top_k}")
    shares = (1.0,) if operands == 1 else (1.0 - config.gamma_routing, config.gamma_routing)
    temperature = max(config.temperature, SMALLEST_SCALE)
    return RoutingPlan(experts, config.n_gram, shares, temperature, choose_selection(config, experts))


def choose_selection(config: RoutingConfig, experts: int) -> Selection:
    """The decision tree of the hyper-parameters. Source: conformance README, "Selections"."""
    if config.sparse_mode:
        if config.auto_topk:
            return Keep(min(2 * config.top_k, experts), config.auto_topk_threshold)
        return Take() if config.top_k == 1 else Keep(config.top_k)
    if config.auto_topk:
        return Gate(Share(config.auto_topk_threshold), config.soft_topk_temperature)
    if config.soft_topk:
        return Gate(Rank(config.top_k), config.soft_topk_temperature)
    return Keep(config.top_k)


Reads = TypeVar("Reads", contravariant=True)
Value = TypeVar("Value")


class Operations(Protocol[Reads, Value]):
    """What a plan is computed with. Weights are a Value whose last axis holds the experts."""

    def measure(self, reads: Reads, plan: RoutingPlan) -> Value:
        """The logits l of every token, from what its window's last token has at hand."""

    def soften(self, logits: Value) -> Value:
        """Softmax."""

    def take(self, weights: Value) -> Value:
        """1 at the largest, 0 elsewhere."""

    def sort_out(self, weights: Value, most: int) -> tuple[Value, Value]:
        """The `most` largest, the largest first, and their places."""

    def drop(self, values: Value, reach: float) -> Value:
        """What `sort_out` gave, 0 where it does not reach `reach` * the largest."""

    def place(self, weights: Value, places: Value, values: Value) -> Value:
        """Values renormalised at their places, 0 elsewhere."""

    def find_share(self, weights: Value, factor: float) -> Value:
        """factor * the largest, one a token."""

    def find_rank(self, weights: Value, place: int) -> Value:
        """The `place`-th largest, one a token."""

    def gate(self, weights: Value, threshold: Value, heat: float) -> Value:
        """w sigmoid((w - threshold) / heat), renormalised."""


def weigh(plan: RoutingPlan, operations: Operations[Reads, Value], reads: Reads) -> Value:
    """The experts' weights per token, which sum to 1.

    Args:
        reads: what routing reads, as the operations take it.
    """
    return select(plan.selection, operations, operations.soften(operations.measure(reads, plan)))


def select(selection: Selection, operations: Operations[Reads, Value], weights: Value) -> Value:
    """Apply a selection to softmax weights."""
    if isinstance(selection, Take):
        return operations.take(weights)
    if isinstance(selection, Keep):
        values, places = operations.sort_out(weights, selection.most)
        if selection.reach is not None:
            values = operations.drop(values, selection.reach)
        return operations.place(weights, places, values)
    if isinstance(selection.threshold, Share):
        threshold = operations.find_share(weights, selection.threshold.factor)
    else:
        threshold = operations.find_rank(weights, selection.threshold.place)
    return operations.gate(weights, threshold, selection.heat)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
