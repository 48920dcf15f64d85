"""Faults while a bundle is written: at every step of every writer, full disks, kills, several writers at once.

Whatever happens, the bundle that is there afterwards opens, passes `verify` and is the old one or the new one; after
the next command nothing is left over. A kill is `os._exit` in a child, or SIGKILL at a random moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manifests import make_bundle, make_expert, make_manifest

from lime_edge.bundle import staging
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.change import add_blend, add_experts, remove_expert
from lime_edge.bundle.companions import ONNX_ADAPTER
from lime_edge.bundle.create import write_bundle
from lime_edge.bundle.fields import Companion
from lime_edge.bundle.manifest import MANIFEST
from lime_edge.bundle.staging import stage_directory
from lime_edge.errors import EXIT_STORAGE, LimeEdgeError

STEPS = ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
GENAI = {"genai": Companion(target="onnx", folder="onnx", form=ONNX_ADAPTER)}  # type: ignore[arg-type]
State = tuple[tuple[str, ...], tuple[float, ...]]  # experts and the first number of each
Writer = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def export(path: Path) -> None:
    """What `export --force` does at its end."""
    with stage_directory(path, replace=True) as stage:
        (stage / "onnx").mkdir()
        (stage / "onnx/model.onnx").write_bytes(b"other")
        manifest = make_manifest(expert_list=(), files={}, default="new", companions=GENAI)
        write_bundle(stage, manifest, [make_expert("new", 7)], np.zeros(5, np.float32))


WRITERS: dict[str, Writer] = {
    "add": lambda path: add_experts(path, [make_expert("three", 3), make_expert("four", 4)]),
    "replace": lambda path: add_experts(path, [make_expert("two", 9)], replace=True),
    "blend": lambda path: add_blend(path, {"one": 0.5, "two": 0.5}, "two", replace=True),
    "remove": lambda path: remove_expert(path, "one"),
    "export": export,
}


def read_state(path: Path) -> State:
    """What a user sees; everything is checked on the way."""
    bundle = Bundle.open(path, verify=True)
    bank = bundle.open_bank()
    return bank.names, tuple(float(bank.vector(name)[0]) for name in bank.names)


def find_left(path: Path) -> list[str]:
    """Files that nobody names, in the bundle and beside it."""
    listed = {MANIFEST, *Bundle.open(path).manifest.files}
    inside = [p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()]
    return [name for name in inside if name not in listed] + [p.name for p in path.parent.glob(".*")]


class Fault:
    """Counts the steps that change a file system; at the n-th it fails, or ends the process as a kill would."""

    def __init__(self, at: int, error: int | None):
        self.left, self.error, self.seen = at, error, 0

    def step(self) -> None:
        self.seen += 1
        self.left -= 1
        if self.left != 0:
            return
        if self.error is None:
            os._exit(99)
        raise OSError(self.error, os.strerror(self.error))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        real = {name: getattr(os, name) for name in STEPS}
        exchange = staging.exchange

        def wrap(name: str) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                if name != "open" or (len(args) > 1 and args[1] & os.O_CREAT):
                    self.step()
                return real[name](*args, **options)

            return call

        def swap(*paths: Path) -> bool:
            self.step()
            return exchange(*paths)

        with pytest.MonkeyPatch.context() as patch:
            for name in STEPS:
                patch.setattr(os, name, wrap(name))
            patch.setattr(staging, "exchange", swap)
            yield


def count_steps(writer: Writer, path: Path) -> int:
    fault = Fault(-1, None)
    with fault.watch():
        writer(path)
    return fault.seen


def make(path: Path) -> Path:
    return make_bundle(path, companions=GENAI)


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that can let two directories change places in one step, and others."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "exchange", lambda *_: False)


def outcomes(writer: Writer, tmp_path: Path) -> tuple[State, State, int]:
    """Before, after, and how many steps are between."""
    path = make(tmp_path / "plan.lime")
    before = read_state(path)
    count = count_steps(writer, path)
    after = read_state(path)
    assert before != after and count >= 3 and not find_left(path)
    shutil.rmtree(path)
    return before, after, count


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["disk full", "input/output error"])
@pytest.mark.usefixtures("swap")
def test_a_fault_at_every_step(writer: Writer, number: int, tmp_path: Path) -> None:
    """Nothing is lost. A failure that is reported left everything as it was, nothing beside it."""
    before, after, count = outcomes(writer, tmp_path)
    for at in range(1, count + 1):
        path = make(tmp_path / f"{at}.lime")
        told = None
        with Fault(at, number).watch():
            try:
                writer(path)
            except LimeEdgeError as error:
                told = error
        found = read_state(path)
        if told is not None:
            assert told.exit_code == EXIT_STORAGE, (at, told)
        assert found == (before if told is not None else after), f"step {at}: {told}"
        remove_expert(path, "two" if "two" in found[0] else "new")
        assert not find_left(path), f"step {at}"
        shutil.rmtree(path)


@pytest.mark.usefixtures("swap")
def test_a_kill_at_every_step(writer: Writer, tmp_path: Path) -> None:
    before, after, count = outcomes(writer, tmp_path)
    seen = set()
    for at in range(1, count + 1):
        path = make(tmp_path / f"{at}.lime")
        child = os.fork()
        if child == 0:
            with Fault(at, None).watch():
                writer(path)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 99, f"step {at} was not reached"
        if not path.exists():  # between the two renames: readers say where it is, the next writer puts it back
            with pytest.raises(LimeEdgeError, match=r"a replacement was cut off: the bundle is now .*\.old"):
                Bundle.open(path)
            staging.sweep(path)
        found = read_state(path)
        assert found in (before, after), f"step {at}: {found}"
        seen.add(found)
        remove_expert(path, "two" if "two" in found[0] else "new")
        assert not find_left(path), f"step {at}"
        shutil.rmtree(path)
    assert before in seen


def test_an_interrupt_after_the_rename_keeps_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = make(tmp_path / "x.lime"), os.replace

    def replace(*args: Any, **options: Any) -> None:
        real(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        add_experts(path, [make_expert("three", 3)])
    monkeypatch.undo()
    assert read_state(path)[0] == ("one", "two", "three")


LOOP = """
import sys, os
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_faults
path, seed = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    for name in ("replace", "blend", "export"):
        test_faults.WRITERS[name](path)
        if name == "export":
            test_faults.add_experts(path, [test_faults.make_expert("one", 1), test_faults.make_expert("two", 2)])
            test_faults.remove_expert(path, "new")
