"""Rows of pictures by number: beyond the vocabulary, every row of every picture seen has an id of its own.

So a prompt with pictures is a list of ids like any other, and whatever compares, cuts or keeps ids (the cache, prefixes
that rows share, pieces of a long prompt) does right by pictures without knowing of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError

LIMIT = 256 << 20  # bytes of rows that are kept


class FeatureRows:
    """Features of pictures, the least recently used forgotten first.

    Args:
        first: the vocabulary's size. hidden: width of a row. tokens: the placeholders' ids.
        limit: bytes of all rows; the newest picture is always kept.
    """

    def __init__(self, first: int, hidden: int, tokens: tuple[int, ...], limit: int = LIMIT):
        self.first, self.hidden, self.tokens, self.limit = first, hidden, tokens, limit
        self._next, self._held = first, 0
        self._pictures: OrderedDict[int, tuple[Hashable, int, np.ndarray]] = OrderedDict()  # by first id, oldest first
        self._ids: dict[Hashable, int] = {}
        self._starts: list[int] = []

    def find(self, key: Hashable) -> range | None:
        """The ids of what was kept under a key, or None."""
        start = self._ids.get(key)
        if start is None:
            return None
        self._pictures.move_to_end(start)
        return range(start, start + len(self._pictures[start][2]))

    def add(self, key: Hashable, rows: np.ndarray, token: int) -> range:
        """Keep a picture's rows: (N, hidden) float32. token: the placeholder they stand for. Returns their ids."""
        start, self._next = self._next, self._next + len(rows)
        self._pictures[start], self._ids[key] = (key, token, np.ascontiguousarray(rows, np.float32)), start
        self._starts.append(start)
        self._held += rows.nbytes
        while self._held > self.limit and len(self._pictures) > 1:
            gone, (old, _, array) = self._pictures.popitem(last=False)
            self._held -= array.nbytes
            self._starts.remove(gone)
            if self._ids.get(old) == gone:
                del self._ids[old]
        return range(start, start + len(rows))

    def check(self, ids: np.ndarray) -> None:
        """Refuse ids beyond the vocabulary that no picture has.

        Raises:
            LimeEdgeError: never given out, or forgotten.
        """
        self._locate(ids[ids >= self.first])

    def _locate(self, numbers: np.ndarray) -> np.ndarray:
        """Of each id of a row, where its picture stands in `_starts`."""
        places = np.searchsorted(self._starts, numbers, "right") - 1
        for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
            start = self._starts[place] if place >= 0 else -1
            if start < 0 or number >= start + len(self._pictures[start][2]):
                raise LimeEdgeError(f"token id {number}: no picture that is held has it", "see the picture again")
        return places

    def resolve(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a graph takes: the ids with placeholders for rows, and the rows (N, hidden) float32 in that order.

        Args:
            ids: (B, S) int64.
        Raises:
            LimeEdgeError: an id of a picture that was forgotten, or a bare placeholder among rows of pictures.
        """
        chosen = ids >= self.first
        if not chosen.any():
            return ids, np.zeros((0, self.hidden), np.float32)
        if np.isin(ids, self.tokens).any():
            raise LimeEdgeError("a placeholder without a picture among pictures", "give as many images as placeholders")
        numbers = ids[chosen]
        places, ids = self._locate(numbers), ids.copy()
        rows, tokens = np.empty((len(numbers), self.hidden), np.float32), np.empty(len(numbers), np.int64)
        for place in np.unique(places).tolist():
            mine, start = places == place, self._starts[place]
            _, token, held = self._pictures[start]
            rows[mine], tokens[mine] = held[numbers[mine] - start], token
        ids[chosen] = tokens
        return ids, rows


def open_features(bundle: Bundle) -> FeatureRows | None:
    """An empty store for a bundle's pictures; None where it holds a model of text alone."""
    facts, backbone = bundle.manifest.vision, bundle.manifest.backbone
    return None if facts is None else FeatureRows(backbone.vocab, backbone.hidden, facts.image_tokens)
