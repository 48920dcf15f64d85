"""What a session asks of an engine, and what it tells it when loading: the protocols that runtimes implement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import numpy as np

from lime_edge.bundle.residual import Subtract
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.session.features import FeatureRows

Placement = dict[str, dict[str, int]]  # execution provider -> type of node -> how many
MOST = {"threads": 1024, "max_length": 1 << 24}  # as lime.json has them


@dataclass(frozen=True)
class SessionOptions:
    """How to load.

    threads: of the engine, None for the bundle's default. max_length: tokens the cache holds, None
    for the model's context or 2048, whichever is less. providers: execution providers to use, in
    order, instead of the bundle's: short names (cpu, cuda) or ONNX Runtime's own; each has to be there.
    Raises:
        LimeEdgeError: threads or max_length that no engine takes.
    """

    threads: int | None = None
    max_length: int | None = None
    providers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with Faults("session", "leave it out for the bundle's own default") as faults:
            for name in ("threads", "max_length"):
                value = getattr(self, name)
                whole = isinstance(value, Integral) and not isinstance(value, bool)
                if value is not None and not (whole and 1 <= value <= MOST[name]):
                    faults.add(name, f"a whole number, at least 1 and at most {MOST[name]}", f"{value!r:.40}")


def choose_capacity(options: SessionOptions, most: int) -> int:
    """Tokens that a session's cache holds, of a program whose cache is static and holds `most`.

    Raises:
        LimeEdgeError: more were asked for.
    """
    capacity = options.max_length or most
    if not 1 <= capacity <= most:
        raise LimeEdgeError(
            f"max_length: expected 1..{most}, found {capacity}", "`max_seq_len` at export sets the cache of this target"
        )
    return capacity


class SwitchableEngine(Protocol):
    """What every engine provides: a model that takes an expert residual.

    provider: the execution provider it took. operators: whether the graph's functions run as compiled operators,
    None where it knows none. subtract: its own p - p_ref, None for numpy's. An engine that knows where its nodes run
    has a property `placement` besides.
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


class Prefix(Protocol):
    """A copy of a sequence's first tokens in a cache. It belongs to the expert that filled it: who keeps it, knows."""

    @property
    def tokens(self) -> int:
        """How many."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""


class Rows(Protocol):
    """Several sequences over one loaded model, each with a cache and an expert of its own, decoded in one pass.

    A row is known by the number that `start` gave. count: most rows at once. capacity: tokens that each holds.
    nbytes: memory of all caches when every row is full. routed_apart: routed rows are run one by one.
    """

    count: int
    capacity: int
    nbytes: int
    routed_apart: bool

    def start(self, residual: np.ndarray | None, prefix: Any = None) -> int:
        """Take a free row for d (sum_H,) float32, copied (None: routed); its cache begins with `prefix`, a Prefix."""

    def stop(self, row: int) -> None:
        """Give a row back."""

    def set_expert(self, row: int, residual: np.ndarray | None) -> None:
        """Another expert, or routing, from the row's next token on; its cache stays."""

    def length(self, row: int) -> int:
        """Tokens in a row's cache."""

    def rewind(self, row: int, length: int) -> None:
        """Forget a row's tokens after the first `length`."""

    def save(self, row: int, length: int) -> Prefix:
        """A copy of a row's first `length` tokens."""

    def feed(self, row: int, ids: np.ndarray, keep: int) -> np.ndarray:
        """Append ids (S,) int64 to one row: logits (keep or S, V) float32; with keep=1 until the row's next call."""

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Sequence[np.ndarray]:
        """Append one token to each of some rows, in one pass: (V,) float32 of each, until the next call."""


class VisionEngine(Engine, Protocol):
    """A language model that reads rows of pictures, and the program that makes them.

    features: rows by their ids, which `feed` takes beside those of the vocabulary.
    """

    features: FeatureRows

    def see(self, tiles: np.ndarray) -> np.ndarray:
        """Features (T, rows, hidden) float32 of tiles (T, 3, S, S) float32, under the expert in use."""


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
