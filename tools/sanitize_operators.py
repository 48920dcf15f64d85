"""The operators under AddressSanitizer and UndefinedBehaviorSanitizer: their tests, run with a library built for it.

`make sanitize` runs it. ONNX Runtime and Python stay as they are: it sees the operators' reads and writes, and
every tensor lies in memory of its own (tests/operator_graphs.py turns ONNX Runtime's arena off). Leaks are not
looked for: Python has its own. Needs gcc with libasan and libubsan.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build" / "sanitized" / f"_library{sysconfig.get_config_var('EXT_SUFFIX')}"
FLAGS = ("-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fPIC")
TESTS = ("tests/test_onnx_operators.py", "tests/test_operators_hostile.py", "tests/test_onnx_operators_graphs.py")
# What opens bundles, or looks for the library:
LEFT_OUT = "not bundle and not library and not environment and not built"
INSIDE = "LIME_EDGE_SANITIZED"


def build(compiler: str) -> None:
    """The library as pyproject.toml describes it, with the sanitizers' flags after its own."""
    (module,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    BUILT.parent.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag in module["extra-compile-args"] if not flag.startswith("-O")]
    libraries = [f"-l{name}" for name in module["libraries"]]
    subprocess.run(
        [compiler, *flags, *FLAGS, "-shared", *module["sources"], *libraries, "-o", BUILT], cwd=ROOT, check=True
    )


def find_runtime(compiler: str, name: str) -> str:
    """A sanitizer's library, which has to be in the process before everything else."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        sys.exit(f"{compiler} has no {name}: install it (Debian: libasan8 and libubsan1, with gcc)")
    return str(path.resolve())


def run_tests(arguments: list[str]) -> int:
    """In the process that has the sanitizers: the operators are the library built here."""
    import pytest

    from lime_edge.runtimes.onnx import operators

    operators._find_file = lambda: BUILT
    assert operators.find_library() == BUILT, operators.explain_absence()
    return pytest.main(["-x", "-q", "--capture=sys", "-k", LEFT_OUT, *(arguments or TESTS)])


def main() -> int:
    """Build, then run the tests in a process of their own; returns its exit code."""
    if os.environ.get(INSIDE):
        return run_tests(sys.argv[1:])
    compiler = os.environ.get("CC", "gcc")
    build(compiler)
    environment = os.environ | {
        INSIDE: "1",
        "LD_PRELOAD": " ".join(find_runtime(compiler, name) for name in ("libasan.so", "libubsan.so")),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run([sys.executable, __file__, *sys.argv[1:]], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
