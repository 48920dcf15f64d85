"""The arrows of pyproject.toml's import-linter contracts hold, and each contract sees an arrow that is turned."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = {contract["id"]: contract["name"] for contract in PROJECT["tool"]["importlinter"]["contracts"]}
# contract -> the file that gets a line, and the line that it refuses
TURNED = {
    "layers": ("bundle/sites.py", "import lime_edge.session.switching"),
    "exporters": ("exporters/coreml/prompt.py", "import lime_edge.exporters.onnx.weights"),
    "runtimes": ("runtimes/executorch/decoder.py", "from lime_edge.runtimes.onnx import decoder"),
    "by-name": ("cli/export.py", "def load():\n    from lime_edge.exporters.onnx import decoder"),
    "device": ("terminal.py", "def load():\n    import torch"),
    "engines": ("checks/verify.py", "import onnxruntime"),
    "command-line": ("bench/load.py", "from typer import echo"),
    "light-help": ("cli/app.py", "import transformers"),
    "server": ("bench/load.py", "def load():\n    from lime_edge.serve import settings"),
    "serving": ("serve/settings.py", "from lime_edge.checks import judge"),
    "http": ("cli/serve.py", "import uvicorn"),
    "cycles": ("bench/machine.py", "import lime_edge.bench.measure"),
}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with lime_edge as it is installed."""
    copy_package(tmp_path)
    return tmp_path


def copy_package(folder: Path) -> None:
    """Put lime_edge there as it is installed: exporters/ and runtimes/ inside the package, Python files only."""
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        target = folder / package.replace(".", "/")
        target.mkdir(parents=True)
        for file in source_of(package).glob("*.py"):
            shutil.copy(file, target)


def source_of(package: str) -> Path:
    """The folder of a package in this repository."""
    mapped: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
    if package in mapped:
        return ROOT / mapped[package]
    parent, _, own = package.rpartition(".")
    return source_of(parent) / own


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_every_arrow_points_down(installed: Path) -> None:
    done = lint(installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: " + f"{len(CONTRACTS)} kept, 0 broken" in done.stdout


@pytest.mark.parametrize("contract", sorted(CONTRACTS))
def test_a_turned_arrow_is_seen(contract: str, installed: Path) -> None:
    name, line = TURNED[contract]
    file = installed / "lime_edge" / name
    file.write_text(f"{file.read_text()}\n{line}\n")
    done = lint(installed)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{CONTRACTS[contract]} BROKEN" in " ".join(done.stdout.split()), done.stdout
