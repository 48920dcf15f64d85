"""Checkpoint in, compiled model out: round the experts, fold, quantize."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lime_edge.bundle.sites import SiteTable
from lime_edge.compiler.formats.adapter_checks import PROMPT
from lime_edge.compiler.formats.checkpoint import Checkpoint
from lime_edge.compiler.maths.fold import fold_embedding, fold_linear, fold_reference
from lime_edge.compiler.maths.quantize import INT4_GROUP
from lime_edge.compiler.model.compiled import EMBEDDING, Branch, CompiledModel, VirtualTokens
from lime_edge.compiler.rounding.calibrate import Calibration
from lime_edge.compiler.rounding.model import INT8_KINDS, KINDS, ROUNDINGS, quantize_model
from lime_edge.errors import LimeEdgeError

QUANTS = {"none": 0, "int8": 8, "int4": 4}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CompileOptions:
    """How to compile.

    quant: "int4", "int8" or "none". group: elements per int4 scale along the input axis.
    fold: "shared", "none" or an expert's name. single: emit that fold without branches.
    rounding: "nearest", "search" or "gptq". int8_kinds: what an int4 model keeps at
    int8: some of KINDS.
    """

    quant: str = "int4"
    group: int = INT4_GROUP
    fold: str = "shared"
    single: bool = False
    rounding: str = "gptq"
    int8_kinds: tuple[str, ...] = INT8_KINDS

    def __post_init__(self) -> None:
        if self.quant not in QUANTS:
            raise LimeEdgeError(
                f"--quant: expected {', '.join(QUANTS)}, found {self.quant!r}",
                "int4 is the smallest, int8 more exact, none keeps float32",
            )
        if self.rounding not in ROUNDINGS:
            raise LimeEdgeError(
                f"--rounding: expected {', '.join(ROUNDINGS)}, found {self.rounding!r}",
                "gptq (calibrated) is the most exact for int4",
            )
        if unknown := [kind for kind in self.int8_kinds if kind not in KINDS]:
            raise LimeEdgeError(
                f"--keep-int8: expected none or some of {', '.join(KINDS)}, found {', '.join(unknown)}",
                "for example --keep-int8 head,qkv,down; none makes the smallest bundle",
            )
        if not 16 <= self.group <= 256 or self.group & (self.group - 1):
            raise LimeEdgeError(
                f"--group-size: expected a power of two from 16 to 256, found {self.group}",
                "32 suits every target; larger groups are smaller and less exact",
            )
        if self.single and self.fold in ("shared", "none"):
            raise LimeEdgeError(
                "--single needs --fold NAME: one expert is folded and no other can be used",
                "for example --fold movie --single; without --single all experts stay",
            )


def compile_checkpoint(
    checkpoint: Checkpoint,
    options: CompileOptions,
    calibration: Calibration | None = None,
    progress: Progress = lambda *_: None,
) -> CompiledModel:
    """Compile for every target at once.

    Args:
        calibration: what shows "gptq" the layers' inputs; without it int4 falls back to "search".
        progress: called with (step, done, total).
    Raises:
        LimeEdgeError: unknown expert in --fold, a variant that cannot be folded.
    """
    model = fold_checkpoint(checkpoint, options, progress)
    if bits := QUANTS[options.quant]:
        rounding = choose_rounding(options, calibration)
        weights = quantize_model(model, bits, options.group, rounding, calibration, progress, options.int8_kinds)
        model = replace(model, weights=weights)
    if options.single:
        experts = {options.fold: model.experts[options.fold]}
        model = replace(model, branches={}, experts=experts, single=options.fold, routing=None)
    return model


def choose_rounding(options: CompileOptions, calibration: Calibration | None) -> str:
    """The rounding that is used: "gptq" needs calibration, and int8 has no use for it."""
    needs = options.rounding == "gptq" and options.quant == "int4"
    return "search" if options.rounding == "gptq" and not (needs and calibration) else options.rounding


def fold_checkpoint(checkpoint: Checkpoint, options: CompileOptions, progress: Progress) -> CompiledModel:
    """The folded model with all its experts and branches, weights still float32."""
    adapter, backbone = checkpoint.adapter, checkpoint.backbone
    if (
        EMBEDDING in adapter.sites
        and adapter.pad_token_id is not None
        and (adapter.variant == "slicefine" or adapter.routing != "pinned")
    ):
        raise LimeEdgeError(
            f"{adapter.path}: an embedding site that leaves pad_token_id alone cannot be exported "
            "with SliceFine or with routing",
            "remove pad_token_id from the adapter",
        )
    stored = torch.float32 if options.quant == "none" else torch.float16
    experts = stored_experts(checkpoint, stored)
    reference = fold_reference(adapter.variant, reference_vector(options.fold, experts))
    virtual = fold_prompt(checkpoint, reference) if adapter.variant == "prompt_tuning" else None
    weights, vectors, branches = _fold(checkpoint, reference, progress)
    if stored is torch.float16:
        branches = {name: round_branch(branch) for name, branch in branches.items()}
    fold = options.fold
    if adapter.variant == "slicefine":  # nothing folds, but one expert alone can be multiplied in
        fold = options.fold if options.single else "none"
        if options.single:
            scale_rows(weights, branches, checkpoint.sites, experts[options.fold].float())
    return CompiledModel(
        decoder=backbone.decoder,
        weights=dict(weights),
        vectors=vectors,
        branches=branches,
        sites=checkpoint.sites,
        reference=reference,
        experts=experts,
        fingerprint=checkpoint.fingerprint,
        fold=fold,
        single=None,
        quant=options.quant,
        group=options.group,
        variant=adapter.variant,
        routing=None if adapter.routing == "pinned" else adapter.routing_config,
        virtual=virtual,
    )


def fold_prompt(checkpoint: Checkpoint, reference: torch.Tensor) -> VirtualTokens:
    """Fold p_ref into the virtual tokens: base' = base + p_ref * delta, so base' + d * delta for every expert."""
    site = checkpoint.adapter.sites[PROMPT]
    assert site.prompt_base is not None and site.prompt_delta is not None
    base = (site.prompt_base.double() + reference.double() * site.prompt_delta.double()).float()
    return VirtualTokens(base, site.prompt_delta, site.prompt_base, checkpoint.adapter.conditioning, site.input_proj)


def scale_rows(
    weights: dict[str, torch.Tensor], branches: dict[str, Branch], sites: SiteTable, vector: torch.Tensor
) -> None:
    """Multiply SliceFine's rows by one expert, in place: that expert needs no multiplication at run time."""
    for site in sites:
        rows, key = branches[site.name].rows, f"{site.name}.weight"
        scale = torch.ones(site.width)
        scale[:rows] = vector[site.offset : site.offset + rows]
        weights[key] = weights[key] * (scale if site.name == EMBEDDING else scale[:, None])


