"""Writing so that nothing is ever half there: a temporary sibling, then one step that puts it in its place."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lime_edge.bundle.inside import READ
from lime_edge.bundle.locking import hold, leads_to, lock_directory, try_lock
from lime_edge.errors import EXIT_STORAGE, LimeEdgeError

PARTIAL, OLD = ".partial", ".old"
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE (macOS: RENAME_SWAP), AT_FDCWD
HINTS = {
    errno.ENOSPC: "the disk is full: free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.ENOTEMPTY: "another process wrote it meanwhile: choose another name or pass `force`",
}


def storage_error(path: Path, error: OSError) -> LimeEdgeError:
    """The one error for a failed write."""
    hint = HINTS.get(error.errno or 0, "nothing was left behind")
    return LimeEdgeError(f"{path}: cannot write: {error.strerror or error}", hint, EXIT_STORAGE)


@contextmanager
def stage_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path`; put it in `path`'s place, in one step, when the block ends well.

    What is killed leaves the old directory or the new one, and a partial one beside it that the next call removes.

    Args:
        path: the directory to appear. replace: allow an existing directory to be replaced.
    Raises:
        LimeEdgeError: it exists already, or it cannot be written (read-only, full): nothing is left.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()
    above = [parent for parent in path.parents if not parent.exists()]  # nearest first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        if os.path.lexists(path) and not replace:
            raise LimeEdgeError(f"{path}: already exists", "choose another name or pass `force`")
        stage, lock = _make_stage(path)
    except OSError as error:
        _remove_empty(above)
        raise storage_error(path, error) from None
    try:
        stage.chmod(0o755)
        yield stage
        _put(stage, path, replace)
    except OSError as error:
        raise storage_error(path, error) from None
    finally:
        _discard(stage)
        os.close(lock)
        _remove_empty(above)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Folders that were made for what did not come; what is not empty stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def sweep(path: Path) -> None:
    """Put right what killed writers of `path` left beside it; what a living one holds stays.

    An old directory goes back where a replacement was cut off between its two renames; partial ones are deleted.
    """
    for left in (*_find_left(path, OLD), *_find_left(path, PARTIAL)):
        if (lock := _lock_left(left)) is not None:
            if left.suffix == OLD and not os.path.lexists(path):
                left.rename(path)
            else:
                _discard(left)
            os.close(lock)


def find_interrupted(path: Path) -> Path | None:
    """The old directory that a killed replacement of `path` left under another name, or None."""
    return next(iter(_find_left(path, OLD)), None)


def _find_left(path: Path, suffix: str) -> list[Path]:
    """What lies beside `path` under the names that are made here for it: its own and eight characters by tempfile."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(suffix)}")
    try:
        return sorted(path.with_name(name) for name in os.listdir(path.parent) if pattern.fullmatch(name))
    except OSError:
        return []


def write_file(path: Path, data: bytes) -> None:
    """Write a file by way of a temporary sibling, so that readers see the old one or the new one.

    Raises:
        LimeEdgeError: it cannot be written; the old file is untouched.
    """
    stage = None
    try:
        sweep(path)
        descriptor, stage = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            hold(descriptor)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(stage, 0o644)
        os.replace(stage, path)
        stage = None
    except OSError as error:
        raise storage_error(path, error) from None
    finally:
        if stage is not None:
            _discard(Path(stage))


def _make_stage(path: Path) -> tuple[Path, int]:
    """A new partial directory and a descriptor that holds its lock: a sign of life for `sweep`."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
        try:
            lock = try_lock(stage)
        except FileNotFoundError:
            continue  # swept before it was locked
        except OSError:
            _discard(stage)
            raise
        if lock is not None and leads_to(stage, lock):
            return stage, lock
        if lock is not None:
            os.close(lock)


def _lock_left(path: Path) -> int | None:
    """The lock of something that nobody alive holds, as a descriptor; None: leave it alone."""
    try:
        if path.is_dir() and not path.is_symlink():
            return try_lock(path)
        descriptor = os.open(path, READ)
    except OSError:
        return None
    if hold(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _put(stage: Path, path: Path, replace: bool) -> None:
    if not os.path.lexists(path) or not replace:
        os.rename(stage, path)  # onto a directory that appeared meanwhile: ENOTEMPTY
        return
    if not path.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    with lock_directory(path):
        if exchange(stage, path):
            return  # the stage is now the old one, and goes
        old = stage.with_suffix(OLD)
        os.rename(path, old)
        try:
            os.rename(stage, path)
        except OSError:
            os.rename(old, path)
            raise
        _discard(old)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot.

    Source: renameat2(2); renamex_np(2) on macOS.
    """
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        done = libc.renamex_np(first, second, EXCHANGE) == 0  # type: ignore[union-attr]
    elif hasattr(libc, "renameat2"):
        done = libc.renameat2(HERE, first, HERE, second, EXCHANGE) == 0  # type: ignore[union-attr]
    else:
        return False
    number = ctypes.get_errno()
    if not done and number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(number, os.strerror(number), str(other))
    return done


def _discard(path: Path) -> None:
    """Delete as far as possible: what is left is swept by the next writer."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
