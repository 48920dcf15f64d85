"""lime.json: read, checked against itself, written. Its fields are in `lime_edge.bundle.fields`."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import msgspec

from lime_edge.bundle.fields import FORMAT, SCHEMA, Manifest
from lime_edge.bundle.names import RESERVED, check_name, check_path, find_clashes
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.targets.facts import TargetFacts

MANIFEST = "lime.json"
REFERENCE = "reference.safetensors"
EXPERTS = "experts/"
LARGEST = 16 << 20  # bytes of lime.json: what is larger is not read
LARGEST_TOKEN = 16 << 20  # bytes of its keys and values in float32; 1 MiB in the largest models there are
LONGEST = 1 << 28  # numbers in an expert vector
SEAL = re.compile(rb'("manifest_sha256": ")([0-9a-f]{64})(")')
ALWAYS_ON = ("dora", "slicefine", "prompt_tuning")  # variants: no p gives the original model back
DAMAGED = "the bundle is damaged: copy or export it again"


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of lime.json, its own hash filled in.

    Raises:
        LimeEdgeError: the manifest contradicts itself.
    """
    with Faults(MANIFEST, "a bug in what wrote it: please report it") as faults:
        find_contradictions(manifest, faults)
    blank = msgspec.structs.replace(manifest, manifest_sha256="0" * 64)
    text = msgspec.json.format(msgspec.json.encode(blank), indent=1) + b"\n"
    try:
        msgspec.json.decode(text, type=Manifest)  # what is made in memory is not checked by the types
    except ValueError as error:
        raise LimeEdgeError(f"{MANIFEST}: {error}", "a bug in what wrote it: please report it") from None
    return SEAL.sub(lambda found: found[1] + hashlib.sha256(text).hexdigest().encode() + found[3], text, count=1)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """What the bytes of a lime.json say.

    Raises:
        LimeEdgeError: not a bundle, another schema, damaged, a field that is missing, unknown, of another type or out
            of range, or one that contradicts another.
    """
    if len(data) > LARGEST:
        raise LimeEdgeError(f"{where}: expected at most {LARGEST} bytes, found {len(data)}", DAMAGED)
    _check_schema(data, where)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (ValueError, RecursionError) as error:
        raise LimeEdgeError(f"{where}: {error}", DAMAGED) from None
    if seal_of(data) != manifest.manifest_sha256:
        raise LimeEdgeError(
            f"{where}: manifest_sha256 does not fit its text",
            "the bundle is damaged or was edited by hand: copy or export it again",
        )
    with Faults(where, DAMAGED) as faults:
        find_contradictions(manifest, faults)
    return manifest


def seal_of(data: bytes) -> str:
    """manifest_sha256 as it should be: sha256 over the file with 64 zeros where that field's digits are."""
    return hashlib.sha256(SEAL.sub(rb"\g<1>" + b"0" * 64 + rb"\g<3>", data, count=1)).hexdigest()


def convert_facts(kind: Any, facts: Any) -> Any:
    """A part of the manifest from plain values, as an exporter gives them.

    Raises:
        LimeEdgeError: a fact that is missing, unknown or out of range.
    """
    try:
        return msgspec.convert(facts, kind)
    except msgspec.ValidationError as error:
        raise LimeEdgeError(f"{MANIFEST}: {kind}: {error}", "a bug in what wrote it: please report it") from None


class _Head(msgspec.Struct):
    """What tells a bundle and its schema, whatever else is there."""

    format: Any = None
    schema: Any = None


def _check_schema(data: bytes, where: str) -> None:
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (ValueError, RecursionError) as error:
        raise LimeEdgeError(f"{where}: not readable JSON: {error}", DAMAGED) from None
    if head.format != FORMAT:
        raise LimeEdgeError(f"{where}: not a lime-edge bundle", "write one with lime-edge export")
    if head.schema != SCHEMA or isinstance(head.schema, bool):
        older = isinstance(head.schema, int) and head.schema < SCHEMA
        raise LimeEdgeError(
            f"{where}: schema: expected {SCHEMA}, found {json.dumps(head.schema)[:20]}",
            "export again: older bundles are not read" if older else "upgrade lime-edge on this device",
        )


