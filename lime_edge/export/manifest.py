"""What lime.json says of an export, and the last files of a bundle."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from msgspec import structs

from lime_edge import __version__
from lime_edge.bundle.companions import ONNX_ADAPTER
from lime_edge.bundle.create import write_bundle
from lime_edge.bundle.experts import NONE, Expert
from lime_edge.bundle.fields import CoremlTarget, ExecutorchTarget, Manifest, OnnxTarget, Prompts
from lime_edge.bundle.identity import hash_adapter, hash_shared
from lime_edge.bundle.manifest import convert_facts
from lime_edge.bundle.prompts import TextCodec
from lime_edge.bundle.sites import SiteTable
from lime_edge.compiler.formats.adapter import Adapter
from lime_edge.compiler.formats.adapter_checks import WEIGHTS
from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.compiler.formats.chat import reduce_or_explain
from lime_edge.compiler.formats.checkpoint import Checkpoint
from lime_edge.compiler.formats.sketch import draw_sketch, hash_vocabulary
from lime_edge.compiler.formats.tokenizer import describe_tokenizer
from lime_edge.compiler.kinds import ModelKind
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import Compiled
from lime_edge.targets.genai import write_config

KINDS = {"onnx": OnnxTarget, "executorch": ExecutorchTarget, "coreml": CoremlTarget}
VERSIONED = ("torch", "transformers", "onnx", "onnxruntime", "optimum")
B = TypeVar("B", bound=Backbone)
C = TypeVar("C", bound=Compiled)


def describe(
    kind: ModelKind[B, C],
    checkpoint: Checkpoint[B],
    compiled: C,
    targets: Mapping[str, Mapping[str, Any]],
    device: str,
    rounding: dict[str, Any],
    default: str | None = None,
) -> Manifest:
    """The manifest of a compiled model, experts and files still missing.

    Args:
        targets: what every exporter says of its artifact. rounding: how the weights were rounded, and what survived.
        default: what the bundle opens with; None leaves the choice here.
    """
    model = kind.describe(checkpoint.backbone, compiled)
    sketch = structs.asdict(draw_sketch(checkpoint.backbone))
    fit = structs.asdict(checkpoint.fit)
    model["backbone"] |= {"fingerprint": compiled.fingerprint, "sketch": sketch, "fit": fit}
    return assemble(
        {
            "kind": kind.name,
            "adapter_id": identify(checkpoint.adapter, compiled.sites),
            "device": device,
            "adapter": describe_adapter(checkpoint.adapter, compiled),
            "quantization": describe_quantization(compiled, rounding),
            "default": default or choose_default(compiled),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        }
        | model,
        compiled,
        targets,
    )


def assemble(facts: dict[str, Any], compiled: Compiled, targets: Mapping[str, Mapping[str, Any]]) -> Manifest:
    """A manifest of plain facts, its sites, targets and companions added."""
    described = [describe_target(name, told, compiled.quant) for name, told in targets.items()]
    sites = [{"name": site.name, "width": site.width, "offset": site.offset} for site in compiled.sites]
    versions = {"lime_edge": __version__} | facts.get("versions", {})
    whole = {"sites": sites, "targets": described, "companions": describe_companions(described), "versions": versions}
    return convert_facts(Manifest, facts | whole)


def list_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """An adapter's tensors under their names in its file, as float32."""
    found = {}
    for name, site in adapter.sites.items():
        prompt = {part: getattr(site, part) for part in ("prompt_base", "prompt_delta", "input_proj")}
        for part, tensor in (site.tensors() | prompt).items():
            if tensor is not None:
                found[f"{name}.{part}"] = tensor.detach().float().numpy()
    return found


def identify(adapter: Adapter, sites: SiteTable) -> str:
    """adapter_id: what its experts fit."""
    return hash_adapter(adapter.variant.name, adapter.rank, adapter.alpha, sites, list_tensors(adapter))


