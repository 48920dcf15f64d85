"""The export: checkpoint -> compiled model -> artifacts -> bundle. Needs the packages of a workstation."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lime_edge import __version__
from lime_edge.bundle.bundle import Manifest, hash_file, write_bundle
from lime_edge.bundle.experts import Expert
from lime_edge.bundle.golden import write_golden
from lime_edge.bundle.prompts import TextCodec
from lime_edge.bundle.staging import stage_directory
from lime_edge.compiler.compile import CompileOptions, check_fold, choose_rounding, compile_checkpoint, fold_checkpoint
from lime_edge.compiler.formats.adapter_checks import CONFIG, WEIGHTS
from lime_edge.compiler.formats.backbone import find_gguf, quiet
from lime_edge.compiler.formats.checkpoint import Checkpoint, read_checkpoint
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.model.oracle import ask_decoder
from lime_edge.compiler.rounding.calibrate import (
    Calibration,
    Grams,
    built_in_calibration,
    collect_grams,
    read_calibration,
    render_exchange,
    vocabulary_words,
)
from lime_edge.compiler.rounding.survival import choose_sequences, list_groups, measure_survival, summarize
from lime_edge.errors import LimeEdgeError
from lime_edge.targets.devices import Device
from lime_edge.targets.options import TargetOptions
from lime_edge.targets.registry import load_exporters

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
VERSIONED = ("torch", "transformers", "onnx", "onnxruntime")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportOptions:
    """What to write besides how to compile.

    targets: keys of lime_edge.targets.registry. tokenizer: put it into the bundle. force: replace a bundle.
    calibration: JSONL of prompts for gptq; the built-in text otherwise. target_options: for the exporters.
    """

    targets: tuple[str, ...] = ("onnx",)
    tokenizer: bool = True
    force: bool = False
    calibration: Path | None = None
    target_options: TargetOptions = field(default_factory=TargetOptions)


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
    load_exporters(options.targets, options.target_options, compiling.quant, compiling.group)
    check_fold_early(adapter, compiling.fold)
    with stage_directory(output, replace=options.force) as stage:
        progress("read", 0, 1)
        checkpoint = read_checkpoint(model, adapter)
        if options.tokenizer:
            copy_tokenizer(model, stage / "tokenizer")
        progress("read", 1, 1)
        return fill_bundle(checkpoint, stage, compiling, device, options, progress)


def check_fold_early(adapter: Path, fold: str) -> None:
    """Refuse an unknown expert in `--fold` before anything large is read.

    Raises:
        LimeEdgeError: neither a policy nor one of the experts that the adapter's config names.
    """
    try:
        names = tuple(map(str, json.loads((adapter / CONFIG).read_text(encoding="utf-8"))["expert_names"]))
    except (OSError, ValueError, KeyError, TypeError):
        return  # reading the adapter will say what is wrong with it
    check_fold(fold, names)


def fill_bundle(
    checkpoint: Checkpoint,
    stage: Path,
    compiling: CompileOptions,
    device: Device,
    options: ExportOptions,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Compile a checkpoint that is already read and complete its staged bundle.

    Args:
        stage: the temporary directory; its tokenizer/ is there, unless options.tokenizer is False.
    """
    calibration = find_calibration(checkpoint, compiling, options, stage / "tokenizer")
    compiled = compile_checkpoint(checkpoint, compiling, calibration, progress)
    survival = check_survival(checkpoint, compiled, compiling, calibration, stage / "tokenizer", progress)
    targets = {}
    exporters = load_exporters(options.targets, options.target_options, compiling.quant, compiling.group)
    for target, exporter in exporters.items():
        (stage / target).mkdir()
        facts = exporter.export(compiled, stage / target, options.target_options, progress)
        targets[target] = {"providers": list(device.providers), "threads": device.threads} | facts
    write_golden(stage, ask_decoder(compiled, find_encoder(stage / "tokenizer"), progress))
    progress("hash", 0, 1)
    rounding = {
        "rounding": choose_rounding(compiling, calibration),
        "calibration": calibration.source if calibration else None,
        "survival": survival,
    }
    manifest = describe(checkpoint, compiled, targets, device.name, rounding)
    manifest = complete_bundle(stage, manifest, compiled.experts, compiled.reference)
    progress("hash", 1, 1)
    return manifest


def find_encoder(tokenizer: Path) -> Callable[[str], list[int]] | None:
    """Text to token ids as the model reads them, special tokens added; None for a bundle without a tokenizer."""
    return partial(TextCodec(tokenizer).encode, add_special_tokens=True) if tokenizer.is_dir() else None


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


