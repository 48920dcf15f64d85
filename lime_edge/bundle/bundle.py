"""The bundle as a reader has it: opened, checked, tensors read when asked for; docs/bundle-format.md is the rule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from lime_edge.bundle.companions import GENAI_CONFIG, find_code
from lime_edge.bundle.experts import Expert, ExpertBank, check_values, parse_expert
from lime_edge.bundle.fields import ExpertEntry, FileEntry, Manifest
from lime_edge.bundle.inside import Inside, explain, is_folder
from lime_edge.bundle.manifest import DAMAGED, LARGEST, MANIFEST, REFERENCE, decode_manifest
from lime_edge.bundle.residual import Subtract, subtract_reference
from lime_edge.bundle.seen import Mark, mark_file, read_marks, write_marks
from lime_edge.bundle.staging import find_interrupted
from lime_edge.errors import Faults, LimeEdgeError

SMALL = 1 << 20  # bytes: a file up to here is hashed whenever the bundle is opened
AHEAD = 64 << 20  # bytes of expert files that a session keeps from its beginning on, whatever becomes of the bundle
TRIES = 50  # a reader begins again when a writer changed the bundle meanwhile
TOKENIZER = "tokenizer/"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its manifest is checked, its files are there and have their sizes."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, verify: bool = False) -> Bundle:
        """Open a bundle.

        Args:
            verify: compare the sha256 of every file, not of the small ones only.
        Raises:
            LimeEdgeError: missing, foreign, of another schema or damaged; every damaged file is named.
        """
        path = Path(path)
        for _ in range(TRIES):
            data = read_manifest(path)
            bundle = cls(path, decode_manifest(data, str(path / MANIFEST)))
            try:
                bundle._check_files(verify)
            except LimeEdgeError:
                if read_manifest(path) == data:
                    raise
            else:
                return bundle
        raise LimeEdgeError(f"{path}: it is being changed all the time", "try again")

    def _check_files(self, verify: bool) -> None:
        """Sizes of all, hashes as asked for."""
        late = {entry.file for entry in self.manifest.expert_list}
        late |= {file for companion in self.manifest.companions.values() for file in companion.experts.values()}
        marks: dict[str, Mark] = {}
        with Faults(str(self.path), DAMAGED) as faults, Inside(self.path) as inside:
            for name, entry in self.manifest.files.items():
                small = entry.size <= SMALL and name not in late
                if (mark := _check_file(inside, name, entry, verify or small, faults)) is not None and not small:
                    marks[name] = mark
                if name.rpartition("/")[2] == GENAI_CONFIG:
                    _check_companion(inside, name, faults)
        if verify:
            write_marks(self.path, marks)

    def check_target(self, target: str) -> None:
        """Compare the large files of a target, and the tokenizer's, that were not seen before as they are now.

        Called before an engine is given any of them.

        Raises:
            LimeEdgeError: a file is damaged or was exchanged.
        """
        own = {
            name: entry
            for name, entry in self.manifest.files.items()
            if entry.size > SMALL and name.startswith((f"{target}/", TOKENIZER))
        }
        marks = read_marks(self.path)
        changed = False
        with Faults(str(self.path), DAMAGED) as faults, Inside(self.path) as inside:
            for name, entry in own.items():
                try:
                    known = marks.get(name) == mark_file(inside.stat(name), entry.sha256)
                except OSError as error:
                    faults.add(f"{name} {explain(error)}")
                    continue
                if known or (mark := _check_file(inside, name, entry, True, faults)) is None:
                    continue
                marks[name], changed = mark, True
        if changed:
            write_marks(self.path, {name: mark for name, mark in marks.items() if name in self.manifest.files})

    @property
    def total_bytes(self) -> int:
        """Size of every file listed, in bytes."""
        return sum(entry.size for entry in self.manifest.files.values())

    def read(self, name: str) -> bytes:
        """The bytes of a listed file, their sha256 compared.

        Raises:
            LimeEdgeError: it is missing, damaged, or was exchanged after the bundle was opened.
        """
        entry = self.manifest.files[name]
        try:
            with Inside(self.path) as inside:
                data = inside.read(name, entry.size)
        except OSError as error:
            raise LimeEdgeError(f"{self.path}: {name} {explain(error)}", self._explain_change()) from None
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise LimeEdgeError(f"{self.path}: {name}: sha256 is another", self._explain_change())
        return data

    def _explain_change(self) -> str:
        try:
            changed = Bundle.open(self.path).manifest != self.manifest
        except LimeEdgeError:
            changed = False
        return "the bundle was changed after it was opened: open it again" if changed else DAMAGED

    def read_reference(self) -> np.ndarray:
        """p_ref (sum_H,) float32."""
        where = str(self.path / REFERENCE)
        try:
            reference = load(self.read(REFERENCE))["reference"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise LimeEdgeError(f"{where}: damaged: {error}", DAMAGED) from None
        if reference.shape != (self.manifest.sites.total,) or reference.dtype != np.float32:
            wanted = f"({self.manifest.sites.total},) float32"
            raise LimeEdgeError(f"{where}: expected {wanted}, found {reference.shape} {reference.dtype}", DAMAGED)
        check_values(reference, where)
        return reference

    def read_expert(self, name: str) -> Expert:
        """One of the bundle's experts.

        Raises:
            LimeEdgeError: unknown, damaged, or not what the manifest says.
        """
        entry = next(entry for entry in self.manifest.expert_list if entry.name == name)
        return self._parse(entry, self.read(entry.file))

    def _parse(self, entry: ExpertEntry, data: bytes) -> Expert:
        where = str(self.path / entry.file)
        expert = parse_expert(data, where, self.manifest.sites.total)
        with Faults(where, DAMAGED) as faults:
            if expert.name != entry.name:
                faults.add("name", repr(entry.name), repr(expert.name))
            if expert.adapter_id != self.manifest.adapter_id:
                faults.add("adapter_id", self.manifest.adapter_id[:16], expert.adapter_id[:16])
        return expert

    def open_bank(self, subtract: Subtract | None = None) -> ExpertBank:
        """The bundle's experts as they are now; each is checked when it is first used.

        Args:
            subtract: how p - p_ref is computed, where an engine brings something faster than numpy.
        Raises:
            LimeEdgeError: an expert's file is missing or has another size.
        """
        bundle = self
        for _ in range(TRIES):
            bank = ExpertBank(
                bundle.manifest.sites.total,
                self.manifest.adapter_id,
                bundle.read_reference(),
                subtract or subtract_reference,
            )
            try:
                for name, load_expert in bundle._loaders():
                    bank.offer(name, load_expert)
                return bank
            except LimeEdgeError:
                now = Bundle.open(self.path)
                if now.manifest == bundle.manifest or now.manifest.adapter_id != self.manifest.adapter_id:
                    raise
                bundle = now
        raise LimeEdgeError(f"{self.path}: it is being changed all the time", "try again")

    def _loaders(self) -> Iterator[tuple[str, Callable[[], Expert]]]:
        """How to read each expert later: from bytes that are kept from now on, or, beyond AHEAD, from its file."""
        left = AHEAD
        with Inside(self.path) as inside:
            for entry in self.manifest.expert_list:
                facts = self.manifest.files[entry.file]
                left -= facts.size
                if left < 0:
                    yield entry.name, lambda name=entry.name: self.read_expert(name)  # type: ignore[misc]
                    continue
                try:
                    data = inside.read(entry.file, facts.size)
                except OSError as error:
                    raise LimeEdgeError(f"{self.path}: {entry.file} {explain(error)}", DAMAGED) from None
                yield entry.name, self._keep(entry, facts, data)

    def _keep(self, entry: ExpertEntry, facts: FileEntry, data: bytes) -> Callable[[], Expert]:
        def load_expert() -> Expert:
            if len(data) != facts.size or hashlib.sha256(data).hexdigest() != facts.sha256:
                raise LimeEdgeError(f"{self.path / entry.file}: sha256 is another", DAMAGED)
            return self._parse(entry, data)

        return load_expert


def read_manifest(path: Path) -> bytes:
    """The bytes of a bundle's lime.json, as far as `LARGEST`.

    Raises:
        LimeEdgeError: no bundle, or not readable.
    """
    if not is_folder(path):
        hint = "a bundle is a directory written by lime-edge export"
        if (old := find_interrupted(path)) is not None:
            hint = f"a replacement was cut off: the bundle is now {old}; rename it, or export again"
        found = "not a bundle: it is a file" if path.is_file() else "no such bundle"
        raise LimeEdgeError(f"{path}: {found}", hint)
    try:
        with Inside(path) as inside:
            return inside.read(MANIFEST, LARGEST)
    except FileNotFoundError:
        hint = "write one with lime-edge export"
        raise LimeEdgeError(f"{path}: not a bundle: {MANIFEST} is missing", hint) from None
    except OSError as error:
        hint = "check its permissions, or copy the bundle again"
        raise LimeEdgeError(f"{path}: {MANIFEST} {explain(error)}", hint) from None


def _check_companion(inside: Inside, name: str, faults: Faults) -> None:
    """Note a configuration by which stock GenAI would run more than the bundle's graph (docs/security.md)."""
    try:
        data = inside.read(name, SMALL)
    except OSError as error:
        faults.add(f"{name} {explain(error)}")
        return
    for found in ["larger than any"] if len(data) > SMALL else find_code(data):
        faults.add(f"{name}: {found}: stock GenAI would load it")


def _check_file(inside: Inside, name: str, entry: FileEntry, hashed: bool, faults: Faults) -> Mark | None:
    """Note what is wrong with a file; its mark where its hash was compared and fits."""
    try:
        found = inside.stat(name)
        if found.st_size != entry.size:
            faults.add(f"{name}: size in bytes", entry.size, found.st_size)
        elif hashed and (digest := inside.hash(name)) != entry.sha256:
            faults.add(f"{name}: sha256", entry.sha256[:16], digest[:16])
        elif hashed:
            return mark_file(found, entry.sha256)
    except OSError as error:
        faults.add(f"{name} {explain(error)}")
    return None
