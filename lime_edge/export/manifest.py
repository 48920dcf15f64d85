"""What lime.json says of an export, and the last files of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from msgspec import structs

from lime_edge.bundle.create import write_bundle
from lime_edge.bundle.experts import Expert
from lime_edge.bundle.fields import Backbone as BackboneFacts
from lime_edge.bundle.fields import DecoderFacts, EncoderFacts, Manifest, Quantization, SiteEntry, VisionFacts
from lime_edge.bundle.manifest import convert_facts
from lime_edge.bundle.vision.reading import FILE as PROCESSOR
from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.compiler.formats.checkpoint import Checkpoint
from lime_edge.compiler.formats.sketch import draw_sketch, hash_vocabulary
from lime_edge.compiler.kinds import ModelKind
from lime_edge.compiler.model.compiled import Compiled
from lime_edge.export.beside import TOKENIZER
from lime_edge.export.describe import (
    choose_default,
    describe_adapter,
    describe_sites,
    describe_targets,
    describe_tokens,
    describe_versions,
    describe_weights,
    identify,
)

# of each kind: fields of the manifest that are its own
OWN_FACTS: dict[str, dict[str, Any]] = {
    "decoder": {"decoder": DecoderFacts},
    "encoder": {"encoder": EncoderFacts},
    "vision-language": {"decoder": DecoderFacts, "vision": VisionFacts},
}
B = TypeVar("B", bound=Backbone)
C = TypeVar("C", bound=Compiled)


def describe(
    kind: ModelKind[B, C],
    checkpoint: Checkpoint[B],
    compiled: C,
    targets: dict[str, dict[str, Any]],
    device: str,
    rounding: dict[str, Any],
    default: str | None = None,
) -> Manifest:
    """The manifest of a compiled model, experts and files still missing.

    Args:
        targets: what every exporter says of its artifact. rounding: how the weights were rounded, and what survived.
        default: what the bundle opens with; None leaves the choice here.
    """
    adapter, facts = checkpoint.adapter, kind.describe(checkpoint.backbone, compiled)
    shared = {key: value for key, value in facts.items() if key in BackboneFacts.__struct_fields__}
    own = {
        field: convert_facts(kind_of, {key: value for key, value in facts.items() if key in kind_of.__struct_fields__})
        for field, kind_of in OWN_FACTS[kind.name].items()
    }
    shared |= {
        "fingerprint": compiled.fingerprint,
        "sketch": structs.asdict(draw_sketch(checkpoint.backbone)),
        "fit": structs.asdict(checkpoint.fit),
    }
    weights = describe_weights(compiled.weights, compiled.quant, compiled.group)
    return Manifest(
        kind=kind.name,  # type: ignore[arg-type]
        adapter_id=identify(adapter, compiled.sites),
        device=device,
        backbone=convert_facts(BackboneFacts, shared),
        **own,
        adapter=describe_adapter(adapter, compiled.sites, compiled.fold, compiled.single, compiled.experts),
        quantization=convert_facts(Quantization, weights | rounding | {"weight_hash": compiled.weight_hash()}),
        default=choose_default(compiled.experts, default, compiled.single, adapter.variant.name),
        activation=adapter.activation,
        target_list=describe_targets(targets, compiled.quant),
        versions=describe_versions(),
        site_list=convert_facts(tuple[SiteEntry, ...], describe_sites(compiled.sites)),
    )


def complete_bundle(
    stage: Path, manifest: Manifest, experts: Mapping[str, torch.Tensor], reference: torch.Tensor
) -> Manifest:
    """Write a staged bundle's last files: character classes, companions, experts, reference vector and lime.json.

    Args:
        manifest: without its experts, files and what is known of the tokenizer.
        experts: full vectors p (sum_H,) as they are stored. reference: p_ref (sum_H,) float32.
    """
    tokenizer = stage / TOKENIZER
    manifest = structs.replace(manifest, **describe_tokens(tokenizer, manifest.decoder is not None))
    if (sketch := manifest.backbone.sketch) is not None:
        sketch = structs.replace(sketch, vocabulary=hash_vocabulary(tokenizer))
        manifest = structs.replace(manifest, backbone=structs.replace(manifest.backbone, sketch=sketch))
    if manifest.vision is not None and (stage / PROCESSOR).is_file():
        manifest = structs.replace(manifest, vision=structs.replace(manifest.vision, processor=PROCESSOR))
    files = [Expert(name, vector.numpy(), manifest.adapter_id) for name, vector in experts.items()]
    return write_bundle(stage, manifest, files, reference.numpy())
