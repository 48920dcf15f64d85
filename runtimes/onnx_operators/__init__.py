"""The operators that ONNX Runtime may run in place of the graph's functions, compiled for this machine where they are.

`operators.c` and its neighbours are built with the package, where there is a C compiler; without them every graph
runs its functions' own nodes, slower and with the same answers.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

NAME = "_library"


@cache
def find_library() -> Path | None:
    """The shared library for `SessionOptions.register_custom_ops_library`, or None.

    None: not built with this installation, built for another system, or the processor lacks what it is compiled for
    (on x86-64: AVX2, FMA, F16C).
    """
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(NAME + suffix)
        if path.is_file():
            try:
                return path if ctypes.CDLL(str(path)).lime_edge_supported() else None
            except OSError:  # another libc, or a damaged file
                return None
    return None
