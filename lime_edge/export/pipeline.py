"""The export: checkpoint -> compiled model -> artifacts -> bundle. Needs the packages of a workstation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from msgspec import structs

from lime_edge.bundle.experts import NONE, ROUTED
from lime_edge.bundle.fields import Manifest
from lime_edge.bundle.golden import write_golden
from lime_edge.bundle.manifest import ALWAYS_ON
from lime_edge.bundle.staging import stage_directory
from lime_edge.bundle.vision.reading import write_processor
from lime_edge.compiler.compile import choose_rounding, fold_checkpoint, round_folded
from lime_edge.compiler.formats.activation import check_activation
from lime_edge.compiler.formats.adapter import Adapter
from lime_edge.compiler.formats.adapter_checks import CONFIG
from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.compiler.formats.checkpoint import Checkpoint
from lime_edge.compiler.formats.files import read_json
from lime_edge.compiler.formats.prequantized import refuse_prequantized
from lime_edge.compiler.formats.sketch import judge_vocabulary
from lime_edge.compiler.formats.vision import VisionBackbone
from lime_edge.compiler.kinds import ModelKind, find_kind, kind_of, read_checkpoint
from lime_edge.compiler.model.compiled import Compiled
from lime_edge.compiler.options import CompileOptions, Progress, check_fold
from lime_edge.compiler.rounding.spending import spend_bits
from lime_edge.errors import LimeEdgeError
from lime_edge.export.beside import (
    PREPROCESSOR,
    TOKENIZER,
    copy_preprocessor,
    copy_tokenizer,
    read_plainly,
    read_tokenizer,
)
from lime_edge.export.calibration import check_survival, find_calibration
from lime_edge.export.manifest import complete_bundle, describe
from lime_edge.export.size import check_size, plan_budget
from lime_edge.export.vision import make_processor
from lime_edge.targets.devices import Device
from lime_edge.targets.entries import DEFAULT
from lime_edge.targets.registry import Exporter, load_exporters

B = TypeVar("B", bound=Backbone)
C = TypeVar("C", bound=Compiled)


@dataclass(frozen=True)
class ExportOptions:
    """What to write besides how to compile.

    targets: keys of lime_edge.targets.registry. tokenizer: put it into the bundle. force: replace a bundle.
    calibration: JSONL of prompts for gptq; the built-in text otherwise. target_options: by target, for its exporter;
    its defaults otherwise. companions: names of what other engines want beside an artifact; nothing otherwise.
    any_backbone: take a backbone that the adapter was not trained on. default: what the bundle opens with, an expert,
    "none" or "routed"; the first expert otherwise.
    """

    targets: tuple[str, ...] = (DEFAULT,)
    tokenizer: bool = True
    force: bool = False
    calibration: Path | None = None
    target_options: Mapping[str, Any] = field(default_factory=dict)
    companions: tuple[str, ...] = ()
    any_backbone: bool = False
    default: str | None = None


def export_bundle(
    model: Path,
    adapter: Path,
    output: Path,
    compiling: CompileOptions,
    device: Device,
    options: ExportOptions,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Compile a checkpoint and write its bundle, or write nothing.

    Args:
        model: Hugging Face directory or GGUF file. adapter: LiME adapter directory.
        output: the bundle to appear. progress: called with (step, done, total).
    Raises:
        LimeEdgeError: faults of the checkpoint, the options or the storage.
    """
    refuse_prequantized(model)
    exporters = find_exporters(find_kind(model), compiling, options)
    check_names_early(adapter, compiling.fold, options.default)
    with stage_directory(output, replace=options.force) as stage:
        progress("read", 0, 1)
        checkpoint = read_checkpoint(model, adapter, options.any_backbone)
        check_default(checkpoint.adapter, compiling.single, options.default)
        if checkpoint.backbone.sees:
            copy_preprocessor(model, stage / PREPROCESSOR)
        if isinstance(checkpoint.backbone, VisionBackbone):
            write_processor(make_processor(checkpoint.backbone, model), stage)
        if checkpoint.backbone.reads_text and options.tokenizer:
            copy_tokenizer(model, stage / TOKENIZER)
            checkpoint = check_tokenizer(checkpoint, stage / TOKENIZER, options.any_backbone)
        progress("read", 1, 1)
        return fill_bundle(checkpoint, stage, compiling, device, options, progress, exporters)


def check_tokenizer(checkpoint: Checkpoint[B], tokenizer: Path, any_backbone: bool) -> Checkpoint[B]:
    """Refuse, or note, a tokenizer that the adapter was not trained with."""
    adapter, where = checkpoint.adapter, f"{checkpoint.adapter.path} does not fit {checkpoint.backbone.path}"
    fit = judge_vocabulary(checkpoint.fit, adapter.base_sketch, tokenizer, any_backbone, where)
    return replace(checkpoint, fit=fit)


