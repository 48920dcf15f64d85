"""A device has no torch: the runtime works in an environment that holds the base install and onnxruntime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lime_edge

pytestmark = pytest.mark.check
Make = Callable[..., Path]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a fresh virtual environment with lime-edge[onnx] installed from the source file that `make wheel` makes,
    as the device pages do it."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT], check=True, capture_output=True
    )
    (source,) = folder.glob("lime_edge-*.tar.gz")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    subprocess.run([folder / "env" / "bin" / "pip", "install", "--quiet", f"{source}[onnx]"], check=True)
    return folder / "env" / "bin"


def run(bare: Path, program: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(bare / program), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_nothing_heavy_is_there(bare: Path) -> None:
    for name in ("torch", "transformers", "onnx", "optimum"):
        assert run(bare, "python", "-c", f"import {name}").returncode != 0
    files = [line.split()[0] for line in run(bare, "pip", "list").stdout.splitlines()[2:]]
    assert "lime-edge" in files
    assert "compiled operators: yes" in run(bare, "lime-edge", "doctor").stdout, "the source file lacks C files?"


def test_it_answers_as_the_workstation_does(bare: Path, tiny_bundle: Make) -> None:
    bundle = tiny_bundle(quant="int4")
    session = lime_edge.open_decoder(bundle, threads=1)
    for expert in session.experts:
        session.use(expert)
        expected = "".join(session.generate("hello", max_new_tokens=12))
        words = ("lime-edge", "run", bundle, "hello", "--raw", "-e", expert, "--max-new-tokens", 12, "--threads", 1)
        done = run(bare, *words)
        assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr


def test_every_device_command_runs(bare: Path, tiny_bundle: Make) -> None:
    bundle = tiny_bundle(quant="int4")
    bench = ("bench", bundle, "--prompt-tokens", 4, "--gen-tokens", 4)
    for words in (("inspect", bundle), ("verify", bundle), ("experts", "list", bundle), bench):
        done = run(bare, "lime-edge", *words)
        assert done.returncode == 0, done.stderr


def test_exporting_names_the_extra(bare: Path, tmp_path: Path) -> None:
    done = run(bare, "lime-edge", "export", "x", "--adapter", "y", "-o", tmp_path / "z.lime")
    assert done.returncode == 4
    assert "pip install 'lime-edge[export]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
