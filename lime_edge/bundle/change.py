"""Changing a bundle: one writer at a time, one step from the old one to the new, nothing left behind.

Everything new lies under names that no reader knows before lime.json is replaced by one rename; what is not named any
more is deleted after it. A writer that is killed at any moment leaves the old bundle or the new one, and files that
nobody names: the next writer removes them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np

from lime_edge.bundle.bundle import Bundle, read_manifest
from lime_edge.bundle.companions import encode_expert
from lime_edge.bundle.experts import NONE, Expert, ExpertBank, Selection, describe_selection
from lime_edge.bundle.fields import ExpertEntry, FileEntry
from lime_edge.bundle.inside import Inside
from lime_edge.bundle.locking import lock_directory
from lime_edge.bundle.manifest import ALWAYS_ON, EXPERTS, MANIFEST, decode_manifest, encode_manifest
from lime_edge.bundle.names import check_name
from lime_edge.bundle.staging import PARTIAL, storage_error, sweep
from lime_edge.errors import LimeEdgeError, suggest


def add_experts(path: Path, experts: Sequence[Expert], replace: bool = False) -> Bundle:
    """Write experts into a bundle: all of them or none.

    Args:
        replace: take the place of experts of the same names.
    Returns:
        The bundle as it is afterwards.
    Raises:
        LimeEdgeError: one does not fit, a name is taken, or nothing can be written: the bundle is as before.
    """
    with _change(path) as change:
        change.add(experts, replace)
    return change.bundle


def add_blend(path: Path, blend: Selection, name: str, replace: bool = False) -> Bundle:
    """Write a fixed mixture of a bundle's experts as a new expert.

    Raises: as `add_experts`.
    """
    with _change(path) as change:
        manifest = change.bundle.manifest
        mixed = change.bundle.open_bank().mix(blend).astype(manifest.adapter.expert_dtype)
        note = f"blend of {describe_selection(blend)}"[:500]
        change.add([Expert(name, mixed, manifest.adapter_id, note)], replace)
    return change.bundle


def remove_expert(path: Path, name: str) -> Bundle:
    """Take an expert out of a bundle; where the bundle opened with it, it opens with the next one from now on.

    Raises:
        LimeEdgeError: it is not there, or nothing can be written: the bundle is as before.
    """
    with _change(path) as change:
        change.remove(name)
    return change.bundle


def check_experts(bundle: Bundle, experts: Iterable[Expert], replace: bool = False) -> None:
    """Refuse what `add_experts` would refuse; nothing is written."""
    manifest = bundle.manifest
    if (single := manifest.adapter.single) is not None:
        raise LimeEdgeError(
            f"{bundle.path} was exported with `single`: it holds {single!r} only",
            "export it without `single`",
        )
    bank = ExpertBank(manifest.sites.total, manifest.adapter_id, bundle.read_reference())
    taken = {name.lower(): name for name in manifest.experts}
    for expert in experts:
        if problem := check_name(expert.name):
            raise LimeEdgeError(problem, "pass another `name`")
        twin = taken.get(expert.name.lower())
        if twin is not None and not (replace and twin == expert.name):
            hint = "pass `force` or another `name`" if twin == expert.name else "letter case does not tell names apart"
            raise LimeEdgeError(f"{bundle.path}: expert {twin!r} exists already", hint)
        bank.check(expert, f"expert {expert.name!r}")


@contextmanager
def _change(path: Path) -> Iterator[_Change]:
    """The bundle under its lock, put right where a writer was killed; written when the block ends well."""
    read_manifest(path)  # what is no bundle is said before anything is touched
    try:
        with lock_directory(path), Inside(path) as inside:
            sweep(Path(os.path.realpath(path)))
            change = _Change(Bundle.open(path), inside)
            change.recover()
            yield change
            change.write()
    except OSError as error:
        raise storage_error(path, error) from None


class _Change:
    """One change of a bundle, gathered in memory and then written."""

    def __init__(self, bundle: Bundle, inside: Inside):
        self.bundle, self._inside = bundle, inside
        self._experts = list(bundle.manifest.expert_list)
        self._companions = dict(bundle.manifest.companions)
        self._default = bundle.manifest.default
        self._new: dict[str, bytes] = {}

    def add(self, experts: Sequence[Expert], replace: bool) -> None:
        """Put experts after the others; one that replaces another too."""
        check_experts(self.bundle, experts, replace)
        if len({expert.name.lower() for expert in experts}) != len(experts):
            raise LimeEdgeError(f"{self.bundle.path}: two of the new experts have one name", "rename one of them")
        reference = self.bundle.read_reference() if self._companions else np.zeros(0, np.float32)
        for expert in experts:
            data = expert.to_bytes()
            file = self._choose_file(f"{EXPERTS}{expert.name}", ".safetensors", data)
            self._new[file] = data
            self._drop(expert.name)
            self._experts.append(ExpertEntry(name=expert.name, file=file, added=True))
            for name, companion in self._companions.items():
                if companion.form is None:
                    continue
                data = encode_expert(companion.form, expert.vector.astype(np.float32) - reference)
                file = self._choose_file(f"{companion.folder}/{expert.name}", f".{companion.form}", data)
                self._new[file] = data
                files = companion.experts | {expert.name: file}
                self._companions[name] = msgspec.structs.replace(companion, experts=files)

    def remove(self, name: str) -> None:
        """Leave an expert out."""
        known = self.bundle.manifest.experts
        if name not in known:
            hint = f"{suggest(name, known)} experts: {', '.join(known)}".strip()
            raise LimeEdgeError(f"{self.bundle.path}: unknown expert {name!r}", hint)
        if name == self.bundle.manifest.adapter.single:
            raise LimeEdgeError(f"{self.bundle.path} holds {name!r} alone (`single`)", "export it without `single`")
        self._drop(name)
        if name == self._default:
            self._default = self._experts[0].name if self._experts else NONE
        if not self._experts and (variant := self.bundle.manifest.adapter.variant) in ALWAYS_ON:
            raise LimeEdgeError(
                f"{self.bundle.path}: {name!r} is the last expert, and a {variant} adapter cannot be switched off",
                "add another one first",
            )

    def _drop(self, name: str) -> None:
        self._experts = [entry for entry in self._experts if entry.name != name]
        for key, companion in self._companions.items():
            files = {expert: file for expert, file in companion.experts.items() if expert != name}
            self._companions[key] = msgspec.structs.replace(companion, experts=files)

    def _choose_file(self, stem: str, suffix: str, data: bytes) -> str:
        """A name that no file has: the plain one, else one with the content's hash."""
        taken = {name.lower() for name in (*self.bundle.manifest.files, *self._new)}
        if (plain := stem + suffix).lower() not in taken:
            return plain
        for digits in (16, 64):
            name = f"{stem}-{hashlib.sha256(data).hexdigest()[:digits]}{suffix}"
            if name.lower() not in taken or self.bundle.manifest.files.get(name) == _describe(data):
                return name
        raise LimeEdgeError(f"{self.bundle.path}: no name is left for {plain}", "remove the expert first")

    def recover(self) -> None:
        """Remove what killed writers left: what no reader can know."""
        listed = self.bundle.manifest.files
        folders = {"": (f".{MANIFEST}.", PARTIAL), EXPERTS[:-1]: ("", "")}
        for companion in self._companions.values():
            if companion.form is not None:
                folders[companion.folder] = ("", f".{companion.form}")
        for folder, (start, end) in folders.items():
            for name in self._inside.list(folder):
                path = f"{folder}/{name}".lstrip("/")
                if name.startswith(start) and name.endswith(end) and path not in listed:
                    with suppress(OSError, LimeEdgeError):  # a folder, or a name of someone else's
                        self._inside.unlink(path)

    def write(self) -> None:
        """Files first, then lime.json by one rename, then what it does not name any more goes."""
        old = self.bundle.manifest
        named = {entry.file for entry in self._experts}
        named |= {file for companion in self._companions.values() for file in companion.experts.values()}
        before = {entry.file for entry in old.expert_list}
        before |= {file for companion in old.companions.values() for file in companion.experts.values()}
        files = {name: entry for name, entry in old.files.items() if name not in before - named}
        new = {name: data for name, data in self._new.items() if name not in old.files}
        manifest = msgspec.structs.replace(
            old,
            expert_list=tuple(self._experts),
            companions=self._companions,
            default=self._default,
            files=files | {name: _describe(data) for name, data in new.items()},
        )
        text = encode_manifest(manifest)
        stage = f".{MANIFEST}.{os.getpid()}{PARTIAL}"
        try:
            for name, data in (*new.items(), (stage, text)):
                self._inside.create(name, data)
            for name in new:
                self._inside.settle(name)
            self._inside.rename(stage, MANIFEST)
        except BaseException:
            if not self._is_written(text):  # an interrupt may come after the rename
                self._remove(*new, stage)
            raise
        self.bundle = Bundle(self.bundle.path, decode_manifest(text, MANIFEST))
        with suppress(OSError):  # what cannot be done now, the next change does
            self._inside.settle(MANIFEST)
            self._remove(*(before - named))

    def _is_written(self, text: bytes) -> bool:
        try:
            return self._inside.read(MANIFEST, len(text)) == text
        except OSError:
            return False

    def _remove(self, *names: str) -> None:
        for name in names:
            with suppress(OSError):
                self._inside.unlink(name)


def _describe(data: bytes) -> FileEntry:
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