def stored_experts(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
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
            "export with --quant none, which stores experts in float32",
        )
    return {name: flat[index].clone() for index, name in enumerate(adapter.expert_names)}


def round_branch(branch: Branch) -> Branch:
    """A and B as float16 holds them, so that half of their bytes say it all; still float32 here.

    First a power of two moves from one to the other (exactly), so that both are equally far from float16's ends.
    """
    if branch.a is None or branch.b is None:
        return branch
    largest = [max(float(matrix.abs().max()), 1e-30) for matrix in (branch.a, branch.b)]
    shift = 2.0 ** round(math.log2(largest[1] / largest[0]) / 2)
    a, b = (branch.a * shift).half().float(), (branch.b / shift).half().float()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return branch  # an adapter out of all proportion stays as it is
    return replace(branch, a=a, b=b)


def check_fold(fold: str, names: Sequence[str]) -> None:
    """Refuse what `--fold` cannot mean.

    Raises:
        LimeEdgeError: neither a policy nor one of the experts.
    """
    if fold not in ("shared", "none", *names):
        raise LimeEdgeError(
            f"--fold: expected shared, none or an expert's name, found {fold!r}",
            f"experts of this adapter: {', '.join(names)}",
        )


def reference_vector(fold: str, experts: dict[str, torch.Tensor]) -> torch.Tensor:
    """p_ref (sum_H,) float32: the mean of the stored experts, zeros, or one of them."""
    stacked = torch.stack([vector.float() for vector in experts.values()])
    if fold == "shared":
        return stacked.double().mean(0).float()
    if fold == "none":
        return torch.zeros(stacked.shape[1])
    check_fold(fold, tuple(experts))
    return experts[fold].float()


def _fold(
    checkpoint: Checkpoint, reference: torch.Tensor, progress: Progress
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Branch]]:
    adapter = checkpoint.adapter
    weights: dict[str, torch.Tensor] = {}
    vectors: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint.backbone.tensors.items():
        (weights if tensor.ndim == 2 else vectors)[name] = tensor
    branches: dict[str, Branch] = {}
    for index, site in enumerate(checkpoint.sites):
        progress("fold", index, len(checkpoint.sites))
        if site.name == PROMPT:
            continue
        part, key = adapter.sites[site.name], f"{site.name}.weight"
        p_ref = reference[site.offset : site.offset + site.width]
        if part.embedding:
            if checkpoint.backbone.decoder.tied:  # the head keeps the old table
                weights["lm_head.weight"] = weights[key]
            table = fold_embedding(adapter.variant, part.join(weights[key]), p_ref, adapter.scale, adapter.pad_token_id)
            weights[key] = table.table
            branches[site.name] = Branch(table.branch_table, table.branch_b, table.modulated_columns)
            continue
        tensors = part.join(weights[key], vectors.get(f"{site.name}.bias"))
        folded = fold_linear(adapter.variant, tensors, p_ref, adapter.scale)
        weights[key] = folded.weight
        if folded.bias is not None:
            vectors[f"{site.name}.bias"] = folded.bias
        branches[site.name] = Branch(folded.branch_a, folded.branch_b, folded.modulated_rows)
    progress("fold", len(checkpoint.sites), len(checkpoint.sites))
    return weights, vectors, branches
