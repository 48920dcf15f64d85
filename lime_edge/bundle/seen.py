"""Which large files were hashed before: notes in the user's cache folder, so that a warm opening need not hash them.

A note is worth something only where others cannot write it: it counts if the file is the user's own and nobody else's
to write. Where there is no such place, large files are hashed at every opening.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

import msgspec

MOST_BUNDLES = 256  # notes kept; the oldest go
LARGEST = 1 << 20
SECOND = 10**9


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """What a file looked like when its sha256 was found: equal marks, equal bytes (nothing restores a change time)."""

    size: int
    modified: int
    changed: int
    inode: int
    device: int
    sha256: str


def find_cache() -> Path:
    """The folder that the system keeps for a user's caches, with our name added."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "lime-edge"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/lime-edge"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "lime-edge" / "Cache"
    return Path.home() / ".cache/lime-edge"


def mark_file(found: os.stat_result, sha256: str) -> Mark:
    """The mark of a file with that sha256."""
    return Mark(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev, sha256)


def read_marks(bundle: Path) -> dict[str, Mark]:
    """By path in the bundle; nothing where nothing was noted or the note is not to be trusted."""
    try:
        file = _find_note(bundle)
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())
            own = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
            if own and found.st_size <= LARGEST:
                return msgspec.json.decode(opened.read(), type=dict[str, Mark])
    except (OSError, ValueError, RuntimeError):
        pass
    return {}


def write_marks(bundle: Path, marks: dict[str, Mark]) -> None:
    """Note what was hashed; where that cannot be written, nothing is."""
    settled = {path: mark for path, mark in marks.items() if _is_settled(mark)}
    stage = None
    try:
        file = _find_note(bundle)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, stage = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(msgspec.json.encode(settled))
        os.replace(stage, file)
        stage = None
        _forget_oldest(file.parent)
    except (OSError, RuntimeError):
        if stage is not None:
            Path(stage).unlink(missing_ok=True)


def _is_settled(mark: Mark) -> bool:
    """Whether another write would show: not while the file's clock could still give the same time twice."""
    coarse = mark.modified % SECOND == 0 and mark.changed % SECOND == 0  # FAT counts in steps of two seconds
    return time.time_ns() - max(mark.modified, mark.changed) > (3 * SECOND if coarse else SECOND // 10)


def _find_note(bundle: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(bundle))).hexdigest()[:32]
    return find_cache() / "seen" / f"{name}.json"


def _forget_oldest(folder: Path) -> None:
    notes = list(folder.glob("*.json"))
    if len(notes) > MOST_BUNDLES:
        for note in sorted(notes, key=lambda note: note.stat().st_mtime_ns)[: len(notes) - MOST_BUNDLES]:
            note.unlink(missing_ok=True)
