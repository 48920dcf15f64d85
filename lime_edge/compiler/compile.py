"""Checkpoint in, compiled model out: round the experts, fold, quantize. One way for every kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.compiler.formats.checkpoint import Checkpoint
from lime_edge.compiler.formats.decoder import DecoderBackbone
from lime_edge.compiler.formats.encoder import EncoderBackbone
from lime_edge.compiler.kinds import ModelKind, kind_of
from lime_edge.compiler.model.compiled import Branch, Compiled, CompiledModel, Stored, cut
from lime_edge.compiler.model.encoder import CompiledEncoder
from lime_edge.compiler.options import CompileOptions, Progress, check_fold
from lime_edge.compiler.rounding.calibrate import Calibration
from lime_edge.compiler.rounding.grams import collect_grams
from lime_edge.compiler.rounding.model import list_narrow, list_units, round_model
from lime_edge.errors import LimeEdgeError

B = TypeVar("B", bound=Backbone)
C = TypeVar("C", bound=Compiled)


@overload
def compile_checkpoint(
    checkpoint: Checkpoint[DecoderBackbone],
    options: CompileOptions,
    calibration: Calibration | None = None,
    progress: Progress = ...,
) -> CompiledModel: ...


@overload
def compile_checkpoint(
    checkpoint: Checkpoint[EncoderBackbone],
    options: CompileOptions,
    calibration: Calibration | None = None,
    progress: Progress = ...,
) -> CompiledEncoder: ...


@torch.no_grad()
def compile_checkpoint(
    checkpoint: Checkpoint[Any],
    options: CompileOptions,
    calibration: Calibration | None = None,
    progress: Progress = lambda *_: None,
) -> Any:
    """Compile for every target at once.

    Args:
        checkpoint: of any kind of model. calibration: what shows "gptq" the layers' inputs; without it int4 falls
            back to "search".
        progress: called with (step, done, total).
    Raises:
        LimeEdgeError: an unknown expert in options.fold, experts beyond float16, a variant that cannot be folded.
    """
    kind = kind_of(checkpoint.backbone)
    return round_folded(kind, fold_checkpoint(kind, checkpoint, options, progress), options, calibration, progress)


@torch.no_grad()
def fold_checkpoint(
    kind: ModelKind[B, C], checkpoint: Checkpoint[B], options: CompileOptions, progress: Progress = lambda *_: None
) -> C:
    """The folded model with all its experts and branches, weights still float32.

    Args: as `compile_checkpoint`.
    """
    adapter, half = checkpoint.adapter, options.quant != "none"
    padding = kind.place_padding(checkpoint, options.single)
    experts = round_experts(checkpoint, torch.float16 if half else torch.float32)
    p_ref = choose_reference(options.fold, experts)
    weights, vectors = checkpoint.backbone.split_state(adapter.sites.keys())
    branches = fold_sites(checkpoint, weights, vectors, p_ref, padding.folded, progress)
    scale_outputs(checkpoint.backbone.scales, weights, vectors, branches)
    if options.single and not adapter.variant.folds:  # one expert alone can be multiplied in
        scale_rows(checkpoint, weights, branches, experts[options.fold].float(), padding.folded)
    common = Compiled(
        weights=weights,
        vectors=vectors,
        branches={name: branch.round_half() for name, branch in branches.items()} if half else branches,
        sites=checkpoint.sites,
        reference=adapter.variant.reference_of(p_ref),
        experts=experts,
        fingerprint=checkpoint.backbone.fingerprint,
        fold=options.fold if adapter.variant.folds or options.single else "none",
        single=None,
        quant=options.quant,
        group=options.group,
        variant=adapter.variant,
        routing=None if adapter.routing == "pinned" else adapter.routing_config,
        pad_token_id=padding.skipped,
    )
    return kind.assemble(checkpoint, common)


@torch.no_grad()
def round_folded(
    kind: ModelKind[B, C],
    folded: C,
    options: CompileOptions,
    calibration: Calibration | None = None,
    progress: Progress = lambda *_: None,
    weights: Mapping[str, Stored] | None = None,
) -> C:
    """Quantize a folded model; of a single expert keep that one, without its branch.

    Args: as `compile_checkpoint`. weights: rounded already, where bits were spent by `rounding.spending`.
    """
    if weights is None:
        grams, used = {}, replace(options, rounding=choose_rounding(options, calibration))
        if used.rounding == "gptq" and calibration is not None:
            wanted = list_narrow(list_units(folded, options))
            grams = collect_grams(folded, kind.run(folded), calibration, wanted, progress) if wanted else {}
        weights = round_model(folded, used, grams, progress)
    model = replace(folded, weights=weights)
    if options.single:
        experts = {options.fold: model.experts[options.fold]}
        model = replace(model, branches={}, experts=experts, single=options.fold, routing=None)
    return model


def choose_rounding(options: CompileOptions, calibration: Calibration | None) -> str:
    """The rounding that is used: "gptq" needs calibration, and int8 has no use for it."""
    needs = options.rounding == "gptq" and options.quant == "int4"
    return "search" if options.rounding == "gptq" and not (needs and calibration) else options.rounding


def round_experts(checkpoint: Checkpoint[B], dtype: torch.dtype) -> dict[str, Tensor]:
    """Full vectors p (gamma * p_shared included), flat in site order, rounded to what is stored.

    Returns:
        name -> (sum_H,) of `dtype`.
    Raises:
        LimeEdgeError: a value beyond float16's range.
    """
    adapter = checkpoint.adapter
    per_site = [adapter.sites[site.name].vectors() for site in checkpoint.sites]
    flat = torch.cat(per_site, dim=1).to(dtype)
    if not torch.isfinite(flat).all():
        raise LimeEdgeError(
            f"{adapter.path}: an expert holds values beyond float16's range (65504)",
            "export with `quant=none`, which stores experts in float32",
        )
    return {name: flat[index].clone() for index, name in enumerate(adapter.expert_names)}


def choose_reference(fold: str, experts: Mapping[str, Tensor]) -> Tensor:
    """p_ref (sum_H,) float32: the mean of the stored experts, zeros, or one of them."""
    stacked = torch.stack([vector.float() for vector in experts.values()])
    if fold == "shared":
        return stacked.double().mean(0).float()
    if fold == "none":
        return torch.zeros(stacked.shape[1])
    check_fold(fold, tuple(experts))
    return experts[fold].float()


def fold_sites(
    checkpoint: Checkpoint[B],
    weights: dict[str, Tensor],
    vectors: dict[str, Tensor],
    p_ref: Tensor,
    pad: int | None,
    progress: Progress,
) -> dict[str, Branch]:
    """Fold every adapted layer into `weights` and `vectors`, in place.

    Args:
        p_ref: (sum_H,) float32. pad: an id whose row of an adapted table stays as it is, or None.
    Returns:
        What the experts multiply, by site.
    """
    adapter, branches = checkpoint.adapter, dict[str, Branch]()
    variant, scale = adapter.variant, adapter.scale
    sites = [site for site in checkpoint.sites if site.name in checkpoint.backbone.layers]
    for index, site in enumerate(sites):
        progress("fold", index, len(sites))
        part, key = adapter.sites[site.name], f"{site.name}.weight"
        reference = cut(site, p_ref)
        if part.embedding:
            table = variant.fold_embedding(part.join(weights[key]), reference, scale, pad)
            weights[key] = table.table
            branches[site.name] = Branch(table.branch_table, table.branch_b, table.modulated_columns)
            continue
        tensors = part.join(weights[key], vectors.get(f"{site.name}.bias"))
        folded = variant.fold_linear(tensors, reference, scale)
        weights[key] = folded.weight
        if folded.bias is not None:
            vectors[f"{site.name}.bias"] = folded.bias
        branches[site.name] = Branch(folded.branch_a, folded.branch_b, folded.modulated_rows)
    progress("fold", len(sites), len(sites))
    return branches


def scale_outputs(
    scales: Mapping[str, float], weights: dict[str, Tensor], vectors: dict[str, Tensor], branches: dict[str, Branch]
) -> None:
    """Multiply the constants of a family into its folded layers, in place.

    Exact for every expert: what a layer gives, its bias and its branch grow alike, and routing reads ratios.

    Args:
        scales: by module name; modules that are not there are passed over.
    """
    for name, scale in scales.items():
        for part, tensors in ((f"{name}.weight", weights), (f"{name}.weight", vectors), (f"{name}.bias", vectors)):
            if part in tensors:
                tensors[part] = tensors[part] * scale
        branch = branches.get(name)
        if branch is not None and branch.b is not None:
            branches[name] = replace(branch, b=branch.b * scale)


def scale_rows(
    checkpoint: Checkpoint[B],
    weights: dict[str, Tensor],
    branches: Mapping[str, Branch],
    vector: Tensor,
    pad: int | None,
) -> None:
    """Multiply SliceFine's rows by one expert, in place: that expert needs no multiplication at run time.

    Args:
        vector: p (sum_H,) float32. pad: an id whose row of an adapted table stays as it is, or None.
    """
    for site in checkpoint.sites:
        rows, key = branches[site.name].rows, f"{site.name}.weight"
        scale = torch.ones(site.width)
        scale[:rows] = cut(site, vector)[:rows]
        table = checkpoint.adapter.sites[site.name].embedding
        scaled = weights[key] * (scale if table else scale[:, None])
        if table and pad is not None:
            scaled[pad] = weights[key][pad]
        weights[key] = scaled
