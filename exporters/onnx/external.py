"""The file beside the graphs that holds their large tensors: whatever graph asks, equal bytes are stored once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ALIGNMENT = 4096  # page: ONNX Runtime maps the file
INLINE_BYTES = 1024  # smaller tensors stay in the graph file


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie: offset and length in bytes, in a file of that name beside the graph."""

    location: str
    offset: int
    length: int


@dataclass
class WeightFile:
    """An external file under construction, empty at first: several graphs may be written on one.

    Args:
        path: in the directory of the graphs.
    """

    path: Path
    _end: int = 0
    _offsets: dict[bytes, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path.write_bytes(b"")

    def add(self, array: np.ndarray) -> Place:
        """Append an array, page-aligned, or find the place of its bytes."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            offset = -(-self._end // ALIGNMENT) * ALIGNMENT
            with self.path.open("ab") as file:
                file.write(b"\0" * (offset - self._end))
                file.write(data)
            self._offsets[key], self._end = offset, offset + data.nbytes
        return Place(self.path.name, self._offsets[key], data.nbytes)
