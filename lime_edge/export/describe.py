"""The manifest of a compiled model, from what the compiler and the exporters say. Experts and files come last."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lime_edge import __version__
from lime_edge.bundle.fields import AdapterFacts, Prompts
from lime_edge.bundle.identity import hash_adapter, hash_shared
from lime_edge.bundle.manifest import ALWAYS_ON, convert_facts
from lime_edge.bundle.prompts import TextCodec
from lime_edge.bundle.sites import SiteTable
from lime_edge.compiler.formats.adapter import Adapter
from lime_edge.compiler.formats.adapter_checks import WEIGHTS
from lime_edge.compiler.formats.chat import reduce_or_explain
from lime_edge.compiler.formats.tokenizer import describe_tokenizer
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.targets.entries import TARGETS
from lime_edge.targets.facts import TargetFacts

VERSIONED = ("torch", "transformers", "onnx", "onnxruntime", "optimum")


def describe_versions() -> dict[str, str]:
    """Versions of the packages that make a bundle."""
    return {"lime_edge": __version__} | {name: importlib.metadata.version(name) for name in VERSIONED}


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


def describe_adapter(
    adapter: Adapter, sites: SiteTable, fold: str, single: str | None, experts: Mapping[str, torch.Tensor]
) -> AdapterFacts:
    """The manifest's `adapter`."""
    return AdapterFacts(
        variant=adapter.variant.name,  # type: ignore[arg-type]
        rank=adapter.rank,
        alpha=float(adapter.alpha),
        fold=fold,
        single=single,
        expert_dtype=str(next(iter(experts.values())).numpy().dtype),  # type: ignore[arg-type]
        base=adapter.base_name,
        routing=adapter.routing,
        sha256=hashlib.sha256((Path(adapter.path) / WEIGHTS).read_bytes()).hexdigest(),
        shared_id=hash_shared(sites, list_tensors(adapter)),
        license=adapter.license,
    )


def describe_weights(weights: Mapping[str, Any], quant: str, group: int) -> dict[str, Any]:
    """What the manifest's `quantization` says of the stored matrices."""
    quantized = {name: t for name, t in weights.items() if isinstance(t, QuantizedTensor)}
    narrow = quant == "int4"
    return {
        "quant": quant,
        "group": group,
        "scheme": "symmetric",
        "matrices": {f"int{bits}": sum(t.bits == bits for t in quantized.values()) for bits in (4, 8)},
        "weight_bytes": sum(t.nbytes() for t in quantized.values()),
        "fallback_int8": [name for name, t in quantized.items() if narrow and t.codes.shape[1] % group],
    }


def describe_targets(targets: Mapping[str, Mapping[str, Any]], quant: str) -> tuple[TargetFacts, ...]:
    """The manifest's `targets`, from what the exporters and the device say; what no reader runs by is their report."""
    found = []
    for name, facts in targets.items():
        kind = TARGETS[name].facts
        known = {"target": name, "compute": "float32" if quant == "none" else "int8-dynamic"}
        known |= {key: value for key, value in facts.items() if key in kind.__struct_fields__}
        report = {key: value for key, value in facts.items() if key not in known}
        found.append(convert_facts(kind, known | {"report": report}))
    return tuple(found)


def describe_sites(sites: SiteTable) -> list[dict[str, Any]]:
    """The manifest's `sites`."""
    return [{"name": site.name, "width": site.width, "offset": site.offset} for site in sites]


def choose_default(names: Iterable[str], wanted: str | None, single: str | None, variant: str) -> str:
    """What the bundle opens with: what was asked for, else its single expert, else the first."""
    return wanted or single or next(iter(names), "none" if variant not in ALWAYS_ON else "")


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
