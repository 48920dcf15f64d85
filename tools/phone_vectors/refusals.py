"""Bundles and expert files that must be refused, made from one that is sound; Python refuses each of them here too."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

import lime_edge
from lime_edge.bundle.manifest import decode_manifest
from lime_edge.errors import LimeEdgeError
from phone_vectors.bundles import seal

Body = dict[str, Any]
MANIFESTS = 400


def write_refusals(sound: Path, foreign: Path, folder: Path) -> list[Body]:
    """Write folder/NAME.lime for every fault; says at which call each is refused, and by which kind of error.

    Args:
        sound: a bundle. foreign: one of another shared adapter with the same sites.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for name, (call, kind, damage) in FAULTS.items():
        target = folder / f"{name}.lime"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(sound, target)
        damage(target, foreign)
        cases.append({"name": name, "call": call, "kind": kind, "python": refuse(target, call)})
    return cases


def refuse(bundle: Path, call: str) -> str:
    """Python's own refusal of a damaged bundle."""
    try:
        session = lime_edge.open_decoder(bundle, threads=1)
        assert call != "open", f"{bundle} opened"
        if call == "install":
            session.install(bundle / "new.safetensors")
        else:
            session.use("expert1")
    except LimeEdgeError as error:
        return error.problem
    raise AssertionError(f"Python takes {bundle}")


def reseal(bundle: Path, change: Callable[[Body], None] | None = None) -> None:
    """Write lime.json anew: hashes and sizes as the files are now, `change` made, its own hash made to fit."""
    body = json.loads((bundle / "lime.json").read_text())
    for name, entry in body["files"].items():
        if (file := bundle / name).is_file():
            data = file.read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if change:
        change(body)
    (bundle / "lime.json").write_bytes(seal(body))


def find_expert(bundle: Path, name: str = "expert1") -> Path:
    """The file of an expert."""
    body = json.loads((bundle / "lime.json").read_text())
    return bundle / next(entry["file"] for entry in body["experts"] if entry["name"] == name)


def write_expert(
    file: Path, bundle: Path, change: Callable[[np.ndarray], np.ndarray] = lambda v: v, **header: str
) -> None:
    """An expert file like the bundle's expert1, with something changed."""
    body = json.loads((bundle / "lime.json").read_text())
    vector = load_file(find_expert(bundle))["expert"]
    facts = {"format": "lime-edge-expert", "schema": "2", "name": "expert1", "adapter_id": body["adapter_id"]}
    file.write_bytes(save({"expert": change(vector.copy())}, metadata=facts | header))


def _spoil(vector: np.ndarray, value: float) -> np.ndarray:
    vector[3] = value
    return vector


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _in_expert(change: Callable[[np.ndarray], np.ndarray] = lambda v: v, **header: str) -> Callable[[Path, Path], None]:
    def damage(bundle: Path, _: Path) -> None:
        write_expert(find_expert(bundle), bundle, change, **header)
        reseal(bundle)

    return damage


def _in_new(change: Callable[[np.ndarray], np.ndarray] = lambda v: v, **header: str) -> Callable[[Path, Path], None]:
    return lambda bundle, _: write_expert(bundle / "new.safetensors", bundle, change, **{"name": "new"} | header)


def _in_manifest(change: Callable[[Body], None]) -> Callable[[Path, Path], None]:
    return lambda bundle, _: reseal(bundle, change)


def _set(*path: Any) -> Callable[[Body], None]:
    """Set a field: keys on the way to it, its value last."""

    def change(body: Body) -> None:
        node: Any = body
        for key in path[:-2]:
            node = node[key]
        node[path[-2]] = path[-1]

    return change


def _link(bundle: Path, _: Path) -> None:
    file = find_expert(bundle)
    shutil.move(file, bundle / "moved")
    file.symlink_to("../moved")


def _nan_reference(bundle: Path, _: Path) -> None:
    file = bundle / "reference.safetensors"
    file.write_bytes(save({"reference": _spoil(load_file(file)["reference"], np.nan)}))
    reseal(bundle)


def _foreign_expert(bundle: Path, foreign: Path) -> None:
    shutil.copy(find_expert(foreign), find_expert(bundle))
    reseal(bundle)


def _cut(file: str) -> Callable[[Path, Path], None]:
    return lambda bundle, _: (bundle / file).write_bytes((bundle / file).read_bytes()[:-3])  # type: ignore[return-value]


def _cut_new(bundle: Path, foreign: Path) -> None:
    _in_new()(bundle, foreign)
    _cut("new.safetensors")(bundle, foreign)


def _older(body: Body) -> None:
    body["schema"] = 1


