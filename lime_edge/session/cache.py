"""What the engine's cache of one sequence holds: which tokens, and who filled it with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lime_edge.errors import LimeEdgeError
from lime_edge.session.chunks import CHUNK, plan_chunks
from lime_edge.session.engines import Engine, blame_engine
from lime_edge.session.prefixes import count_common

ROOM = (
    "shorten the prompt, open the session with a larger `max_length`, or, where the cache is static, export with a "
    "larger `max_seq_len`"
)


@dataclass(frozen=True)
class Segment:
    """A stretch of the cache: which selection filled it, and its number of tokens."""

    selection: str
    tokens: int


class Cache:
    """The tokens of one sequence, in step with the engine: after every call both hold the same, or neither changed.

    `common` counts tokens at its beginning that the original model read for whichever expert is to act after them.

    Args:
        target: for messages.
    """

    def __init__(self, engine: Engine, target: str):
        self._engine, self._target = engine, target
        self._ids: list[int] = []
        self._segments: list[Segment] = []
        self.capacity, self.common = engine.capacity, 0

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Who filled it, in order."""
        return tuple(self._segments)

    def is_filled_by(self, selection: str) -> bool:
        """Whether all of it is one selection's."""
        return all(segment.selection == selection for segment in self._segments)

    def count_kept(self, ids: Sequence[int], fillers: Sequence[str]) -> int:
        """Tokens at its beginning that are those of a sequence, each filled by whom it should be."""
        mine = [segment.selection for segment in self._segments for _ in range(segment.tokens)]
        return min(count_common(self._ids, ids), count_common(mine, fillers))

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self._engine.rewind(length)
        del self._ids[length:]
        self.common = min(self.common, length)
        kept, left = [], length
        for segment in self._segments:
            if left > 0:
                kept.append(Segment(segment.selection, min(segment.tokens, left)))
            left -= segment.tokens
        self._segments = kept

    def feed(self, ids: np.ndarray, keep: int, filler: str, whole: bool) -> np.ndarray:
        """Append tokens, a long prompt in pieces.

        Args:
            ids: (S,) int64. keep: positions whose logits are wanted, the last ones, 0 for all. filler: who fills.
            whole: in one call.
        Returns:
            (keep or S, V) float32; a single row is the engine's until its next call.
        Raises:
            LimeEdgeError: no room, or an engine that fails.
        """
        if ids.size > self.capacity - len(self):
            raise LimeEdgeError(f"the cache holds {self.capacity} tokens, {ids.size + len(self)} are needed", ROOM)
        stops = [ids.size] if whole else plan_chunks(len(self), ids.size, CHUNK)
        first = 0 if keep == 0 else max(0, ids.size - keep)  # the first position whose logits are wanted
        parts, start = [], 0
        for stop in stops:
            wanted = stop - max(start, first)
            rows = self._feed_piece(ids[start:stop], max(wanted, 1), filler)
            if wanted > 0:
                parts.append(rows if len(stops) == 1 else rows.copy())
            start = stop
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _feed_piece(self, ids: np.ndarray, keep: int, filler: str) -> np.ndarray:
        try:
            rows = self._engine.feed(ids, keep)
        except Exception as error:
            self._engine.rewind(len(self))
            if isinstance(error, LimeEdgeError):
                raise
            raise blame_engine(self._target, error) from error
        self._ids.extend(ids.tolist())
        tokens = ids.size
        if self._segments and self._segments[-1].selection == filler:
            tokens += self._segments.pop().tokens
        self._segments.append(Segment(filler, tokens))
        return rows
