"""lime-edge doctor: right about what is there and what is missing, in environments where it is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_cli import Cli, mount

from lime_edge.checks import doctor
from lime_edge.checks.doctor import meets, read_memory

Make = Callable[..., Path]
ROOT = Path(__file__).parent.parent
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


def find(facts: dict[str, Any], topic: str, what: str) -> dict[str, str]:
    (found,) = [line for line in facts["findings"] if (line["topic"], line["what"]) == (topic, what)]
    return found


def test_a_workstation_is_told_what_it_has(lime: Cli, tiny_bundle: Make) -> None:
    bundle = tiny_bundle(quant="int4")
    done = lime("doctor", bundle, "--json")
    facts = json.loads(done.out)
    assert done.code == facts["exit_code"] == 0, done
    version = importlib.metadata.version("onnxruntime")
    line = find(facts, "engine", "onnx")
    assert line["state"] == "good" and version in line["found"] and "CPUExecutionProvider" in line["found"]
    assert "onnx" in facts["engines"] and find(facts, "package", "[export]")["state"] == "good"
    assert find(facts, "bundle", "on onnx")["found"] == "runs here"
    assert find(facts, "machine", "Python")["found"] == sys.version.split()[0]
    text = lime("doctor").out
    assert "works here: inspect and experts; run, eval, verify and bench on onnx" in text.splitlines()[-1]


def test_a_bad_bundle_ends_with_2(lime: Cli, tmp_path: Path) -> None:
    done = lime("doctor", tmp_path / "no.lime")
    assert done.code == 2 and "no such bundle" in done.out


def test_no_space_and_no_permission_are_said(lime: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 5_000_000, 5_000_000))
    done = lime("doctor", "--json")
    line = find(json.loads(done.out), "storage", "this folder")
    assert done.code == 5 and line["state"] == "bad" and "0.0 GB free" in line["found"] and "free some" in line["hint"]
    monkeypatch.undo()
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    for place in mount(tmp_path / "disk", "ro"):
        monkeypatch.chdir(place)
        done = lime("doctor", "--json")
        line = find(json.loads(done.out), "storage", "this folder")
        assert done.code == 5 and line["state"] == "bad" and "cannot be written: Read-only" in line["found"]
        monkeypatch.chdir("/")


def test_the_lower_limit_of_memory_counts(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    assert read_memory(tmp_path) == (None, None)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  4000 kB\nMemFree: 1 kB\nMemAvailable: 3000 kB\n")
    assert read_memory(tmp_path) == (4_096_000, 3_072_000)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert read_memory(tmp_path) == (4_096_000, 3_072_000)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1000000\n")
    assert read_memory(tmp_path) == (1_000_000, 1_000_000)


@pytest.mark.parametrize(
    ("version", "specifiers", "fits"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("2.12.9", "<2.14,>=2.13", False),
        ("2.14", "<2.14,>=2.13", False),
        ("9.0", ">=9.0,<10", True),
        ("10.0", ">=9.0,<10", False),
        ("1.31.1", ">=1.31,<1.32", True),
        ("3.11.7", "<3.14,>=3.11", True),
        ("3.10", "<3.14,>=3.11", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, specifiers: str, fits: bool) -> None:
    assert meets(version, specifiers) is fits


def test_what_the_engine_cannot_do_is_said(lime: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An onnxruntime that does not import, one of another version, and operators that are switched off."""
    monkeypatch.setenv("LIME_EDGE_OPERATORS", "0")
    assert "switched off" in find(json.loads(lime("doctor", "--json").out), "engine speed", "onnx")["found"]
    monkeypatch.setattr(doctor, "_wanted", lambda _: ">=99")
    found = find(json.loads(lime("doctor", "--json").out), "engine version", "onnx")
    assert found["hint"] == "pip install 'onnxruntime>=99'"
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libc.so.9: version not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    done = lime("doctor", "--json")
    line = find(json.loads(done.out), "engine", "onnx")
    assert (
        line["state"] == "note"
        and "cannot be imported: ImportError: libc.so.9" in line["found"]
        and "lime-edge[onnx]" in line["hint"]
    )


