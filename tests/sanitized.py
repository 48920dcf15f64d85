"""A pytest plugin (`-p sanitized`): the operators' tests on the library that SANITIZED_LIBRARY names.

ONNX Runtime takes its tensors from the system's allocator, not from an arena of its own: only there has the address
sanitizer its guards between them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from lime_edge.runtimes.onnx import operators

os.environ.pop("LD_PRELOAD", None)  # children run nothing of ours, and some are given little memory


def make_options(make: Any = ort.SessionOptions) -> ort.SessionOptions:
    """Session options without arenas."""
    options = make()
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return options


ort.SessionOptions = make_options
operators._find_file = lambda: Path(os.environ["SANITIZED_LIBRARY"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what looks for the installed library, or takes it away."""
    left = [item for item in items if "forgetful" in item.fixturenames or "is_built_with" in item.name]  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
