"""Where a buffer lies: in the processor's memory, or on a GPU. Nothing else in this folder knows.

A buffer is bound to a graph's input or output by its address. On the processor it is a numpy array, and writing to the
array is enough; on a GPU writing is a copy, the address stays, and so a captured CUDA graph goes on reading it.
"""

from __future__ import annotations

import ctypes
import re
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from lime_edge.errors import EXIT_MISSING, LimeEdgeError

CUDA = "CUDAExecutionProvider"
TO_DEVICE, TO_HOST, WITHIN = 1, 2, 3  # cudaMemcpyKind. Source: CUDA runtime API, driver_types.h


class Buffer(Protocol):
    """Memory of a fixed size with a shape and a dtype, rows first."""

    shape: tuple[int, ...]

    def bind_input(self, binding: ort.IOBinding, name: str) -> None:
        """Let a graph read it."""

    def bind_output(self, binding: ort.IOBinding, name: str) -> None:
        """Let a graph write it."""

    def rows(self, first: int, count: int) -> Buffer:
        """A view of some rows."""

    def write(self, array: np.ndarray) -> None:
        """Overwrite all of it."""

    def read(self) -> np.ndarray:
        """Its contents; on the processor the memory itself."""

    def save(self, row: int, tokens: int) -> np.ndarray:
        """A copy of [row, :, :tokens], (heads, tokens, width)."""

    def restore(self, row: int, array: np.ndarray) -> None:
        """Write (heads, tokens, width) into [row, :, :tokens]."""

    def move(self, source: int, target: int, tokens: int) -> None:
        """Write [source, :, :tokens] over [target, :, :tokens]."""


class HostBuffer:
    """A numpy array."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape
        self._value = ort.OrtValue.ortvalue_from_numpy(array)

    def bind_input(self, binding: ort.IOBinding, name: str) -> None:
        """Let a graph read it."""
        binding.bind_ortvalue_input(name, self._value)

    def bind_output(self, binding: ort.IOBinding, name: str) -> None:
        """Let a graph write it."""
        binding.bind_ortvalue_output(name, self._value)

    def rows(self, first: int, count: int) -> HostBuffer:
        """A view of some rows."""
        return HostBuffer(self.array[first : first + count])

    def write(self, array: np.ndarray) -> None:
        """Overwrite all of it."""
        self.array[...] = array

    def read(self) -> np.ndarray:
        """The array itself."""
        return self.array

    def save(self, row: int, tokens: int) -> np.ndarray:
        """A copy of [row, :, :tokens]."""
        return self.array[row, :, :tokens].copy()

    def restore(self, row: int, array: np.ndarray) -> None:
        """Write into [row, :, :tokens]."""
        self.array[row, :, : array.shape[1]] = array

    def move(self, source: int, target: int, tokens: int) -> None:
        """Write one row's first tokens over another's."""
        self.array[target, :, :tokens] = self.array[source, :, :tokens]


class DeviceBuffer:
    """Memory of a GPU that ONNX Runtime allocated, known by its address; `owner` keeps it alive."""

    def __init__(self, device: Device, owner: Any, address: int, shape: tuple[int, ...], dtype: np.dtype):
        self._device, self._owner, self.address = device, owner, address
        self.shape, self.dtype = shape, dtype
        self._stage: np.ndarray | None = None

    def _find_stage(self) -> np.ndarray:
        """Pinned memory of the processor, of the same size: a copy from pageable memory takes twice as long."""
        if self._stage is None:
            self._stage = np.empty(self.shape, self.dtype)
            self._device.pin(self._stage)
        return self._stage

    def bind_input(self, binding: ort.IOBinding, name: str) -> None:
        """Let a graph read it."""
        binding.bind_input(name, self._device.name, 0, self.dtype.type, self.shape, self.address)

    def bind_output(self, binding: ort.IOBinding, name: str) -> None:
        """Let a graph write it."""
        binding.bind_output(name, self._device.name, 0, self.dtype.type, self.shape, self.address)

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> DeviceBuffer:
        """A view of some rows."""
        address = self.address + first * self._row_bytes
        return DeviceBuffer(self._device, self._owner, address, (count, *self.shape[1:]), self.dtype)

    def write(self, array: np.ndarray) -> None:
        """Copy to the device."""
        stage = self._find_stage()
        np.copyto(stage, array)
        self._device.copy(self.address, stage.ctypes.data, stage.nbytes, TO_DEVICE)

    def read(self) -> np.ndarray:
        """Copy from the device, into memory that the next reading overwrites."""
        stage = self._find_stage()
        self._device.copy(stage.ctypes.data, self.address, stage.nbytes, TO_HOST)
        return stage

    def _heads(self, row: int) -> list[int]:
        """Addresses of a row's heads."""
        step = self.shape[2] * self.shape[3] * self.dtype.itemsize
        return [self.address + row * self._row_bytes + head * step for head in range(self.shape[1])]

    def save(self, row: int, tokens: int) -> np.ndarray:
        """Copy [row, :, :tokens] from the device."""
        array = np.empty((self.shape[1], tokens, self.shape[3]), self.dtype)
        for head, address in zip(array, self._heads(row), strict=True):
            self._device.copy(head.ctypes.data, address, head.nbytes, TO_HOST)
        return array

    def restore(self, row: int, array: np.ndarray) -> None:
        """Copy into [row, :, :tokens] on the device."""
        for head, address in zip(np.ascontiguousarray(array, self.dtype), self._heads(row), strict=True):
            self._device.copy(address, head.ctypes.data, head.nbytes, TO_DEVICE)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy one row's first tokens over another's, on the device."""
        size = tokens * self.shape[3] * self.dtype.itemsize
        for origin, goal in zip(self._heads(source), self._heads(target), strict=True):
            self._device.copy(goal, origin, size, WITHIN)


class Host:
    """The processor's memory."""

    captures = False

    def zeros(self, shape: tuple[int, ...], dtype: type) -> HostBuffer:
        """A new buffer; pages that are never written take no memory."""
        return HostBuffer(np.zeros(shape, dtype))

    def share(self, array: np.ndarray) -> HostBuffer:
        """A buffer over an array's own memory."""
        return HostBuffer(array)


