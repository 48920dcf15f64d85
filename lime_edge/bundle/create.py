"""A new bundle's manifest, experts and reference vector, put beside its artifacts in the staged directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import save

from lime_edge.bundle.companions import ORIGINAL, encode_expert
from lime_edge.bundle.experts import Expert, ExpertBank
from lime_edge.bundle.fields import Companion, ExpertEntry, FileEntry, Manifest
from lime_edge.bundle.inside import Inside
from lime_edge.bundle.manifest import ALWAYS_ON, EXPERTS, MANIFEST, REFERENCE, encode_manifest
from lime_edge.errors import LimeEdgeError


def write_bundle(stage: Path, manifest: Manifest, experts: Sequence[Expert], reference: np.ndarray) -> Manifest:
    """Complete a staged bundle: experts, reference vector, companions' experts, file table and lime.json.

    Args:
        stage: the temporary directory, everything else in it.
        manifest: without its experts and files. reference: p_ref (sum_H,) float32.
    Raises:
        LimeEdgeError: values that no target holds, a link, or a manifest that contradicts itself.
    """
    bank = ExpertBank(manifest.sites.total, manifest.adapter_id, reference)
    written = {REFERENCE: save({"reference": np.ascontiguousarray(reference, np.float32)})}
    for expert in experts:
        bank.install(expert)
        written[f"{EXPERTS}{expert.name}.safetensors"] = expert.to_bytes()
    residuals = {expert.name: expert.vector.astype(np.float32) - reference for expert in experts}
    if manifest.adapter.variant not in ALWAYS_ON:
        residuals[ORIGINAL] = -reference
    companions = {}
    for key, companion in manifest.companions.items():
        files = _encode_companion(companion, residuals)
        companions[key] = msgspec.structs.replace(companion, experts={name: path for name, (path, _) in files.items()})
        written |= dict(files.values())
    with Inside(stage) as inside:
        for path, data in written.items():
            inside.create(path, data)
    complete = msgspec.structs.replace(
        manifest,
        companions=companions,
        expert_list=tuple(ExpertEntry(name=e.name, file=f"{EXPERTS}{e.name}.safetensors") for e in experts),
        files=_describe_files(stage),
    )
    (stage / MANIFEST).write_bytes(encode_manifest(complete))
    return complete


def _encode_companion(companion: Companion, residuals: Mapping[str, np.ndarray]) -> dict[str, tuple[str, bytes]]:
    """By expert: path and bytes; none for a companion that holds no experts."""
    if companion.form is None:
        return {}
    return {
        name: (f"{companion.folder}/{name}.{companion.form}", encode_expert(companion.form, residual))
        for name, residual in residuals.items()
    }


def _describe_files(stage: Path) -> dict[str, FileEntry]:
    """Size and sha256 of everything in a staged bundle."""
    files = {}
    with Inside(stage) as inside:
        for file in sorted(stage.rglob("*")):
            if file.is_dir() and not file.is_symlink():
                continue
            path = file.relative_to(stage).as_posix()
            try:
                files[path] = FileEntry(size=inside.stat(path).st_size, sha256=inside.hash(path))
            except OSError as error:
                raise LimeEdgeError(f"{file}: {error.strerror}", "a bundle holds plain files only") from None
    return files
