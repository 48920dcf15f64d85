"""Writing so that nothing is ever half there: a temporary sibling, then a rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lime_edge.errors import EXIT_STORAGE, LimeEdgeError

HINTS = {
    errno.ENOSPC: "the disk is full: free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only: write elsewhere",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
}


def storage_error(path: Path, error: OSError) -> LimeEdgeError:
    """The one error for a failed write."""
    hint = HINTS.get(error.errno or 0, "nothing was left behind")
    return LimeEdgeError(f"{path}: cannot write: {error.strerror or error}", hint, EXIT_STORAGE)


@contextmanager
def stage_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path`; rename it to `path` when the block ends well.

    Args:
        path: the directory to appear. replace: allow an existing directory to be replaced.
    Raises:
        LimeEdgeError: it exists already, or it cannot be written (read-only, full): nothing is left.
    """
    path = path.absolute()
    if path.exists() and not replace:
        raise LimeEdgeError(f"{path}: already exists", "choose another name or pass --force")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise storage_error(path, error) from None
    try:
        stage.chmod(0o755)
        yield stage
        _move(stage, path)
    except OSError as error:
        raise storage_error(path, error) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move(stage: Path, path: Path) -> None:
    if not path.exists():
        stage.rename(path)
        return
    old = path.with_name(f"{stage.name}.old")
    path.rename(old)
    try:
        stage.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file by way of a temporary sibling, so that readers see the old one or the new one.

    Raises:
        LimeEdgeError: it cannot be written; the old file is untouched.
    """
    stage = path.with_name(f".{path.name}.partial")
    try:
        with stage.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        stage.replace(path)
    except OSError as error:
        raise storage_error(path, error) from None
    finally:
        stage.unlink(missing_ok=True)
