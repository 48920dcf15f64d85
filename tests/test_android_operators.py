"""The operators linked for arm64 Android: what its loader looks at. Nothing here runs them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))

from android_operators import LIBC, _compile, build_operators, check_library  # noqa: E402

pytestmark = pytest.mark.skipif(
    shutil.which("readelf") is None or importlib.util.find_spec("ziglang") is None, reason="needs binutils and ziglang"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as an app packs it."""
    output = tmp_path_factory.mktemp("jni") / "arm64-v8a" / "liblime_edge_operators.so"
    build_operators(output)
    return output


def test_it_needs_nothing_but_libc_has_large_pages_and_shows_its_three_functions(library: Path) -> None:
    assert check_library(library) == []
    assert 10_000 < library.stat().st_size < 200_000


def test_a_library_that_android_would_refuse_is_told(tmp_path: Path, library: Path) -> None:
    source = tmp_path / "odd.c"
    source.write_text("void extra(void) {}\n", encoding="utf-8")
    odd = tmp_path / "libodd.so"
    _compile("-shared", "-nostdlib", "-Wl,-z,max-page-size=4096", source, "-o", odd)
    faults = "\n".join(check_library(odd))
    for what in ("needed libraries", "alignment", "exported symbols: expected RegisterCustomOps"):
        assert what in faults, faults


def test_a_function_that_android_may_lack_is_refused_when_linking(tmp_path: Path) -> None:
    source = tmp_path / "odd.c"
    source.write_text(
        "double lgamma_r(double, int *);\ndouble f(int *s) { return lgamma_r(2.0, s); }\n", encoding="utf-8"
    )
    assert "lgamma_r" not in LIBC
    with pytest.raises(SystemExit, match="lgamma_r"):
        _compile("-shared", "-nostdlib", "-fPIC", "-Wl,-z,defs", source, "-o", tmp_path / "libodd.so")


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "lib.so"
    command = [sys.executable, str(REPOSITORY / "tools" / "android_operators.py"), str(output)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "needs libc.so only" in found.stdout, found.stderr
