"""A manifest of a tiny bundle, whole and valid, for tests that change one thing in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.create import write_bundle
from lime_edge.bundle.experts import Expert
from lime_edge.bundle.fields import (
    AdapterFacts,
    Backbone,
    DecoderFacts,
    ExpertEntry,
    FileEntry,
    Manifest,
    Quantization,
    SiteEntry,
)
from lime_edge.bundle.manifest import MANIFEST, SEAL, seal_of
from lime_edge.bundle.sites import SiteTable
from lime_edge.bundle.staging import stage_directory
from lime_edge.targets.entries import OnnxFacts

HASH = "0123456789abcdef" * 4


def make_manifest(**changes: Any) -> Manifest:
    """Two experts on two sites (3 and 2 wide), one ONNX target; `changes` are fields of Manifest."""
    facts: dict[str, Any] = {
        "kind": "decoder",
        "adapter_id": HASH,
        "backbone": Backbone(name="tiny", family="llama", fingerprint=HASH, context=64, vocab=7, hidden=8, layers=1),
        "decoder": DecoderFacts(heads=4, kv_heads=2, head_dim=8, eos=(2,)),
        "adapter": AdapterFacts(variant="lora", rank=2, alpha=4.0, fold="shared", expert_dtype="float16"),
        "quantization": Quantization(
            quant="int4",
            group=32,
            scheme="symmetric",
            rounding="nearest",
            matrices={"int4": 3, "int8": 1},
            weight_bytes=99,
            weight_hash=HASH,
        ),
        "default": "one",
        "expert_list": tuple(ExpertEntry(name=name, file=f"experts/{name}.safetensors") for name in ("one", "two")),
        "target_list": (
            OnnxFacts(
                file="onnx/model.onnx",
                providers=("CPUExecutionProvider",),
                expert_input=True,
                compute="int8-dynamic",
                weight_hash=HASH,
                layers=1,
                opset=21,
            ),
        ),
        "site_list": (SiteEntry(name="model.a", width=3, offset=0), SiteEntry(name="model.b", width=2, offset=3)),
        "files": {
            name: FileEntry(size=5, sha256=HASH)
            for name in (
                "experts/one.safetensors",
                "experts/two.safetensors",
                "onnx/model.onnx",
                "reference.safetensors",
            )
        },
    }
    return Manifest(**(facts | changes))


SITES = SiteTable.from_widths([("model.a", 3), ("model.b", 2)])


def make_expert(name: str, value: float = 1.0) -> Expert:
    """An expert of `make_bundle`'s adapter, all numbers equal."""
    return Expert(name, np.full(5, value, np.float16), HASH)


def make_bundle(path: Path, names: tuple[str, ...] = ("one", "two"), **changes: Any) -> Path:
    """A bundle with a graph of five bytes; p_ref is 0 1 2 3 4, experts are 1, 2, ... all over."""
    manifest = make_manifest(expert_list=(), files={}, **{"default": names[0]} | changes)
    experts = [make_expert(name, index + 1) for index, name in enumerate(names)]
    with stage_directory(path) as stage:
        (stage / "onnx").mkdir()
        (stage / "onnx" / "model.onnx").write_bytes(b"graph")
        write_bundle(stage, manifest, experts, np.arange(5, dtype=np.float32))
    return path


def expert_path(bundle: Path, name: str) -> Path:
    """Where a bundle keeps an expert."""
    return bundle / Bundle.open(bundle).manifest.expert_files[name]


def add_coreml(bundle: Path) -> None:
    """Give a decoder's bundle an entry for Core ML, whose package is one file without meaning."""
    package = bundle / "coreml/model.mlpackage/Manifest.json"
    package.parent.mkdir(parents=True)
    package.write_text("{}")

    def add(body: dict[str, Any]) -> None:
        (onnx,) = (target for target in body["targets"] if target["target"] == "onnx")
        common = {key: value for key, value in onnx.items() if key not in ("opset", "functions")}
        own: dict[str, Any] = {
            "target": "coreml",
            "file": "coreml/model.mlpackage",
            "compute": "float16",
            "minimum": "iOS18",
        }
        own |= {"compute_units": "all", "max_length": 1024, "lengths": [1, 32, 128], "providers": ["CoreML"]}
        own |= {"routed": "routed" if onnx["routed"] else None}
        body["targets"].append(common | own)
        body["files"]["coreml/model.mlpackage/Manifest.json"] = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}

    reseal(bundle, add)


def reseal(bundle: Path, edit: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Change a bundle's lime.json and make every hash in it fit what is there."""
    body = json.loads((bundle / MANIFEST).read_text())
    for name, entry in body["files"].items():
        if (bundle / name).is_file():
            data = (bundle / name).read_bytes()
            entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    edit(body)
    (bundle / MANIFEST).write_bytes(seal(body))


def seal(body: dict[str, Any]) -> bytes:
    """The bytes of a lime.json whose own hash is made to fit, whatever the body says."""
    data = json.dumps(body, indent=1).encode()
    return SEAL.sub(lambda found: found[1] + seal_of(data).encode() + found[3], data, count=1)