# a clean installation without any engine


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a fresh virtual environment with lime-edge and nothing of its extras."""
    folder = tmp_path_factory.mktemp("empty") / "env"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", str(ROOT)], check=True)
    return folder / "bin"


def run(
    place: Path, *words: object, path: str = "/usr/bin:/bin", cwd: Path = Path("/"), **env: object
) -> tuple[int, str, str]:
    given = {"PATH": path} | {name: str(value) for name, value in env.items()}
    command = [str(place / "lime-edge"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=given)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.check
def test_without_an_engine_and_without_a_compiler(empty: Path, tmp_path: Path) -> None:
    code, out, err = run(empty, "doctor", "--json", path=str(tmp_path), cwd=tmp_path)
    facts = json.loads(out)
    assert code == 4 and facts["engines"] == [] and facts["works"] == ["inspect and experts"], err
    line = find(facts, "engine", "onnx")
    assert line["found"] == "the package 'onnxruntime' is not installed"
    assert line["hint"] == "pip install 'lime-edge[onnx]'"
    assert find(facts, "tool", "C compiler")["found"] == "none on the PATH"
    assert find(facts, "tool", "lime-edge")["found"] == "not on the PATH"
    line = find(facts, "package", "[export]")
    assert "torch is missing" in line["found"] and line["hint"].endswith("pip install 'lime-edge[export]'")
    assert find(facts, "storage", "this folder")["state"] == "good"


@pytest.mark.check
def test_with_an_engine_and_without_operators(empty: Path, tmp_path: Path) -> None:
    subprocess.run([empty / "pip", "install", "--quiet", f"{ROOT}[onnx]"], check=True)
    code, out, err = run(empty, "doctor", "--json", cwd=tmp_path)
    facts = json.loads(out)
    assert code == 0 and facts["engines"] == ["onnx"], err
    assert "compiled operators: yes" in find(facts, "engine", "onnx")["found"]
    for library in (empty.parent / "lib").rglob("operators/*.so"):
        library.rename(library.with_suffix(".away"))
    facts = json.loads(run(empty, "doctor", "--json", cwd=tmp_path)[1])
    line = find(facts, "engine speed", "onnx")
    assert "not built: no C compiler was found" in line["found"] and "apt install gcc" in line["hint"]


@pytest.mark.check
def test_a_demo_without_torch_names_the_extra(empty: Path) -> None:
    code, out, err = run(empty, "demo", cwd=ROOT)
    assert code == 4 and "pip install 'lime-edge[export]'" in err and "Traceback" not in err, err
    assert not out


@pytest.mark.check
def test_a_read_only_system_is_told_what_it_cannot_do(empty: Path, tmp_path: Path) -> None:
    """Home, working folder and temporary files on a file system that nobody can write to."""
    for place in mount(tmp_path / "disk", "ro"):
        code, out, err = run(empty, "doctor", "--json", cwd=place, HOME=place, TMPDIR=place)
        facts = json.loads(out)
        line = find(facts, "storage", "this folder")
        assert line["state"] == "bad" and line["found"] == "cannot be written: Read-only file system", err
        line = find(facts, "storage", "cache")
        assert line["state"] == "note" and "Read-only" in line["found"] and "XDG_CACHE_HOME" in line["hint"]
        assert code == (5 if facts["engines"] else 4), "no engine comes before no space"
        assert "Traceback" not in err and find(facts, "storage", "temporary files")["state"] == "good", "/tmp serves"


@pytest.mark.check
def test_a_full_disk_is_called_full(empty: Path, tmp_path: Path) -> None:
    for place in mount(tmp_path / "disk", "size=64k"):
        with suppress(OSError):
            (place / "all").write_bytes(bytes(65536))
        code, out, err = run(empty, "doctor", "--json", cwd=place, XDG_CACHE_HOME=place)
        facts = json.loads(out)
        line = find(facts, "storage", "this folder")
        assert line["state"] == "bad" and "No space left" in line["found"] and "free some space" in line["hint"], err
        assert "No space left" in find(facts, "storage", "cache")["found"] and "Traceback" not in err
        assert not (place / "lime-edge").exists()


def test_what_takes_seconds_to_import_is_not_imported() -> None:
    """The answer comes at once: onnxruntime is the only large package that is loaded."""
    heavy = ("torch", "transformers", "onnx", "executorch", "coremltools", "matplotlib")
    code = (
        "import sys; from lime_edge.checks.doctor import examine; examine();"
        f"print(sorted(set({heavy!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
