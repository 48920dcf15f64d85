"""The other side: its request, its signs of life, and what is killed when it goes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

PIECE = 1 << 18
SILENCE = 90.0  # seconds without a sign of life
FULL = "the device's disk is full: free some space there, or give the hosts file another folder"
Request = dict[str, Any]
running: list[subprocess.Popen[bytes]] = []
gone = threading.Event()


class Refusal(Exception):
    """What the other side is told: a problem, a hint, an exit code of lime-edge."""

    def __init__(self, problem: str, hint: str = "", code: int = 2):
        super().__init__(problem)
        self.answer = {"problem": problem, "hint": hint, "code": code}


class Lost(BaseException):
    """The other side is gone."""


def read_some(source: IO[bytes], most: int) -> bytes:
    """The next bytes.

    Raises:
        Lost: there are no more.
    """
    import select

    if not select.select([source], [], [], SILENCE)[0] or not (data := source.read(most)):
        raise Lost
    return data


def read_line(source: IO[bytes]) -> bytes:
    """The next line; empty ones are signs of life."""
    line = b""
    while not line.endswith(b"\n") or line == b"\n":
        line = b"" if line == b"\n" else line
        line += read_some(source, 1)
    return line


def watch() -> None:
    """Until the other side goes: then kill what runs; the main thread cleans up after it."""
    import select

    while select.select([0], [], [], SILENCE)[0] and os.read(0, PIECE):
        pass
    gone.set()
    for child in list(running):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


@contextmanager
def start(command: list[str], **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a group of its own, killed with all of its children when the other side goes."""
    child = subprocess.Popen(command, start_new_session=True, **settings)
    running.append(child)
    try:
        if gone.is_set():
            raise Lost
        yield child
    finally:
        with suppress(ProcessLookupError, PermissionError):
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        running.remove(child)
    if gone.is_set():
        raise Lost


def vanish(*_: object) -> None:
    """A signal is the other side going."""
    gone.set()
    raise Lost