def find_contradictions(manifest: Manifest, faults: Faults) -> None:
    """Note what one field says against another, and names that no bundle may hold."""
    _check_files(manifest, faults)
    _check_sites(manifest, faults)
    _check_experts(manifest, faults)
    _check_kind(manifest, faults)
    for target in manifest.target_list:
        _check_target(manifest, target, faults)
    _check_selections(manifest, faults)
    _check_beside(manifest, faults)


def _check_files(manifest: Manifest, faults: Faults) -> None:
    for path in manifest.files:
        if problem := check_path(path):
            faults.add(f"files: {problem}")
        elif path.lower() == MANIFEST:
            faults.add(f"files: {path} is the manifest itself")
    for clash in find_clashes(manifest.files):
        faults.add(f"files: {clash}")
    if REFERENCE not in manifest.files:
        faults.add(f"files: {REFERENCE} is missing")


def _check_sites(manifest: Manifest, faults: Faults) -> None:
    offset, names = 0, set()
    for site in manifest.site_list:
        if site.offset != offset:
            faults.add(f"site {site.name}: offset", offset, site.offset)
            break
        offset += site.width
        if site.name in names:
            faults.add(f"site {site.name} is there twice")
        names.add(site.name)
    if offset > LONGEST:
        faults.add("sites: numbers in an expert vector", f"at most {LONGEST}", offset)


def _check_experts(manifest: Manifest, faults: Faults) -> None:
    folded: set[str] = set()
    for entry in manifest.expert_list:
        if problem := check_name(entry.name):
            faults.add(f"experts: {problem}")
        if entry.name.lower() in folded:
            faults.add(f"experts: {entry.name!r} is there twice (letter case does not count)")
        folded.add(entry.name.lower())
        if not entry.file.startswith(EXPERTS):
            faults.add(f"expert {entry.name!r}: file", f"below {EXPERTS}", entry.file)
        elif entry.file not in manifest.files:
            faults.add(f"expert {entry.name!r} has no file entry")
    if len({entry.file for entry in manifest.expert_list}) != len(manifest.expert_list):
        faults.add("experts: two of them share a file")
    single = manifest.adapter.single
    if single is not None and [entry.name for entry in manifest.expert_list] != [single]:
        faults.add("experts of a bundle with a single one", [single], [entry.name for entry in manifest.expert_list])


def _check_kind(manifest: Manifest, faults: Faults) -> None:
    facts = {"decoder": manifest.decoder, "encoder": manifest.encoder, "vision": manifest.vision}
    wanted = {"vision-language": ("decoder", "vision")}.get(manifest.kind, (manifest.kind,))
    for name, found in facts.items():
        if (found is not None) != (name in wanted):
            faults.add(
                f"{name}: {'missing in' if name in wanted else 'has no place in'} a bundle of kind {manifest.kind}"
            )
    if (vision := manifest.vision) is not None:
        for token in vision.image_tokens:
            if token >= manifest.backbone.vocab:
                faults.add("vision: image_tokens", f"ids below {manifest.backbone.vocab}", token)
        if vision.processor is not None and vision.processor not in manifest.files:
            faults.add(f"vision: {vision.processor} has no file entry")
    if (decoder := manifest.decoder) is not None:
        if decoder.heads % decoder.kv_heads:
            faults.add("decoder: heads", f"a multiple of kv_heads ({decoder.kv_heads})", decoder.heads)
        for token in decoder.eos:
            if token >= manifest.backbone.vocab:
                faults.add("decoder: eos", f"ids below {manifest.backbone.vocab}", token)
        for name in ("context", "vocab"):
            if getattr(manifest.backbone, name) < 1:
                faults.add(f"backbone: {name}", "at least 1", 0)
        if (token := 8 * manifest.backbone.layers * decoder.kv_heads * decoder.head_dim) > LARGEST_TOKEN:
            faults.add("decoder: bytes of a token in the cache", f"at most {LARGEST_TOKEN}", token)


