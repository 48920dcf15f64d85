"""Bundles on the device: which contents are there, taking those that are not, putting them together."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from lime_edge.bench.remote.there.place import NOTES, PARTIAL, discard, hash_file, make, mark, put, write_whole
from lime_edge.bench.remote.there.wire import FULL, PIECE, Refusal, Request, read_line, read_some


def place_of(root: Path, one: Request) -> Path:
    """Where a bundle lies."""
    return root / "bundles" / one["id"] / one["name"]


def is_here(root: Path, one: Request) -> bool:
    """Whether a bundle's files look as they did when they arrived; as_is: whether there is one, whatever its state."""
    place = place_of(root, one)
    try:
        notes = json.loads((place.parent / NOTES).read_text())
        return bool(one["as_is"]) or all(mark(place / path) == known for path, known in notes.items())
    except (OSError, ValueError):
        return False


def compare(root: Path, request: Request, _: IO[bytes]) -> Request:
    """Which contents are not on the device. Request: files {path: sha256}, id, name."""
    have = find_contents(root, set(request["files"].values()))
    return {"missing": sorted(set(request["files"].values()) - set(have))}


def find_contents(root: Path, wanted: set[str]) -> dict[str, Path]:
    """sha256 -> a file with that content: what arrived, and files of any bundle here.

    A file that no longer looks as it did when it arrived is hashed: a damaged one does not count.
    """
    found = {path.name: path for path in (root / "incoming").iterdir() if path.name in wanted}
    for notes_file in (root / "bundles").glob(f"*/{NOTES}"):
        with suppress(OSError, ValueError):
            notes = json.loads(notes_file.read_text())
            place = next(path for path in notes_file.parent.iterdir() if path.is_dir())
            manifest = json.loads((place / "lime.json").read_text())
            for path, entry in manifest["files"].items():
                digest = entry["sha256"]
                if digest not in wanted or digest in found:
                    continue
                with suppress(OSError):
                    file = place / path
                    if mark(file) == notes.get(path) or (file.is_file() and hash_file(file) == digest):
                        found[digest] = file
    return found


def receive(root: Path, request: Request, source: IO[bytes]) -> Request:
    """Take files: for each a line {sha256, size} and its bytes. Request: count, bytes."""
    free = shutil.disk_usage(root).free
    if request["bytes"] > free:
        raise Refusal(
            f"{root}: {request['bytes'] / 1e6:.0f} MB are to be brought, {free / 1e6:.0f} MB are free", FULL, 5
        )
    try:
        for _ in range(request["count"]):
            entry = json.loads(read_line(source))
            take(root / "incoming" / entry["sha256"], entry, source)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            for path in (root / "incoming").iterdir():
                discard(path)  # room for others: what arrived would have to come again anyway
        raise
    return {}


def take(path: Path, entry: Request, source: IO[bytes]) -> None:
    """One file under a temporary name; its own name when all bytes are there and hash to it."""
    stage = path.with_name(f".{path.name[:16]}.{secrets.token_hex(4)}{PARTIAL}")
    digest, left = hashlib.sha256(), entry["size"]
    try:
        with stage.open("xb") as file:
            while left:
                data = read_some(source, min(left, PIECE))
                digest.update(data)
                file.write(data)
                left -= len(data)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != entry["sha256"]:
            raise Refusal(f"a file arrived with another sha256 than {entry['sha256'][:16]}", "run it again", 5)
        stage.rename(path)
    finally:
        stage.unlink(missing_ok=True)


def assemble(root: Path, request: Request, _: IO[bytes]) -> Request:
    """Put a bundle together from what is here, or mend the one that lies there. Request: id, name, files, manifest."""
    contents = find_contents(root, set(request["files"].values()))
    if lacking := [path for path, digest in request["files"].items() if digest not in contents]:
        raise Refusal(f"{request['name']}: {lacking[0]} is not on the device", "run it again")
    place = place_of(root, request)
    if place.exists():
        mended = mend(place, request, contents)
    else:
        mended = []
        with make(place.parent) as stage:
            (stage / request["name"]).mkdir()
            for path, digest in request["files"].items():
                file = stage / request["name"] / path
                file.parent.mkdir(parents=True, exist_ok=True)
                put(contents[digest], file)
            write_whole(stage / request["name"] / "lime.json", request["manifest"])
            write_whole(stage / NOTES, json.dumps(note(stage / request["name"], request)))
    for path in (root / "incoming").iterdir():
        discard(path)
    for other in (root / "bundles").iterdir():  # an earlier state of the same bundle
        if other.name != request["id"] and (other / request["name"]).is_dir():
            discard(other)
    return {"mended": mended}


def mend(place: Path, request: Request, contents: dict[str, Path]) -> list[str]:
    """Replace damaged files one by one, each in one step."""
    mended = []
    for path, digest in request["files"].items():
        file = place / path
        if contents[digest] != file and not (file.is_file() and hash_file(file) == digest):
            stage = file.with_name(f".{file.name}.{secrets.token_hex(4)}{PARTIAL}")
            file.parent.mkdir(parents=True, exist_ok=True)
            put(contents[digest], stage)
            stage.replace(file)
            mended.append(path)
    if (place / "lime.json").read_bytes() != request["manifest"].encode():
        write_whole(place / "lime.json", request["manifest"])
        mended.append("lime.json")
    write_whole(place.parent / NOTES, json.dumps(note(place, request)))
    return mended


def note(place: Path, request: Request) -> Request:
    """The mark of every file."""
    return {path: mark(place / path) for path in ("lime.json", *request["files"])}