# name -> (the call that is refused, the sealed class of the error, what is done to the bundle)
FAULTS: dict[str, tuple[str, str, Callable[[Path, Path], Any]]] = {
    "no-manifest": ("open", "Missing", lambda bundle, _: (bundle / "lime.json").unlink()),
    "not-json": ("open", "Damaged", lambda bundle, _: (bundle / "lime.json").write_text("{")),
    "not-utf8": ("open", "Damaged", lambda bundle, _: (bundle / "lime.json").write_bytes(b'{"a": "\xff"}')),
    "another-format": ("open", "Damaged", _in_manifest(_set("format", "zip"))),
    "schema-1": ("open", "Unsupported", _in_manifest(_older)),
    "schema-3": ("open", "Unsupported", _in_manifest(_set("schema", 3))),
    "edited": ("open", "Damaged", lambda bundle, _: _edit(bundle)),
    "unknown-field": ("open", "Damaged", _in_manifest(_set("surprise", 1))),
    "wrong-type": ("open", "Damaged", _in_manifest(_set("backbone", "vocab", "300"))),
    "out-of-range": ("open", "Damaged", _in_manifest(_set("backbone", "layers", 1_000_000_000))),
    "path-outside": ("open", "Damaged", _in_manifest(_set("experts", 0, "file", "experts/../../x"))),
    "no-such-default": ("open", "Damaged", _in_manifest(_set("default", "nobody"))),
    "offsets": ("open", "Damaged", _in_manifest(_set("sites", 1, "offset", 1))),
    "missing-file": ("open", "Damaged", lambda bundle, _: (bundle / "reference.safetensors").unlink()),
    "cut-graph": ("open", "Damaged", _cut("onnx/model.onnx")),
    "flipped-graph": ("open", "Damaged", lambda bundle, _: _flip(bundle / "onnx/model.onnx")),
    "flipped-weights": ("open", "Damaged", lambda bundle, _: _flip(bundle / "onnx/model.onnx.data")),
    "flipped-tokenizer": ("open", "Damaged", lambda bundle, _: _flip(bundle / "tokenizer/tokenizer.json")),
    "linked-expert": ("open", "Damaged", _link),
    "nan-reference": ("open", "Damaged", _nan_reference),
    "flipped-expert": ("use", "Damaged", lambda bundle, _: _flip(find_expert(bundle))),
    "nan-expert": ("use", "Damaged", _in_expert(lambda v: _spoil(v, np.nan))),
    "infinite-expert": ("use", "Damaged", _in_expert(lambda v: _spoil(v, np.inf))),
    "short-expert": ("use", "Foreign", _in_expert(lambda v: v[:-1])),
    "foreign-expert": ("use", "Foreign", _foreign_expert),
    "renamed-expert": ("use", "Damaged", _in_expert(name="other")),
    "older-expert": ("use", "Unsupported", _in_expert(schema="1")),
    "double-expert": ("use", "Damaged", _in_expert(lambda v: v.astype(np.float64))),
    "install-nan": ("install", "Damaged", _in_new(lambda v: _spoil(v, np.nan))),
    "install-short": ("install", "Foreign", _in_new(lambda v: v[1:])),
    "install-foreign": ("install", "Foreign", _in_new(adapter_id="0" * 64)),
    "install-no-id": ("install", "Damaged", _in_new(adapter_id="")),
    "install-reserved": ("install", "Damaged", _in_new(name="routed")),
    "install-case": ("install", "Invalid", _in_new(name="Expert0")),
    "install-cut": ("install", "Damaged", _cut_new),
    "install-nothing": ("install", "Missing", lambda bundle, _: None),
}


def _edit(bundle: Path) -> None:
    file = bundle / "lime.json"
    file.write_text(file.read_text().replace('"device": "cpu"', '"device": "gpu"'))


def write_manifests(sound: Path) -> list[Body]:
    """Manifests with one to three things changed and their own hash made to fit: which of them Python takes."""
    draw, body = random.Random(3), json.loads((sound / "lime.json").read_text())
    cases = []
    for _ in range(MANIFESTS):
        mutated = copy.deepcopy(body)
        for _ in range(draw.randrange(1, 4)):
            mutate(mutated, draw)
        data = seal(mutated)
        try:
            decode_manifest(data, "lime.json")
            taken = True
        except LimeEdgeError:
            taken = False
        cases.append({"text": data.decode(), "taken": taken})
    assert 20 < sum(bool(case["taken"]) for case in cases) < MANIFESTS - 20, "both kinds must be there"
    return cases


def mutate(node: Any, draw: random.Random) -> None:
    """Change one thing somewhere in a document."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.85:
            node = node[key]
            continue
        break
    how = draw.randrange(5)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[draw.choice(["extra", "name", "file", "Vocab"])] = draw.choice([1, "x", None, [], {}])
    elif isinstance(node[key], (int, float)) and not isinstance(node[key], bool) and how < 4:
        node[key] = draw.choice([node[key] + 1, -1, 0, 2**31, 2**63, 1e300, 0.5, str(node[key])])
    elif isinstance(node[key], str) and how < 4:
        old = node[key]
        node[key] = draw.choice(
            [old + "x", old.upper(), old[:-1], "../" + old, old + "\n", "", "a" * 600, old.replace("/", "\\")]
        )
    else:
        node[key] = draw.choice([None, True, 1, 1.5, "text", [], {}, [[]], {"a": 1}])
