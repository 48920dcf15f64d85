"""Keys and values of several sequences: a buffer per layer and kind, of which every sequence has a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prefix:
    """A copy of a sequence's first tokens, for other sequences to begin with.

    tokens: how many, virtual tokens not counted. arrays: per buffer, in order (kv_heads, tokens, head_dim).
    """

    tokens: int
    arrays: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(array.nbytes for array in self.arrays)


class Caches:
    """Buffers (rows, kv_heads, tokens, head_dim) float32; those of neighbouring rows are a view of each.

    Args:
        model: the manifest's facts. tokens: that a row holds, virtual ones included.
    """

    def __init__(self, model: dict[str, Any], rows: int, tokens: int):
        self.tokens = tokens
        shape = (rows, model["kv_heads"], tokens, model["head_dim"])
        names = [f"{layer}.{kind}" for layer in range(model["layers"]) for kind in ("key", "value")]
        self.buffers = {name: np.zeros(shape, np.float32) for name in names}  # untouched pages cost nothing

    @property
    def nbytes(self) -> int:
        """Memory they take when every row is full."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def view(self, first: int, count: int) -> Iterator[tuple[str, np.ndarray]]:
        """Rows first to first + count of each buffer, by its name: LAYER.key or LAYER.value."""
        for name, buffer in self.buffers.items():
            yield name, buffer[first : first + count]

    def save(self, row: int, tokens: int) -> tuple[np.ndarray, ...]:
        """A copy of a row's first tokens."""
        return tuple(buffer[row, :, :tokens].copy() for buffer in self.buffers.values())

    def restore(self, row: int, arrays: tuple[np.ndarray, ...]) -> None:
        """Write what `save` gave into a row."""
        for buffer, array in zip(self.buffers.values(), arrays, strict=True):
            buffer[row, :, : array.shape[1]] = array

    def move(self, source: int, target: int, tokens: int) -> None:
        """Write one row's first tokens over another row's."""
        for buffer in self.buffers.values():
            buffer[target, :, :tokens] = buffer[source, :, :tokens]