def describe_adapter(adapter: Adapter, compiled: Compiled) -> dict[str, Any]:
    """Which shared adapter is in the weights, and how."""
    first = next(iter(compiled.experts.values()))
    return {
        "variant": adapter.variant.name,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "fold": compiled.fold,
        "single": compiled.single,
        "expert_dtype": str(first.numpy().dtype),
        "base": adapter.base_name,
        "routing": adapter.routing,
        "sha256": hashlib.sha256((Path(adapter.path) / WEIGHTS).read_bytes()).hexdigest(),
        "license": adapter.license,
        "shared_id": hash_shared(compiled.sites, list_tensors(adapter)),
    }


def describe_quantization(compiled: Compiled, rounding: dict[str, Any]) -> dict[str, Any]:
    """How many bits the weights have, and where they differ from what was asked for."""
    quantized = {name: t for name, t in compiled.weights.items() if isinstance(t, QuantizedTensor)}
    narrow = compiled.quant == "int4"
    return {
        "quant": compiled.quant,
        "group": compiled.group,
        "scheme": "symmetric",
        **rounding,
        "matrices": {f"int{bits}": sum(t.bits == bits for t in quantized.values()) for bits in (4, 8)},
        "weight_bytes": sum(t.nbytes() for t in quantized.values()),
        "fallback_int8": [name for name, t in quantized.items() if narrow and t.codes.shape[1] % compiled.group],
        "weight_hash": compiled.weight_hash(),
    }


def describe_target(name: str, told: Mapping[str, Any], quant: str) -> dict[str, Any]:
    """A target of the manifest, from what its exporter and the device say; what no reader runs by is its report."""
    fields = KINDS[name].__struct_fields__
    facts = {"target": name, "compute": "float32" if quant == "none" else "int8-dynamic"}
    facts |= {key: value for key, value in told.items() if key in fields}
    return facts | {"report": {key: value for key, value in told.items() if key not in facts}}


def describe_companions(targets: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """GenAI's files beside the ONNX graph, where it can run that."""
    for target in targets:
        if target["report"].get("genai"):
            form = ONNX_ADAPTER if target["expert_input"] else None
            return {"genai": {"target": target["target"], "folder": "onnx", "form": form}}
    return {}


def choose_default(compiled: Compiled) -> str:
    """What a bundle opens with: its single expert, or the first, or none."""
    return compiled.single or next(iter(compiled.experts), NONE)


def describe_tokens(tokenizer: Path, chats: bool) -> dict[str, Any]:
    """The manifest's `tokenizer` and `prompts`; nothing for a bundle without a tokenizer.

    Args:
        tokenizer: the staged bundle's folder; character classes are put beside the rest. chats: with prompts.
    """
    if not tokenizer.is_dir():
        return {}
    codec, prompts = TextCodec(tokenizer), None
    if chats and codec.template is not None:
        prompts = _reduce(codec.template, tuple(codec.special_names.items()))
    return {"tokenizer": describe_tokenizer(tokenizer), "prompts": prompts}


@cache
def _reduce(template: str, names: tuple[tuple[str, str], ...]) -> Prompts:
    """Some seconds of rendering: once for every template of a process."""
    return reduce_or_explain(template, dict(names))


def complete_bundle(
    stage: Path, manifest: Manifest, experts: Mapping[str, torch.Tensor], reference: torch.Tensor
) -> Manifest:
    """Write a staged bundle's last files: character classes, companions, experts, reference vector and lime.json.

    Args:
        manifest: without its experts, files and what is known of the tokenizer.
        experts: full vectors (sum_H,) as they are stored. reference: p_ref (sum_H,) float32.
    """
    tokenizer = stage / "tokenizer"
    manifest = structs.replace(manifest, **describe_tokens(tokenizer, manifest.decoder is not None))
    if manifest.backbone.sketch is not None:
        sketch = structs.replace(manifest.backbone.sketch, vocabulary=hash_vocabulary(tokenizer))
        manifest = structs.replace(manifest, backbone=structs.replace(manifest.backbone, sketch=sketch))
    write_config(stage, manifest)
    files = [Expert(name, vector.numpy(), manifest.adapter_id) for name, vector in experts.items()]
    return write_bundle(stage, manifest, files, reference.numpy())
