"""What the benchmark ran on: processor, memory, clocks, heat, and how fast memory is copied."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import lime_edge
from lime_edge.targets.entries import list_packages

SYS = Path("/sys")
COPIED = 128 << 20  # bytes copied at once by all threads together: well beyond most last-level caches
COPIES = 7


def read_text(file: Path) -> str | None:
    """The text of a file of /sys or /proc, or None where it is missing, empty or not ours to read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def read_number(file: Path) -> float | None:
    """The number in a file, or None."""
    try:
        return float(read_text(file) or "")
    except ValueError:
        return None


def count_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(root: Path = SYS) -> dict[str, Any]:
    """Processor, cores, memory, clocks and versions, for the record; null where the machine does not say.

    Args:
        root: where the kernel shows its devices.
    """
    installed = {dist: _find_version(dist) for dist in ("numpy", *list_packages())}
    return {
        "cpu": _name_processor(),
        "cores": count_cores(),
        "arch": platform.machine(),
        "board": read_text(Path("/proc/device-tree/model")),
        "memory_bytes": _count_memory(),
        "governor": read_governor(root),
        "max_mhz": read_clock(root),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "lime_edge": lime_edge.__version__,
        "packages": [f"{name} {version}" for name, version in installed.items() if version],
    }


def _name_processor() -> str:
    info = read_text(Path("/proc/cpuinfo")) or ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def _find_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _count_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def read_governor(root: Path = SYS) -> str | None:
    """The clock governor; several, joined by "+", where cores differ; None where there is no cpufreq."""
    files = (root / "devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return "+".join(sorted({text for file in files if (text := read_text(file))})) or None


def read_clock(root: Path = SYS) -> float | None:
    """The highest clock of any core in MHz (cpuinfo_max_freq is in kHz)."""
    files = (root / "devices/system/cpu").glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq")
    clocks = [value for file in files if (value := read_number(file)) is not None]
    return max(clocks) / 1e3 if clocks else None


def read_temperature(root: Path = SYS) -> float | None:
    """The hottest reading in degrees Celsius: thermal zones, else hwmon sensors (both in thousandths)."""
    for pattern in ("class/thermal/thermal_zone*/temp", "class/hwmon/hwmon*/temp*_input"):
        values = [value for file in root.glob(pattern) if (value := read_number(file)) is not None]
        if values:
            return max(values) / 1e3
    return None


def measure_copy(threads: int, size: int = COPIED) -> float:
    """Memory bandwidth in bytes per second, read and written together: the best of a few large copies.

    Args:
        threads: each copies its own part; numpy lets go of the interpreter while it copies.
        size: bytes of the source; halved until it fits a quarter of the machine's memory.
    Source: STREAM's COPY (counts bytes read and bytes written, best of the repetitions).
    """
    while 8 * size > (_count_memory() or 8 * size) and size > 1 << 20:
        size //= 2
    source, copy = np.ones(size // 8), np.zeros(size // 8)
    parts = [slice(i * source.size // threads, (i + 1) * source.size // threads) for i in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(COPIES):
            begin = time.perf_counter()
            list(pool.map(lambda part: np.copyto(copy[part], source[part]), parts))
            best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best
