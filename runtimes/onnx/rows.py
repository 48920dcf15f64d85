"""Several sequences in one pass, each with a cache and an expert of its own, over the graphs of one engine.

A step runs the first places of the buffers, because a batch is a view of them: who steps is kept there, and moving a
cache is the price of a row that ends in the middle (once; about what a decode step costs). A prompt is a call for its
row alone: ONNX Runtime's GroupQueryAttention takes several tokens after a past for one row only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lime_edge.errors import LimeEdgeError
from lime_edge.runtimes.onnx.caches import Prefix
from lime_edge.runtimes.onnx.calls import BoundGraph, Shared
from lime_edge.runtimes.onnx.loading import Graphs


@dataclass
class Row:
    """A sequence: its place in the buffers, the tokens in its cache, whether its experts are routed."""

    place: int
    length: int = 0
    routed: bool = False


class OnnxRows:
    """Implements lime_edge.session.engines.Rows. A row is known by the number that `start` gave.

    count: most rows at once. capacity: tokens that a row holds. nbytes: memory of all caches when every row is full
    (pages that were never written take none). routed_apart: routed rows step one by one, because routing's scales are
    those of the whole call.
    """

    routed_apart = True

    def __init__(self, graphs: Graphs, shared: Shared, total: int):
        self._graphs, self._shared = graphs, shared
        self.count, self.capacity = shared.logits.shape[0], shared.caches.tokens - shared.virtual
        self.nbytes = shared.caches.nbytes
        self._experts = np.zeros((self.count, total), np.float32)  # by place, as the caches are
        self._places: list[int | None] = [None] * self.count  # who is there
        self._rows: dict[int, Row] = {}
        self._calls: dict[tuple[int, int, bool], BoundGraph] = {}
        self._changes, self._seen = 0, dict[tuple[int, int, bool], int]()  # which changes of experts a call has seen
        self._next = 0

    def start(self, residual: np.ndarray | None, prefix: Prefix | None = None) -> int:
        """Take a free row.

        Args:
            residual: d (sum_H,) float32, copied; None to weigh the bundle's own experts per token.
            prefix: what its cache begins with.
        Returns:
            Its number, until `stop`.
        Raises:
            LimeEdgeError: all rows are taken, or the prefix is longer than a row.
        """
        if prefix is not None:
            self._check_room(prefix.tokens)
        free = [place for place, taken in enumerate(self._places) if taken is None]
        if not free:
            raise LimeEdgeError(f"all {self.count} rows are taken", "stop one first, or open more")
        number, self._next = self._next, self._next + 1
        row = Row(free[0] if residual is not None else free[-1])  # who never steps with others stays out of their way
        self._rows[number], self._places[row.place] = row, number
        self.set_expert(number, residual)
        if prefix is not None:
            self._shared.caches.restore(row.place, prefix.arrays)
            row.length = prefix.tokens
        return number

    def stop(self, row: int) -> None:
        """Give a row back."""
        self._places[self._rows.pop(row).place] = None

    def set_expert(self, row: int, residual: np.ndarray | None) -> None:
        """Another expert, or routing, from the row's next token on; its cache stays."""
        own = self._rows[row]
        own.routed = residual is None
        if residual is not None:
            self._experts[own.place] = residual
            self._changes += 1

    def length(self, row: int) -> int:
        """Tokens in a row's cache."""
        return self._rows[row].length

    def rewind(self, row: int, length: int) -> None:
        """Forget a row's tokens after the first `length`."""
        own = self._rows[row]
        own.length = min(own.length, length)

    def save(self, row: int, length: int) -> Prefix:
        """A copy of the first `length` tokens of a row's cache, for others to begin with."""
        own = self._rows[row]
        assert 0 < length <= own.length
        return Prefix(length, self._shared.caches.save(own.place, length + self._shared.virtual))

    def feed(self, row: int, ids: np.ndarray, keep: int) -> np.ndarray:
        """Run a prompt, or a piece of one, in a call for this row alone.

        Args:
            ids: (S,) int64. keep: positions whose logits are wanted, the last ones; 0: all.
        Returns:
            (keep or S, V) float32; a single one is a buffer that the row's next call overwrites.
        Raises:
            LimeEdgeError: more tokens than the row has room for; nothing is changed then.
        """
        own = self._rows[row]
        self._check_room(own.length + ids.size)
        wanted = min(keep, ids.size) if keep else ids.size
        logits = self._call(own.place, 1, own.routed).run(ids[None], np.array([own.length]), wanted)
        own.length += ids.size
        return logits[0]

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> list[np.ndarray]:
        """Run one token for each of these rows, in one pass; the others wait.

        Args:
            rows: each once.
        Returns:
            For each of them (V,) float32, in buffers that the next calls overwrite.
        Raises:
            LimeEdgeError: a row is full; nothing is changed then.
        """
        given = dict(zip(rows, tokens, strict=True))
        assert len(given) == len(rows), "each row once"
        for row in rows:
            self._check_room(self._rows[row].length + 1)
        together = [row for row in rows if not self._rows[row].routed]
        found: dict[int, np.ndarray] = {}
        if together:
            self._gather(together)
            order = [row for row in self._places[: len(together)] if row is not None]
            ids = np.array([[given[row]] for row in order], np.int64)
            lengths = np.array([self._rows[row].length for row in order])
            logits = self._call(0, len(order), False).run(ids, lengths, 1)
            for row, own in zip(order, logits, strict=True):
                self._rows[row].length += 1
                found[row] = own[0]
        for row in rows:
            if self._rows[row].routed:
                found[row] = self.feed(row, np.array([given[row]], np.int64), 1)[0]
        return [found[row] for row in rows]

    def _check_room(self, tokens: int) -> None:
        if tokens > self.capacity:
            raise LimeEdgeError(f"a row's cache holds {self.capacity} tokens, {tokens} are needed", "open longer rows")

    def _call(self, first: int, count: int, routed: bool) -> BoundGraph:
        key = first, count, routed
        call = self._calls.get(key)
        if call is None:
            graph = self._graphs.routed if routed else self._graphs.pinned
            call = self._calls[key] = BoundGraph(graph, self._shared, first, count)
        if not routed and self._graphs.takes_expert and self._seen.get(key) != self._changes:
            call.bind_expert(self._experts[first : first + count])
            self._seen[key] = self._changes
        return call

    def _gather(self, rows: list[int]) -> None:
        """Bring these rows into the first places."""
        stepping = set(rows)
        strangers = [place for place in range(len(rows)) if self._places[place] not in stepping]
        for row in rows:
            if self._rows[row].place >= len(rows):
                self._exchange(self._rows[row].place, strangers.pop())

    def _exchange(self, source: int, target: int) -> None:
        """Swap two places, of which the first is taken."""
        caches, virtual = self._shared.caches, self._shared.virtual
        moving, waiting = self._places[source], self._places[target]
        saved = None if waiting is None else caches.save(target, self._rows[waiting].length + virtual)
        assert moving is not None
        caches.move(source, target, self._rows[moving].length + virtual)
        if saved is not None:
            caches.restore(source, saved)
        self._experts[[source, target]] = self._experts[[target, source]]
        self._changes += 1
        for number, place in ((moving, target), (waiting, source)):
            self._places[place] = number
            if number is not None:
                self._rows[number].place = place
