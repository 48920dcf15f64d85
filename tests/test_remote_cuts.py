"""Cut at random moments: nothing half-made stays on the device, nothing runs on, and the next run works.

Three kinds of cuts: the connection closes after a random number of the client's bytes; lime-edge on the workstation is
killed at a random time; the helper on the device is. The seed is fixed, and printed with what fails.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from half_made import find_half_made
from sshd import SSHD, Sshd, serve

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(SSHD is None, reason="needs sshd: apt-get install openssh-server"),
]
Make = Callable[..., Path]
SEED = 22
BYTES, CLIENT, HELPER = "the connection", "the client", "the helper"
KINDS = [BYTES] * 10 + [CLIENT] * 5 + [HELPER] * 5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, shared_folder: Path) -> Iterator[Sshd]:
    with serve(tmp_path_factory.mktemp("cuts"), shared_folder / "cache") as running:
        yield running


def start(server: Sshd, bundle: Path) -> subprocess.Popen[str]:
    borrow = ("--python", sys.executable, "--site-packages")
    return server.start("verify", str(bundle), "--expert", "none", "--on", server.address, *borrow)


def finish(server: Sshd, bundle: Path, where: str) -> float:
    """A run that is left alone; how long it took."""
    begin = time.monotonic()
    process = start(server, bundle)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "1 checked" in out, f"{where}: the next run: {err}"
    assert find_half_made(server.root) == [], where
    return time.monotonic() - begin


def wait_for_helpers(server: Sshd, where: str) -> None:
    for _ in range(400):
        if not server.find_helpers():
            return
        time.sleep(0.05)
    raise AssertionError(f"{where}: still running on the device after 20 s: {server.find_helpers()}")


def prepare(server: Sshd, state: str) -> None:
    """A device where nothing is, or all but the bundle, or all."""
    if state == "nothing":
        shutil.rmtree(server.root, ignore_errors=True)
    elif state == "no bundle":
        shutil.rmtree(server.root / "bundles", ignore_errors=True)


def test_twenty_cuts(server: Sshd, tiny_bundle: Make) -> None:
    bundle, draw = tiny_bundle(), random.Random(SEED)
    server.wire.reset()
    duration, whole = finish(server, bundle, "the first run"), server.wire.sent
    shutil.rmtree(server.root / "bundles")
    server.wire.reset()
    short, bundle_bytes = finish(server, bundle, "the second run"), server.wire.sent
    kinds, cut_at = draw.sample(KINDS, len(KINDS)), []
    for number, kind in enumerate(kinds):
        state = draw.choice(["nothing", "no bundle"])
        moment = draw.random()
        where = f"seed {SEED}, cut {number}: {kind}, device with {state}, at {moment:.3f} of the run"
        prepare(server, state)
        limit = int(moment * (whole if state == "nothing" else bundle_bytes))
        server.wire.reset(cut_after=limit if kind == BYTES else None)
        process = start(server, bundle)
        if kind != BYTES:
            cut_at.append(cut_by_time(server, process, kind, moment * (duration if state == "nothing" else short)))
        out, err = process.communicate(timeout=120)
        if kind == BYTES:
            assert process.returncode == 4 and not out, f"{where}: {process.returncode} {out} {err}"
            assert "lost while" in err or "cannot connect" in err, f"{where}: it says what happened: {err}"
            assert "Traceback" not in err, where
        wait_for_helpers(server, where)
        assert find_half_made(server.root, partial=kind == HELPER) == [], where
        server.wire.reset()
        finish(server, bundle, where)
    assert server.wire.cuts == KINDS.count(BYTES)
    assert sum(cut_at) >= 5, "most of the kills came while something was going on"


def cut_by_time(server: Sshd, process: subprocess.Popen[str], kind: str, delay: float) -> bool:
    """Kill the client, or what runs on the device, after a time; whether there was anything to kill."""
    time.sleep(delay)
    victims = [process.pid] if kind == CLIENT else server.find_helpers()
    alive = process.poll() is None and bool(victims)
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return alive
