"""A bundle as one file that an application downloads: an uncompressed tar, lime.json first, every byte checked.

Weights do not compress, and an archive that is not compressed can be resumed, read in one pass and unpacked by forty
lines of any language (POSIX ustar: blocks of 512 bytes; a header with name, size in octal, checksum; the data, padded).
"""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import IO

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.manifest import MANIFEST
from lime_edge.bundle.staging import storage_error
from lime_edge.errors import LimeEdgeError

PIECE = 1 << 20
LARGEST = 8 << 30  # bytes of one file: what eleven octal digits can say


def pack_bundle(path: Path, file: Path, force: bool = False) -> int:
    """Write a bundle as one archive; the same bundle gives the same bytes.

    Args:
        path: the bundle. file: the archive. force: replace an existing one.
    Returns:
        Bytes of the archive.
    Raises:
        LimeEdgeError: a damaged bundle (nothing is written), an existing archive, a file of 8 GiB, a full disk.
    """
    if file.exists() and not force:
        raise LimeEdgeError(f"{file}: already exists", "choose another name or pass `force`")
    bundle = Bundle.open(path)
    stage = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with stage.open("xb") as out:
            _write(bundle, out)
            size = out.tell()
        stage.replace(file)
    except FileExistsError:
        raise LimeEdgeError(f"{stage}: another pack writes it, or one was killed", "remove that file") from None
    except OSError as error:
        stage.unlink(missing_ok=True)
        raise storage_error(file, error) from None
    except LimeEdgeError:
        stage.unlink(missing_ok=True)
        raise
    return size


def _write(bundle: Bundle, stage: IO[bytes]) -> None:
    names = [MANIFEST, *sorted(bundle.manifest.files)]
    with tarfile.open(fileobj=stage, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in names:
            file = bundle.path / name
            facts = tarfile.TarInfo(name)
            facts.size, facts.mode = file.stat().st_size, 0o644
            if facts.size >= LARGEST:
                raise LimeEdgeError(f"{file}: expected less than 8 GiB, found {facts.size} bytes", "copy the folder")
            with file.open("rb") as data:
                archive.addfile(facts, checked := _Hashing(data))
            entry = bundle.manifest.files.get(name)
            if entry is not None and (checked.digest.hexdigest() != entry.sha256 or facts.size != entry.size):
                raise LimeEdgeError(f"{file}: it is not what {MANIFEST} says", "the bundle is damaged: export it again")
    stage.flush()


class _Hashing:
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]):
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = PIECE) -> bytes:
        """The next bytes."""
        data = self._file.read(size)
        self.digest.update(data)
        return data
