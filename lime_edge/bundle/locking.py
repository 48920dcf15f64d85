"""One writer at a time: an exclusive lock on a directory, which leaves nothing behind when its holder is killed."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lime_edge.bundle.inside import FOLDER
from lime_edge.errors import EXIT_STORAGE, LimeEdgeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"  # in the directory, where directories themselves cannot be locked
PATIENCE = 120.0  # seconds that a writer waits for another one
BUSY = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)


@contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Hold the lock of the directory that `path` leads to now.

    Raises:
        LimeEdgeError: another process keeps it for too long. OSError: no such directory.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        descriptor = _wait(path, deadline)
        try:
            if leads_to(path, descriptor):
                yield
                return
        finally:
            os.close(descriptor)  # gives the lock back


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the directory's lock until it is closed, or None where another process has it.

    Raises:
        OSError: no such directory, or no permission.
    """
    if fcntl:
        descriptor = os.open(path, FOLDER)
        try:
            if hold(descriptor):
                return descriptor
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)  # a file system (some network ones) that cannot lock directories
    return _try_lock_file(path / LOCK_FILE)


def hold(descriptor: int) -> bool:
    """Lock what is open, until it is closed; False where another process has it.

    Raises:
        OSError: the system cannot lock it.
    """
    if not fcntl:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in BUSY:
            return False
        raise
    return True


def leads_to(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to what a lock is held on, or to the folder it lies in."""
    try:
        held, there = os.fstat(descriptor), os.stat(path)
        if (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino):
            there = os.stat(path / LOCK_FILE)
    except OSError:
        return False
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)


def _wait(path: Path, deadline: float) -> int:
    pause = 0.001
    while (descriptor := try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise LimeEdgeError(
                f"{path}: another process has been changing it for {PATIENCE:.0f} s",
                "wait for it to end, or end it, and try again",
                EXIT_STORAGE,
            )
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, 0.05)
    return descriptor


def _try_lock_file(file: Path) -> int | None:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        if fcntl:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if error.errno in BUSY:
            return None
        raise
