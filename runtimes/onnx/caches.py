"""Keys and values of several sequences: a buffer per layer and kind, of which every sequence has a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lime_edge.bundle.fields import Manifest
from lime_edge.runtimes.onnx.places import Buffer, Device, Host


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
    """Buffers (rows, kv_heads, tokens, head_dim), float32 or float16; those of neighbouring rows are a view of each.

    Args:
        manifest: of a language model. tokens: that a row holds, virtual ones included. dtype: as the graph has them.
    """

    def __init__(self, manifest: Manifest, rows: int, tokens: int, place: Host | Device, dtype: type = np.float32):
        self.tokens = tokens
        assert manifest.decoder is not None
        shape = (rows, manifest.decoder.kv_heads, tokens, manifest.decoder.head_dim)
        names = [f"{layer}.{kind}" for layer in range(manifest.backbone.layers) for kind in ("key", "value")]
        self.buffers: dict[str, Buffer] = {name: place.zeros(shape, dtype) for name in names}
        self.nbytes = len(names) * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize  # when all are full

    def view(self, first: int, count: int) -> Iterator[tuple[str, Buffer]]:
        """Rows first to first + count of each buffer, by its name: LAYER.key or LAYER.value."""
        for name, buffer in self.buffers.items():
            yield name, buffer.rows(first, count)

    def save(self, row: int, tokens: int) -> tuple[np.ndarray, ...]:
        """A copy of a row's first tokens."""
        return tuple(buffer.save(row, tokens) for buffer in self.buffers.values())

    def restore(self, row: int, arrays: tuple[np.ndarray, ...]) -> None:
        """Write what `save` gave into a row."""
        for buffer, array in zip(self.buffers.values(), arrays, strict=True):
            buffer.restore(row, array)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Write one row's first tokens over another row's."""
        for buffer in self.buffers.values():
            buffer.move(source, target, tokens)