class Device:
    """A GPU's memory, allocated by ONNX Runtime, copied by CUDA's runtime that it has loaded.

    copy: (to, from, bytes, kind), addresses as numbers; tests give one of their own.
    """

    captures = True

    def __init__(self, name: str = "cuda", copy: Callable[[int, int, int, int], None] | None = None):
        self.name, self._copy = name, copy

    def copy(self, target: int, source: int, size: int, kind: int) -> None:
        """Copy bytes; returns when they have arrived."""
        (self._copy or _find_memcpy())(target, source, size, kind)

    def pin(self, array: np.ndarray) -> None:
        """Keep an array's pages in memory while it lives, so that the GPU copies from and to it by itself."""
        if self._copy is None:
            register, release = (getattr(_find_runtime(), f"cudaHost{verb}") for verb in ("Register", "Unregister"))
            if register(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), 0) == 0:
                weakref.finalize(array, release, ctypes.c_void_p(array.ctypes.data))

    def zeros(self, shape: tuple[int, ...], dtype: type) -> DeviceBuffer:
        """A new buffer."""
        owner = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), self.name, 0)
        return DeviceBuffer(self, owner, owner.data_ptr(), shape, np.dtype(dtype))

    def share(self, array: np.ndarray) -> DeviceBuffer:
        """A new buffer with an array's contents."""
        buffer = self.zeros(array.shape, array.dtype.type)
        buffer.write(array)
        return buffer


def choose_place(provider: str) -> Host | Device:
    """Where the buffers of a graph lie whose nodes run on that execution provider."""
    return Device() if provider == CUDA else Host()


@cache
def _find_runtime() -> ctypes.CDLL:
    """CUDA's runtime, as ONNX Runtime has loaded it into this process.

    Raises:
        LimeEdgeError: no such library is loaded.
    """
    loaded = re.findall(r"/\S*libcudart[^\s/]*\.so[^\s/]*", Path("/proc/self/maps").read_text())
    if not loaded:
        raise LimeEdgeError("CUDA's runtime is not loaded", "install onnxruntime-gpu and CUDA 13", EXIT_MISSING)
    return ctypes.CDLL(loaded[0])


@cache
def _find_memcpy() -> Callable[[int, int, int, int], None]:
    function, pointer = _find_runtime().cudaMemcpy, ctypes.c_void_p
    function.argtypes, function.restype = (pointer, pointer, ctypes.c_size_t, ctypes.c_int), ctypes.c_int

    def copy(target: int, source: int, size: int, kind: int) -> None:
        if status := function(target, source, size, kind):
            raise LimeEdgeError(f"the GPU refused a copy of {size} bytes: CUDA error {status}", "is its memory full?")

    return copy