def find_exporters(kind: ModelKind[Any, Any], compiling: CompileOptions, options: ExportOptions) -> dict[str, Exporter]:
    """The exporters of the wanted targets, which have agreed to their options."""
    return load_exporters(
        options.targets, options.target_options, compiling.quant, compiling.group, kind.name, options.companions
    )


def check_names_early(adapter: Path, fold: str, default: str | None) -> None:
    """Refuse an unknown expert to fold or to open with before anything large is read.

    Raises:
        LimeEdgeError: neither a policy nor one of the experts that the adapter's config names.
    """
    try:
        names = tuple(map(str, read_json(adapter / CONFIG)["expert_names"]))
    except (LimeEdgeError, KeyError, TypeError):
        return  # reading the adapter will say what is wrong with it
    check_fold(fold, names)
    if default not in (None, NONE, ROUTED, *names):
        raise LimeEdgeError(f"`default`: expected {NONE}, {ROUTED} or an expert, found {default!r}", ", ".join(names))


def check_default(adapter: Adapter, single: bool, default: str | None) -> None:
    """Refuse to open with what the bundle will not have.

    Raises:
        LimeEdgeError: routing of an adapter without it, or the original model where it cannot be had.
    """
    if default == ROUTED and (single or adapter.routing == "pinned"):
        raise LimeEdgeError("`default`: routed, but no graph will route", "name an expert, or none")
    if default == NONE and (single or adapter.variant.name in ALWAYS_ON):
        raise LimeEdgeError("`default`: none, but this adapter cannot be switched off", "name an expert")


def fill_bundle(
    checkpoint: Checkpoint[B],
    stage: Path,
    compiling: CompileOptions,
    device: Device,
    options: ExportOptions,
    progress: Progress = lambda *_: None,
    exporters: Mapping[str, Exporter] | None = None,
) -> Manifest:
    """Compile a checkpoint that is already read and complete its staged bundle.

    Args:
        stage: the temporary directory; its tokenizer/ is there, unless there is to be none.
        exporters: by target, where they are loaded already.
    """
    kind = kind_of(checkpoint.backbone)
    check_activation(checkpoint.adapter, read_plainly(stage / TOKENIZER), kind.holds_cache)
    targets, exporters = {}, exporters or find_exporters(kind, compiling, options)
    compiled, rounding = compile_and_measure(
        kind, checkpoint, compiling, options, stage / TOKENIZER, progress, exporters
    )
    for target, exporter in exporters.items():
        (stage / target).mkdir()
        facts = exporter.write(compiled, stage / target, progress)
        targets[target] = {"providers": list(device.providers), "threads": device.threads} | facts
    write_golden(stage, kind.ask(compiled, read_tokenizer(stage / TOKENIZER), progress))
    progress("hash", 0, 1)
    manifest = describe(kind, checkpoint, compiled, targets, device.name, rounding, options.default)
    beside = [exporter.write_companions(compiled, stage, manifest) for exporter in exporters.values()]
    manifest = structs.replace(manifest, companions=dict(item for found in beside for item in found.items()))
    manifest = complete_bundle(stage, manifest, compiled.experts, compiled.reference)
    check_size(stage, compiling, exporters)
    progress("hash", 1, 1)
    return manifest


def compile_and_measure(
    kind: ModelKind[B, C],
    checkpoint: Checkpoint[B],
    compiling: CompileOptions,
    options: ExportOptions,
    tokenizer: Path,
    progress: Progress,
    exporters: Mapping[str, Exporter],
) -> tuple[C, dict[str, Any]]:
    """The compiled model, and what the manifest says of its rounding. The float weights are gone afterwards.

    Args:
        tokenizer: its directory, which may not exist. exporters: by target, for what a matrix weighs there.
    """
    calibration = find_calibration(checkpoint, compiling, options.calibration, tokenizer)
    folded = fold_checkpoint(kind, checkpoint, compiling, progress)
    spent = None
    if compiling.spends:
        spent = spend_bits(
            folded, compiling, calibration, plan_budget(folded, compiling, exporters, tokenizer), progress
        )
    compiled = round_folded(kind, folded, compiling, calibration, progress, spent.weights if spent else None)
    rounding = choose_rounding(compiling, calibration)
    return compiled, {
        "rounding": rounding,
        "spending": spent.report if spent else None,
        "calibration": calibration.source if calibration and rounding == "gptq" else None,
        "survival": check_survival(kind, checkpoint, folded, compiled, compiling, calibration),
    }
