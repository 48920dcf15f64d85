"""d = p - p_ref: the compiled loop where it was built, numpy elsewhere; the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from lime_edge.runtimes.onnx.operators import find_library


def subtract_reference(vector: np.ndarray, reference: np.ndarray, out: np.ndarray) -> None:
    """Write an expert's residual.

    Args:
        vector: p (sum_H,) float16 or float32. reference: p_ref (sum_H,) float32. out: (sum_H,) float32; all contiguous.
    """
    compiled = _find_compiled()
    if compiled is None or vector.dtype != np.float16:
        np.copyto(out, vector)
        out -= reference
        return
    compiled(vector.ctypes.data, reference.ctypes.data, vector.size, out.ctypes.data)


@cache
def _find_compiled() -> Callable[[int, int, int, int], Any] | None:
    library = find_library()
    if library is None:
        return None
    function = ctypes.CDLL(str(library)).lime_edge_subtract
    pointer = ctypes.c_void_p
    function.argtypes, function.restype = (pointer, pointer, ctypes.c_int64, pointer), None
    return function
