"""What lime.json says of an export, and the last files of a bundle."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from lime_edge import __version__
from lime_edge.bundle.bundle import Manifest, hash_file, write_bundle
from lime_edge.bundle.experts import Expert
from lime_edge.compiler.formats.adapter import Adapter
from lime_edge.compiler.formats.adapter_checks import WEIGHTS
from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.compiler.formats.checkpoint import Checkpoint
from lime_edge.compiler.kinds import ModelKind
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import Compiled

VERSIONED = ("torch", "transformers", "onnx", "onnxruntime", "optimum")
B = TypeVar("B", bound=Backbone)
C = TypeVar("C", bound=Compiled)


def describe(
    kind: ModelKind[B, C],
    checkpoint: Checkpoint[B],
    compiled: C,
    targets: dict[str, dict[str, Any]],
    device: str,
    rounding: dict[str, Any],
) -> Manifest:
    """The manifest of a compiled model, experts and files still missing.

    Args:
        targets: what every exporter says of its artifact. rounding: how the weights were rounded, and what survived.
    """
    return Manifest(
        fingerprint=compiled.fingerprint,
        model=kind.describe(checkpoint.backbone, compiled),
        adapter=describe_adapter(checkpoint.adapter, compiled),
        quantization=describe_quantization(compiled, rounding),
        sites=compiled.sites,
        experts=(),
        targets=targets,
        files={},
        device=device,
        versions={"lime_edge": __version__} | {name: importlib.metadata.version(name) for name in VERSIONED},
    )


def describe_adapter(adapter: Adapter, compiled: Compiled) -> dict[str, Any]:
    """Which shared adapter is in the weights, and how."""
    first = next(iter(compiled.experts.values()))
    return {
        "variant": adapter.variant.name,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "fold": compiled.fold,
        "single": compiled.single,
        "expert_dtype": str(np.dtype(first.numpy().dtype)),
        "base": adapter.base_name,
        "sha256": hash_file(Path(adapter.path) / WEIGHTS).sha256,
        "shared_vector": any(site.shared is not None for site in adapter.sites.values()),
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


def complete_bundle(
    stage: Path, manifest: Manifest, experts: Mapping[str, torch.Tensor], reference: torch.Tensor
) -> Manifest:
    """Write a staged bundle's experts, reference vector and lime.json.

    Args:
        manifest: without its experts and files. experts: full vectors (sum_H,) as they are stored.
        reference: p_ref (sum_H,) float32.
    """
    files = [Expert(n, v.numpy(), manifest.fingerprint, manifest.sites.hash) for n, v in experts.items()]
    return write_bundle(stage, manifest, files, reference.numpy())
