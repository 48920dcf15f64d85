"""What a session asks of an engine, and what it tells it when loading: the protocols that runtimes implement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lime_edge.bundle.residual import Subtract
from lime_edge.errors import Faults, LimeEdgeError


@dataclass(frozen=True)
class SessionOptions:
    """How to load.

    threads: of the engine, None for the bundle's default. max_length: tokens the cache holds, None
    for the model's context or 2048, whichever is less. providers: execution providers to try, in
    order, instead of the bundle's.
    Raises:
        LimeEdgeError: threads or max_length below 1.
    """

    threads: int | None = None
    max_length: int | None = None
    providers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with Faults("session", "leave it out for the bundle's own default") as faults:
            for name in ("threads", "max_length"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    faults.add(name, "at least 1", value)


class SwitchableEngine(Protocol):
    """What every engine provides: a model that takes an expert residual.

    provider: the execution provider it took. operators: whether the graph's functions run as compiled operators,
    None where it knows none. subtract: its own p - p_ref, None for numpy's.
    """

    provider: str
    operators: bool | None
    subtract: Subtract | None

    def set_expert(self, residual: np.ndarray) -> None:
        """Use d (sum_H,) float32 from the next call on."""

    def set_routed(self) -> None:
        """Weigh the bundle's own experts per token from the next call on."""


class Engine(SwitchableEngine, Protocol):
    """A language model with a cache. length: tokens in the cache; capacity: tokens it holds."""

    length: int
    capacity: int

    def feed(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Append ids (S,) int64 to the cache; logits (keep or S, V) float32 of the last positions."""

    def rewind(self, length: int) -> None:
        """Forget the cache after its first `length` tokens."""


class EncoderEngine(SwitchableEngine, Protocol):
    """A model without a cache."""

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, for checked and complete inputs."""


def blame_engine(target: str, error: Exception) -> LimeEdgeError:
    """What the user is told when an engine fails while it runs (the engines' own errors share no base)."""
    first = next(iter(str(error).splitlines()), "")
    return LimeEdgeError(
        f"{target}: the engine failed: {type(error).__name__}: {first}",
        "lime-edge verify BUNDLE tells whether the artifact is whole and runs here",
    )