def find_calibration(
    checkpoint: Checkpoint, compiling: CompileOptions, options: ExportOptions, tokenizer: Path
) -> Calibration | None:
    """The sequences that gptq looks at: the user's file, else the built-in text; None where not needed.

    Raises:
        LimeEdgeError: a bad file, or a file and no tokenizer to read it with.
    """
    if compiling.quant != "int4" or compiling.rounding != "gptq":
        return None
    if not options.tokenizer:
        if options.calibration:
            raise LimeEdgeError("--calibration needs the tokenizer", "leave --no-tokenizer out")
        return None
    if options.calibration:
        return read_calibration(options.calibration, TextCodec(tokenizer).encode, checkpoint.adapter.expert_names)
    return write_calibration(tokenizer)


def write_calibration(tokenizer: Path) -> Calibration:
    """The built-in text in a model's own words and template."""
    codec = TextCodec(tokenizer)
    template = partial(codec.render_chat, open_turn=False) if codec.can_chat else None
    words = vocabulary_words(codec.vocabulary())
    return built_in_calibration(codec.encode, render_exchange(template), words)


def check_survival(
    checkpoint: Checkpoint,
    compiled: CompiledModel,
    compiling: CompileOptions,
    calibration: Calibration | None,
    tokenizer: Path,
    progress: Progress,
) -> dict[str, Any] | None:
    """How much of the experts' effect the rounded weights still hold, for the manifest; None in float32."""
    wanted = list_groups(compiled)
    if compiled.quant == "none" or not wanted:
        return None
    if calibration is None and tokenizer.is_dir():
        calibration = write_calibration(tokenizer)
    folded = fold_checkpoint(checkpoint, compiling, progress)
    shown, grams = choose_sequences(calibration), Grams()
    if shown is not None:
        grams = collect_grams(folded, shown, wanted)
    gptq = choose_rounding(compiling, calibration) == "gptq"
    sites = measure_survival(checkpoint.backbone.tensors, folded, compiled, grams, gptq)
    return summarize(sites, shown.source if shown else None) if sites else None


def describe(
    checkpoint: Checkpoint,
    compiled: CompiledModel,
    targets: dict[str, dict[str, Any]],
    device: str,
    rounding: dict[str, Any],
) -> Manifest:
    """The manifest of a compiled model, experts and files still missing."""
    decoder, adapter = compiled.decoder, checkpoint.adapter
    quantized = [t for t in compiled.weights.values() if isinstance(t, QuantizedTensor)]
    fallbacks = [
        name
        for name, t in compiled.weights.items()
        if isinstance(t, QuantizedTensor) and compiled.quant == "int4" and t.codes.shape[1] % compiled.group
    ]
    first = next(iter(compiled.experts.values()))
    return Manifest(
        fingerprint=compiled.fingerprint,
        model={
            "name": checkpoint.backbone.name,
            "family": decoder.family,
            "context": decoder.context,
            "vocab": decoder.vocab,
            "hidden": decoder.hidden,
            "layers": len(decoder.layers),
            "heads": decoder.heads,
            "kv_heads": decoder.kv_heads,
            "head_dim": decoder.head_dim,
            "eos": list(checkpoint.backbone.eos),
        },
        adapter={
            "variant": adapter.variant,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "fold": compiled.fold,
            "single": compiled.single,
            "expert_dtype": str(np.dtype(first.numpy().dtype)),
            "base": adapter.base_name,
            "sha256": hash_file(Path(adapter.path) / WEIGHTS).sha256,
            "shared_vector": any(site.shared is not None for site in adapter.sites.values()),
        },
        quantization={
            "quant": compiled.quant,
            "group": compiled.group,
            "scheme": "symmetric",
            **rounding,
            "matrices": {f"int{bits}": sum(t.bits == bits for t in quantized) for bits in (4, 8)},
            "weight_bytes": sum(t.nbytes() for t in quantized),
            "fallback_int8": fallbacks,
            "weight_hash": compiled.weight_hash(),
        },
        sites=compiled.sites,
        experts=(),
        targets=targets,
        files={},
        device=device,
        versions={"lime_edge": __version__} | {name: importlib.metadata.version(name) for name in VERSIONED},
    )


def copy_tokenizer(model: Path, directory: Path) -> None:
    """Put what a device needs to tokenize into `directory`.

    Raises:
        LimeEdgeError: the model has no tokenizer.
    """
    from transformers import AutoTokenizer

    directory.mkdir()
    gguf = find_gguf(model)
    hint = "add tokenizer.json to the model directory, or pass --no-tokenizer to feed token ids only"
    if gguf is None and (model / "tokenizer.json").is_file():
        for name in TOKENIZER_FILES:
            if (model / name).is_file():
                shutil.copyfile(model / name, directory / name)
        return
    if gguf is None and not (model / "tokenizer.model").is_file():
        raise LimeEdgeError(f"{model}: tokenizer.json is missing", hint)
    source = gguf.parent if gguf else model
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                source, gguf_file=gguf.name if gguf else None, local_files_only=True
            )
            tokenizer.save_pretrained(directory)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise LimeEdgeError(f"{source}: no readable tokenizer: {error}", hint) from None
    if not (directory / "tokenizer.json").is_file():
        raise LimeEdgeError(f"{source}: the tokenizer has no fast (tokenizer.json) form", hint)
