"""The bundle: the directory that `lime-edge export` writes and every runtime opens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from lime_edge.bundle.experts import Expert, ExpertBank, check_name, read_expert
from lime_edge.bundle.residual import Subtract, subtract_reference
from lime_edge.bundle.sites import SiteTable
from lime_edge.bundle.staging import write_file
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.targets.genai import adapter_file, encode_adapter, takes_adapters, write_genai

FORMAT = "lime-edge-bundle"
SCHEMA = 1
MANIFEST = "lime.json"
REFERENCE = "reference.safetensors"


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: size in bytes and sha256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What lime.json says.

    model: name, family, context (tokens), vocab, layers, kv_heads, head_dim, eos (token ids);
    adapter: variant, rank, alpha, fold, single, expert_dtype, sha256 of its file; quantization: quant,
    group, rounding, weight_hash, what fell back, how much of the effect survived; targets: per target its
    file and how to run it; versions: of the packages that made it.
    """

    fingerprint: str
    model: dict[str, Any]
    adapter: dict[str, Any]
    quantization: dict[str, Any]
    sites: SiteTable
    experts: tuple[str, ...]
    targets: dict[str, dict[str, Any]]
    files: dict[str, FileEntry] = field(repr=False)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    added: tuple[str, ...] = ()  # experts added or replaced after the export

    def to_json(self) -> str:
        """The text of lime.json."""
        body = {
            "format": FORMAT,
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "adapter": self.adapter,
            "quantization": self.quantization,
            "device": self.device,
            "experts": list(self.experts),
            "added": list(self.added),
            "targets": self.targets,
            "versions": self.versions,
            "sites": [asdict(site) for site in self.sites],
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
        }
        return json.dumps(body, indent=1) + "\n"


def expert_file(name: str) -> str:
    """Where a bundle keeps an expert."""
    return f"experts/{name}.safetensors"


