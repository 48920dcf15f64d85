"""The operators that ONNX Runtime may run in place of the graph's functions, compiled for this machine where they are.

`operators.c` and its neighbours are built with the package, where there is a C compiler; without them every graph
runs its functions' own nodes, slower and with the same answers up to rounding.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

from lime_edge.bundle.residual import Subtract, subtract_reference

NAME, CUDA_NAME = "_library", "_cuda"
CUDA_FILE = Path(__file__).with_name(f"{CUDA_NAME}.so")


@cache
def find_library() -> Path | None:
    """The shared library for `SessionOptions.register_custom_ops_library`, or None: `explain_absence` says why."""
    path = _find_file()
    return path if path is not None and not explain_absence() else None


@cache
def find_cuda_library() -> Path | None:
    """The library for NVIDIA GPUs, where `build_cuda` has made one and it runs here; else None."""
    return CUDA_FILE if not explain_cuda_absence() else None


def explain_cuda_absence() -> str:
    """Why there is no library for NVIDIA GPUs; empty where there is one."""
    if not CUDA_FILE.is_file():
        return "not built: python -m lime_edge.runtimes.onnx.operators.build_cuda builds it where CUDA's nvcc is"
    return _try(CUDA_FILE, "compiled for another GPU, or there is none")


@cache
def find_subtract() -> Subtract | None:
    """The compiled d = p - p_ref: the bits of `subtract_reference`, in one pass; None where there is no library."""
    library = find_library()
    if library is None:
        return None
    compiled = ctypes.CDLL(str(library)).lime_edge_subtract
    pointer = ctypes.c_void_p
    compiled.argtypes, compiled.restype = (pointer, pointer, ctypes.c_int64, pointer), None

    def subtract(vector: np.ndarray, reference: np.ndarray, out: np.ndarray) -> None:
        if vector.dtype != np.float16:
            subtract_reference(vector, reference, out)
        else:
            compiled(vector.ctypes.data, reference.ctypes.data, vector.size, out.ctypes.data)

    return subtract


def explain_absence() -> str:
    """Why there is no library to use here; empty where there is one."""
    path = _find_file()
    if path is None:
        return "not built: no C compiler was found when lime-edge was installed"
    return _try(path, "this processor lacks AVX2, FMA or F16C")


def _try(path: Path, unsupported: str) -> str:
    try:
        supported = ctypes.CDLL(str(path)).lime_edge_supported()
    except (OSError, AttributeError) as error:  # another libc, a damaged or an older file
        return f"not usable: {error}"
    return "" if supported else unsupported


def _find_file() -> Path | None:
    files = [Path(__file__).with_name(NAME + suffix) for suffix in EXTENSION_SUFFIXES]
    return next((file for file in files if file.is_file()), None)