def _check_target(manifest: Manifest, target: TargetFacts, faults: Faults) -> None:
    where = f"target {target.target}"
    for path in target.list_paths():
        if not path.startswith(f"{target.target}/"):
            faults.add(f"{where}: file", f"below {target.target}/", path)
        elif path not in manifest.files and not any(file.startswith(f"{path}/") for file in manifest.files):
            faults.add(f"{where}: {path} has no file entry")
    if target.expert_input == (manifest.adapter.single is not None):
        faults.add(f"{where}: expert_input", manifest.adapter.single is None, target.expert_input)
    if (target.vision is None) == (manifest.kind == "vision-language"):
        faults.add(f"{where}: vision: {'missing' if target.vision is None else 'has no place'} in {manifest.kind}")
    if manifest.kind == "encoder":
        given = manifest.encoder
        if given is not None and ([i.name for i in target.inputs], target.outputs) != ([*given.inputs], given.outputs):
            faults.add(f"{where}: inputs and outputs are not the encoder's")
        told = {size for entry in target.inputs if not entry.default for size in entry.shape}
        for entry in target.inputs:
            if unknown := [size for size in entry.shape if isinstance(size, str) and size not in told]:
                faults.add(f"{where}: input {entry.name}: no input that must be given says its {unknown[0]}")
    else:
        if target.virtual_tokens >= max(manifest.backbone.context, 1):
            faults.add(f"{where}: virtual_tokens", f"fewer than {manifest.backbone.context}", target.virtual_tokens)
        if target.layers != manifest.backbone.layers:
            faults.add(f"{where}: layers", manifest.backbone.layers, target.layers)
    for field in target.needs["encoder" if manifest.kind == "encoder" else "decoder"]:
        if not getattr(target, field):
            faults.add(f"{where}: {field} is missing")


def _check_selections(manifest: Manifest, faults: Faults) -> None:
    """Which selections the fields name: does the bundle hold them?"""
    names, routed = {entry.name for entry in manifest.expert_list}, any(t.routed for t in manifest.target_list)
    default, always_on = manifest.default, manifest.adapter.variant in ALWAYS_ON
    if default not in names | set(RESERVED):
        faults.add("default", f"an expert, {' or '.join(RESERVED)}", default)
    if default == "routed" and not routed:
        faults.add("default: routed, but no target has a routed graph")
    if default == "none" and (always_on or manifest.adapter.single is not None):
        faults.add("default: none, but the adapter cannot be switched off")
    if manifest.activation.__struct_config__.tag == "generation_prompt":
        if always_on or manifest.adapter.single is not None or manifest.kind == "encoder":
            faults.add("activation: generation_prompt, but the adapter cannot be switched off")
        opening = manifest.prompts.opening if manifest.prompts is not None and manifest.prompts.roles else None
        text = manifest.activation.text  # type: ignore[union-attr]
        if None not in (opening, text) and opening != text:
            faults.add("activation: text is not the opening of the assistant's turn")


def _check_beside(manifest: Manifest, faults: Faults) -> None:
    """Prompts, tokenizer and companions."""
    names = {entry.name for entry in manifest.expert_list}
    if (prompts := manifest.prompts) is not None and bool(prompts.roles) == (prompts.reason is not None):
        faults.add("prompts", "roles, or the reason why there are none", "both" if prompts.roles else "neither")
    if (tokenizer := manifest.tokenizer) is not None:
        for path in (tokenizer.file, tokenizer.classes):
            if path is not None and path not in manifest.files:
                faults.add(f"tokenizer: {path} has no file entry")
    targets = {target.target for target in manifest.target_list}
    if len(targets) != len(manifest.target_list):
        faults.add("targets: one is there twice")
    for name, companion in manifest.companions.items():
        if companion.target not in targets:
            faults.add(f"companion {name}: target", " or ".join(sorted(targets)), companion.target)
        if unknown := sorted(companion.experts.keys() - names - set(RESERVED)):
            faults.add(f"companion {name}: no such experts: {', '.join(unknown[:5])}")
        for path in companion.experts.values():
            if not path.startswith(f"{companion.folder}/"):
                faults.add(f"companion {name}: file", f"below {companion.folder}/", path)
            elif path not in manifest.files:
                faults.add(f"companion {name}: {path} has no file entry")
