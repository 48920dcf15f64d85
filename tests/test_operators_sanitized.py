"""The operators' own tests once more, on a library that stops at the first wrong address or undefined behaviour."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer is loaded first by Linux's LD_PRELOAD"),
]
ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CC", "cc")
FLAGS = ("-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A process's environment in which the operators are the sanitized ones, just built."""
    (module,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    library = tmp_path_factory.mktemp("sanitized") / "operators.so"
    flags = [flag for flag in module["extra-compile-args"] if not flag.startswith("-O")]
    sources = [str(ROOT / source) for source in module["sources"]]
    subprocess.run([COMPILER, *flags, *FLAGS, "-fPIC", "-shared", *sources, "-lm", "-o", str(library)], check=True)
    return os.environ | {
        "LD_PRELOAD": f"{find_library('libasan.so')} {find_library('libstdc++.so')}",  # the second: ONNX Runtime throws
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own: it frees nothing at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SANITIZED_LIBRARY": str(library),
        "PYTHONPATH": str(ROOT / "tests"),
    }


def find_library(name: str) -> str:
    """Where the compiler has one of its libraries."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


@pytest.mark.parametrize(("beyond", "what"), [(0, ""), (1, "heap-buffer-overflow")])
def test_the_sanitizer_sees(beyond: int, what: str, environment: dict[str, str]) -> None:
    """One number read beyond an array is told; nothing else is."""
    code = f"""
import ctypes, os, numpy as np
vector, reference, out = np.ones(1001, np.float16), np.ones(1001, np.float32), np.ones(1001, np.float32)
call = ctypes.CDLL(os.environ["SANITIZED_LIBRARY"]).lime_edge_subtract
call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p), None
call(vector.ctypes.data, reference.ctypes.data, 1001 + {beyond}, out.ctypes.data)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert what in done.stderr and bool(done.returncode) is bool(what), done.stderr


@pytest.mark.parametrize("file", ["test_onnx_operators.py", "test_onnx_operators_graphs.py"])
def test_nothing_is_found(file: str, environment: dict[str, str]) -> None:
    words = ("-m", "pytest", "-p", "sanitized", "-x", "-s", f"tests/{file}")
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[:4000]
    assert " passed" in done.stdout
