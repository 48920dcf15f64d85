"""Files inside a bundle, reached without following a link: the one door for readers and for writers.

The bundle's directory itself may be a link, as its user likes; nothing below it may. What is opened is a plain file: no
device, no pipe that would wait for ever.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from lime_edge.bundle.names import check_path
from lime_edge.errors import LimeEdgeError

BELOW = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd  # not on Windows
FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
READ = os.O_RDONLY | NO_LINK | getattr(os, "O_NONBLOCK", 0)
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK
PIECE = 1 << 20


class Inside:
    """A bundle's directory held open: what is asked for by path is looked up below it.

    Every method takes a path as lime.json has it, and raises OSError: ELOOP where a link is in the way, ENOENT, ...
    """

    def __init__(self, root: Path):
        self.root = root
        self._folders: dict[str, int] = {}
        if BELOW:
            self._folders[""] = os.open(root, FOLDER)
        elif not root.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))

    def __enter__(self) -> Inside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._folders:
            os.close(self._folders.popitem()[1])

    @property
    def descriptor(self) -> int:
        """Of the directory itself; -1 where the system has none for directories."""
        return self._folders.get("", -1)

    def stat(self, path: str) -> os.stat_result:
        """Facts of a plain file."""
        name, folder = self._place(path)
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        _require_plain(found, path)
        return found

    def open(self, path: str) -> int:
        """A descriptor to read a plain file; the caller closes it."""
        name, folder = self._place(path)
        descriptor = os.open(name, READ, dir_fd=folder)
        try:
            _require_plain(os.fstat(descriptor), path)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def read(self, path: str, most: int) -> bytes:
        """The bytes of a file of at most `most`; one byte more of a larger one."""
        descriptor = self.open(path)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            pieces, left = [], most + 1
            while left and (piece := file.read(min(left, PIECE))):
                pieces.append(piece)
                left -= len(piece)
            return b"".join(pieces)

    def hash(self, path: str) -> str:
        """sha256 of a file, read in pieces."""
        digest = hashlib.sha256()
        with os.fdopen(self.open(path), "rb", buffering=0) as file:
            buffer = memoryview(bytearray(PIECE))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
        return digest.hexdigest()

    def list(self, folder: str) -> list[str]:
        """Names in a folder ("": the bundle's own), links and folders too; none where there is no such folder."""
        try:
            place = self._open_folder(folder)
        except FileNotFoundError:
            return []
        return sorted(os.listdir(place if BELOW else self.root / folder))

    def create(self, path: str, data: bytes) -> None:
        """Write a new file, to the disk; EEXIST where there is anything of that name, a link too."""
        name, folder = self._place(path, make=True)
        descriptor = os.open(name, CREATE, 0o644, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.unlink(name, dir_fd=folder)
            raise

    def rename(self, old: str, new: str) -> None:
        """Move a file over another one, in one step."""
        name, folder = self._place(old)
        other, same = self._place(new)
        os.replace(name, other, src_dir_fd=folder, dst_dir_fd=same)

    def unlink(self, path: str) -> None:
        """Delete a file, or a link instead of what it leads to."""
        name, folder = self._place(path)
        os.unlink(name, dir_fd=folder)

    def settle(self, path: str) -> None:
        """Write the folder of a path to the disk, where directories can be."""
        if BELOW:
            os.fsync(self._open_folder(path.rpartition("/")[0]))

    def _place(self, path: str, make: bool = False) -> tuple[str | Path, int | None]:
        """What to hand to os functions: a name and the descriptor of its folder."""
        folder, _, name = path.rpartition("/")
        if problem := check_path(path.removeprefix(".")):  # names of our own begin with a dot
            raise LimeEdgeError(f"{self.root}: {problem}", "the bundle is damaged: copy or export it again")
        place = self._open_folder(folder, make)
        return (name, place) if BELOW else (self.root / path, None)

    def _open_folder(self, folder: str, make: bool = False) -> int:
        if folder in self._folders:
            return self._folders[folder]
        above, _, name = folder.rpartition("/")
        place = self._open_folder(above, make) if BELOW or above else -1
        if not BELOW:
            return self._check_folder(folder, make)
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=place)
        self._folders[folder] = os.open(name, FOLDER | NO_LINK, dir_fd=place)
        return self._folders[folder]

    def _check_folder(self, folder: str, make: bool) -> int:
        """Where folders cannot be held open, look whether one is a link; someone might make it one afterwards."""
        path = self.root / folder
        if make:
            path.mkdir(exist_ok=True)
        if path.is_symlink() or not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        return -1


def _require_plain(found: os.stat_result, path: str) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, "it is a link", path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a plain file", path)


def is_folder(path: Path) -> bool:
    """Whether a user's path leads to a folder; what cannot be looked at (a name too long, no permission) does not."""
    return _has_kind(path, stat.S_ISDIR)


def is_plain(path: Path) -> bool:
    """The same for a plain file: no pipe that would be waited for, no device without an end."""
    return _has_kind(path, stat.S_ISREG)


def _has_kind(path: Path, test: Callable[[int], bool]) -> bool:
    try:
        return test(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def explain(error: OSError) -> str:
    """What to say of a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
        return "is reached by a link: links are not followed"
    return f"cannot be read: {error.strerror or error}"