"""


@pytest.mark.check
def test_sixty_kills(tmp_path: Path) -> None:
    """SIGKILL at random moments of a process that changes the bundle all the time."""
    path, draw = make(tmp_path / "x.lime"), random.Random(0)
    for index in range(60):
        command = [sys.executable, "-c", LOOP.format(tests=str(Path(__file__).parent)), str(path), str(index)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0, 0.06))
        child.send_signal(signal.SIGKILL)
        child.wait()
        staging.sweep(path)
        names = read_state(path)[0]
        assert set(names) <= {"one", "two", "new"} and names, index
        export(path)
        add_experts(path, [make_expert("one", 1), make_expert("two", 2)])
        remove_expert(path, "new")
        assert not find_left(path), index


WORK = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_faults import add_experts, make_expert, remove_expert
path, mine = Path(sys.argv[1]), sys.argv[2]
for index in range(int(sys.argv[3])):
    add_experts(path, [make_expert(f"{{mine}}-{{index}}", index)])
    if index % 2:
        remove_expert(path, f"{{mine}}-{{index - 1}}")
"""


@pytest.mark.check
def test_four_processes_lose_nothing(tmp_path: Path) -> None:
    """200 skills by four processes, every second one removed again, while a reader opens and uses them."""
    path, count = make(tmp_path / "x.lime"), 50
    command = [sys.executable, "-c", WORK.format(tests=str(Path(__file__).parent)), str(path)]
    children = [subprocess.Popen([*command, mine, str(count)]) for mine in "abcd"]
    while any(child.poll() is None for child in children):
        bank = Bundle.open(path).open_bank()
        for name in bank.names:
            bank.vector(name)
    assert [child.returncode for child in children] == [0] * 4
    wanted = {f"{mine}-{index}" for mine in "abcd" for index in range(1, count, 2)}
    names, values = read_state(path)
    assert set(names) == wanted | {"one", "two"}
    assert all(value == int(name.split("-")[1]) for name, value in zip(names, values, strict=True) if "-" in name)
    assert not find_left(path)


def test_a_writer_waits_for_the_bundle_that_took_the_place(tmp_path: Path) -> None:
    """Who waited for the lock of a directory that was replaced changes the new one."""
    path = make(tmp_path / "x.lime")
    command = [sys.executable, "-c", WORK.format(tests=str(Path(__file__).parent)), str(path), "late", "1"]
    other = Path(shutil.copytree(path, tmp_path / "other.lime"))
    with staging.lock_directory(path):
        child = subprocess.Popen(command)
        time.sleep(1.0)
        assert child.poll() is None, "it did not wait"
        assert staging.exchange(other, path)
    assert child.wait() == 0
    assert "late-0" in read_state(path)[0] and "late-0" not in read_state(other)[0]


@pytest.mark.parametrize("name", WRITERS)
def test_read_only_file_systems_say_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "x.lime")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    real = os.open

    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def read_only(file: Any, flags: int, *args: Any, **options: Any) -> int:
        return refuse() if flags & (os.O_CREAT | os.O_WRONLY) else real(file, flags, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", read_only)
        for step in STEPS[1:]:
            patch.setattr(os, step, refuse)
        with pytest.raises(LimeEdgeError, match="read-only: write elsewhere") as caught:
            WRITERS[name](path)
        assert caught.value.exit_code == EXIT_STORAGE
        assert read_state(path)[0] == ("one", "two")
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