def read_manifest(path: Path) -> Manifest:
    """Read and check lime.json.

    Raises:
        LimeEdgeError: not a bundle, damaged, or of a newer schema.
    """
    file = path / MANIFEST
    if not path.is_dir():
        raise LimeEdgeError(f"{path}: no such bundle", "a bundle is a directory written by lime-edge export")
    if not file.is_file():
        raise LimeEdgeError(f"{path}: not a bundle: {MANIFEST} is missing", "write one with lime-edge export")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LimeEdgeError(f"{file}: not readable JSON: {error}", "the bundle is damaged: copy it again") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise LimeEdgeError(f"{file}: not a lime-edge bundle", "write one with lime-edge export")
    if not isinstance(body.get("schema"), int) or body["schema"] > SCHEMA:
        raise LimeEdgeError(
            f"{file}: schema: expected at most {SCHEMA}, found {body.get('schema')}", "upgrade lime-edge on this device"
        )
    try:
        widths = [(site["name"], site["width"]) for site in body["sites"]]
        return Manifest(
            fingerprint=body["fingerprint"],
            model=body["model"],
            adapter=body["adapter"],
            quantization=body["quantization"],
            device=body["device"],
            versions=body["versions"],
            sites=SiteTable.from_widths(widths),
            experts=tuple(body["experts"]),
            targets=body["targets"],
            files={name: FileEntry(**entry) for name, entry in body["files"].items()},
            added=tuple(body.get("added", ())),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise LimeEdgeError(f"{file}: damaged: {error!r}", "copy the bundle again") from None


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return FileEntry(size, digest.hexdigest())


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: manifest checked, sizes checked; tensors are read when asked for."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, verify: bool = False) -> Bundle:
        """Open a bundle.

        Args:
            verify: also compare the sha256 of every file.
        Raises:
            LimeEdgeError: missing, foreign, newer or damaged; every damaged file is named.
        """
        path = Path(path)
        manifest = read_manifest(path)
        with Faults(str(path), "the bundle is damaged: copy or export it again") as faults:
            for name, entry in manifest.files.items():
                file = path / name
                if not file.is_file():
                    faults.add(f"{name} is missing")
                elif file.stat().st_size != entry.size:
                    faults.add(f"{name}: size in bytes", entry.size, file.stat().st_size)
                elif verify and (found := hash_file(file).sha256) != entry.sha256:
                    faults.add(f"{name}: sha256", entry.sha256[:16], found[:16])
            for name in manifest.experts:
                if expert_file(name) not in manifest.files:
                    faults.add(f"{MANIFEST}: expert {name!r} has no file entry")
        return cls(path, manifest)

    @property
    def total_bytes(self) -> int:
        """Size of every file listed, in bytes."""
        return sum(entry.size for entry in self.manifest.files.values())

    def read_reference(self) -> np.ndarray:
        """p_ref (sum_H,) float32."""
        file = self.path / REFERENCE
        try:
            reference = load_file(file)["reference"]
        except (SafetensorError, OSError, KeyError) as error:
            raise LimeEdgeError(f"{file}: damaged: {error}", "copy the bundle again") from None
        if reference.shape != (self.manifest.sites.total,):
            raise LimeEdgeError(
                f"{file}: length: expected {self.manifest.sites.total}, found {reference.shape}",
                "copy the bundle again",
            )
        return reference

    def open_bank(self, subtract: Subtract | None = None) -> ExpertBank:
        """The bundle's experts, read and checked.

        Args:
            subtract: how p - p_ref is computed, where an engine brings something faster than numpy.
        """
        reference = self.read_reference()
        bank = ExpertBank(self.manifest.sites, self.manifest.fingerprint, reference, subtract or subtract_reference)
        for name in self.manifest.experts:
            file = self.path / expert_file(name)
            expert = read_expert(file)
            if expert.name != name:
                raise LimeEdgeError(
                    f"{file}: name: expected {name!r}, found {expert.name!r}",
                    "the file was renamed: add it with lime-edge experts add --name",
                )
            bank.install(expert, str(file))
        return bank

    def add_expert(self, expert: Expert, replace_existing: bool = False) -> Bundle:
        """Write an expert into the bundle: its files first, then the manifest.

        Raises:
            LimeEdgeError: it does not fit, its name is taken, or nothing can be written.
        """
        self.check_expert(expert, replace_existing)
        name = expert.name
        written = {expert_file(name): expert.to_bytes()}
        if takes_adapters(self.manifest.targets):
            residual = expert.vector.astype(np.float32) - self.read_reference()
            written[adapter_file(name)] = encode_adapter(residual)
        for file, data in written.items():
            write_file(self.path / file, data)
        entries = {file: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for file, data in written.items()}
        names = tuple(n for n in self.manifest.experts if n != name) + (name,)
        added = tuple(n for n in self.manifest.added if n != name) + (name,)
        return self._rewrite(names, self.manifest.files | entries, added)

    def check_expert(self, expert: Expert, replace_existing: bool = False) -> None:
        """Refuse what `add_expert` would refuse; nothing is written."""
        name = expert.name
        if problem := check_name(name):
            raise LimeEdgeError(problem, "pass --name with another one")
        if name in self.manifest.experts and not replace_existing:
            raise LimeEdgeError(f"{self.path}: expert {name!r} exists already", "pass --force or --name OTHER")
        if single := self.manifest.adapter.get("single"):
            raise LimeEdgeError(
                f"{self.path} was exported with --single {single}: it holds one expert only",
                "export it without --single",
            )
        bank = ExpertBank(self.manifest.sites, self.manifest.fingerprint, self.read_reference())
        bank.check(expert, f"expert {name!r}")

    def remove_expert(self, name: str) -> Bundle:
        """Take an expert out of the bundle: the manifest first, then its files."""
        if name not in self.manifest.experts:
            known = ", ".join(self.manifest.experts)
            raise LimeEdgeError(f"{self.path}: unknown expert {name!r}", f"experts: {known}")
        own = (expert_file(name), adapter_file(name))
        files = {n: e for n, e in self.manifest.files.items() if n not in own}
        kept, added = (tuple(n for n in names if n != name) for names in (self.manifest.experts, self.manifest.added))
        changed = self._rewrite(kept, files, added)
        for file in own:
            (self.path / file).unlink(missing_ok=True)
        return changed

    def _rewrite(self, experts: tuple[str, ...], files: dict[str, FileEntry], added: tuple[str, ...]) -> Bundle:
        manifest = replace(self.manifest, experts=experts, files=files, added=added)
        write_file(self.path / MANIFEST, manifest.to_json().encode())
        return Bundle(self.path, manifest)


def write_bundle(stage: Path, manifest: Manifest, experts: Iterable[Expert], reference: np.ndarray) -> Manifest:
    """Complete a staged bundle: experts, reference vector, file table and lime.json.

    Args:
        stage: the temporary directory, artifacts and tokenizer already in it.
        manifest: without its `experts` and `files`. reference: p_ref (sum_H,) float32.
    """
    (stage / "experts").mkdir()
    vectors = {}
    for expert in experts:
        (stage / expert_file(expert.name)).write_bytes(expert.to_bytes())
        vectors[expert.name] = expert.vector
    (stage / REFERENCE).write_bytes(save({"reference": np.ascontiguousarray(reference, np.float32)}))
    write_genai(stage, manifest, vectors, reference)
    files = {
        str(file.relative_to(stage).as_posix()): hash_file(file) for file in sorted(stage.rglob("*")) if file.is_file()
    }
    complete = replace(manifest, experts=tuple(vectors), files=files)
    (stage / MANIFEST).write_text(complete.to_json(), encoding="utf-8")
    return complete
