"""The one folder that a device gives up: who works in it, and that what is there is there whole."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lime_edge.bench.remote.there.wire import Refusal

PARTIAL, OLD, NOTES, READY = ".partial", ".old", "arrived.json", "ready.json"
PATIENCE = 30.0  # seconds to wait for another one who works here


@contextmanager
def hold(root: Path) -> Iterator[None]:
    """Work here alone; sweep first what was killed in the middle."""
    import fcntl

    for folder in ("env", "bundles", "incoming", "cache"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Refusal(
                        f"{root}: another lime-edge is at work on this device", "wait for it to end", 5
                    ) from None
                time.sleep(0.1)
        sweep(root)
        yield
    finally:
        os.close(descriptor)


def sweep(root: Path) -> None:
    """Delete what is half-made: nobody alive works on it, for the lock is ours."""
    for folder in ("", "env", "bundles", "incoming"):
        for path in (root / folder).iterdir():
            if path.name.endswith((PARTIAL, OLD)):
                discard(path)


def discard(path: Path) -> None:
    """Delete a file or a folder; a folder loses its name first, so that no half of it is taken for the whole."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.endswith((PARTIAL, OLD)):
            gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}{OLD}")
            path.rename(gone)
            path = gone
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def make(path: Path) -> Iterator[Path]:
    """Yield a new folder that takes the name `path` when the block ends well, and vanishes when it does not."""
    stage = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        stage.mkdir()
        yield stage
        if path.exists():
            discard(path)
        stage.rename(path)
    finally:
        discard(stage)


def write_whole(path: Path, text: str) -> None:
    """A small file that is there whole or not at all."""
    stage = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with stage.open("xb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        stage.replace(path)
    finally:
        stage.unlink(missing_ok=True)


def mark(path: Path) -> list[int]:
    """What changes when a file is written to."""
    found = path.lstat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put(content: Path, file: Path) -> None:
    """The same content under a second name; a copy where the file system has no second names."""
    try:
        os.link(content, file)
    except OSError:
        shutil.copyfile(content, file)
