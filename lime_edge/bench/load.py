"""Load times: with the files in the page cache, and, where the kernel lets us drop them, without."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lime_edge.bench.timing import time_call

RESIDENT = 0.05  # a file of which less than this is in memory counts as dropped


@dataclass(frozen=True)
class Loads:
    """Seconds per load. cold: after the page cache was dropped, empty where it cannot be.

    dropped: whether the files had really left the page cache; None where that cannot be asked.
    """

    warm: list[float]
    cold: list[float]
    dropped: bool | None


def time_loads(load: Callable[[], object], files: Sequence[Path], count: int) -> Loads:
    """Load `count` times cold and warm in turn; what `load` returns is let go before the next one."""
    warm, cold, dropped = [], [], True
    checked: bool | None = None
    for _ in range(count):
        gc.collect()  # a mapped file cannot be dropped
        checked = drop_cache(files)
        dropped = dropped and checked is not False
        seconds, _loaded = time_call(load)
        if checked is not False:
            cold.append(seconds)
        del _loaded
        gc.collect()
        seconds, _loaded = time_call(load)
        warm.append(seconds)
        del _loaded
    return Loads(warm, cold if dropped else [], checked if dropped else False)


def drop_cache(files: Sequence[Path]) -> bool | None:
    """Ask the kernel to forget these files' pages.

    Returns:
        True when they are gone, False when they are not, None when the platform cannot tell.
    Source: posix_fadvise(2): pages that are dirty or mapped stay, hence the fsync.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        try:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    resident = find_resident(largest) if largest else None
    return None if resident is None else resident < RESIDENT


def find_resident(file: Path) -> float | None:
    """The part of a file that is in the page cache, 0..1; None where the platform cannot tell.

    Source: mincore(2): one byte a page, its lowest bit set when the page is resident.
    """
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            failed = mincore(
                ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(pages.ctypes.data)
            )
            del view  # or the map cannot be closed
    except (OSError, AttributeError, ValueError, TypeError):
        return None
    return None if failed else float((pages & 1).mean())
