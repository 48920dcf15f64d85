"""The export of encoders and vision models: checkpoint to bundle, as `lime_edge.export.decoder` does for decoders."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lime_edge import __version__
from lime_edge.bundle.bundle import Manifest, hash_file
from lime_edge.bundle.golden import write_golden
from lime_edge.bundle.prompts import TextCodec
from lime_edge.bundle.staging import stage_directory
from lime_edge.compiler.compile import CompileOptions
from lime_edge.compiler.compile_encoder import CompiledEncoder, EncoderCalibration, compile_encoder
from lime_edge.compiler.formats.adapter_checks import WEIGHTS
from lime_edge.compiler.formats.encoder import EncoderBackbone, EncoderCheckpoint, is_encoder, read_encoder_checkpoint
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.oracle import ask_encoder
from lime_edge.compiler.rounding.calibrate import (
    built_in_calibration,
    read_calibration,
    render_exchange,
    vocabulary_words,
)
from lime_edge.errors import LimeEdgeError
from lime_edge.export.decoder import (
    VERSIONED,
    ExportOptions,
    Progress,
    check_fold_early,
    complete_bundle,
    copy_tokenizer,
    find_encoder,
)
from lime_edge.session.kinds import ENCODER
from lime_edge.targets.devices import Device
from lime_edge.targets.registry import load_exporters

__all__ = ["export_encoder_bundle", "is_encoder"]
PREPROCESSOR = "preprocessor_config.json"


def export_encoder_bundle(
    model: Path,
    adapter: Path,
    output: Path,
    compiling: CompileOptions,
    device: Device,
    options: ExportOptions,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Compile an encoder checkpoint and write its bundle, or write nothing.

    Args:
        model: Hugging Face directory. adapter: LiME adapter directory. output: the bundle to appear.
        progress: called with (step, done, total).
    Raises:
        LimeEdgeError: faults of the checkpoint, the options or the storage.
    """
    exporters = load_exporters(options.targets, options.target_options, compiling.quant, compiling.group, "encoder")
    check_fold_early(adapter, compiling.fold)
    with stage_directory(output, replace=options.force) as stage:
        progress("read", 0, 1)
        checkpoint = read_encoder_checkpoint(model, adapter)
        _copy_beside(checkpoint.backbone, model, stage, options)
        progress("read", 1, 1)
        calibration = _find_calibration(checkpoint, compiling, options, stage / "tokenizer")
        compiled = compile_encoder(checkpoint, compiling, calibration, progress)
        targets = {}
        for target, exporter in exporters.items():
            (stage / target).mkdir()
            facts = exporter.export(compiled, stage / target, options.target_options, progress)
            targets[target] = {"providers": list(device.providers), "threads": device.threads} | facts
        encode, context = find_encoder(stage / "tokenizer"), checkpoint.backbone.context
        write_golden(stage, ask_encoder(compiled, encode, context, progress))
        progress("hash", 0, 1)
        source = calibration.source if calibration and compiled.rounding == "gptq" else None
        manifest = _describe(compiled, targets, device.name, source)
        manifest = complete_bundle(stage, manifest, compiled.experts, compiled.reference)
        progress("hash", 1, 1)
    return manifest


def _copy_beside(backbone: EncoderBackbone, model: Path, stage: Path, options: ExportOptions) -> None:
    """The tokenizer of a text model, the preprocessor's numbers (mean, deviation, size) of a vision model."""
    if backbone.inputs[0].name == "input_ids":
        if options.tokenizer:
            copy_tokenizer(model, stage / "tokenizer")
    elif (model / PREPROCESSOR).is_file():
        (stage / "preprocessor").mkdir()
        shutil.copyfile(model / PREPROCESSOR, stage / "preprocessor" / PREPROCESSOR)


def _find_calibration(
    checkpoint: EncoderCheckpoint, compiling: CompileOptions, options: ExportOptions, tokenizer: Path
) -> EncoderCalibration | None:
    """Text for gptq, special tokens added; None where gptq is not asked for or there is no text to show.

    Raises:
        LimeEdgeError: a bad file, or a file that nothing can read.
    """
    if not tokenizer.is_dir():
        if options.calibration:
            raise LimeEdgeError("--calibration needs a text model and its tokenizer", "leave --calibration out")
        return None
    if compiling.quant != "int4" or compiling.rounding != "gptq":
        return None
    codec, context = TextCodec(tokenizer), checkpoint.backbone.context

    def encode(text: str) -> list[int]:
        return codec.encode(text, add_special_tokens=True)[: context or None]

    if options.calibration:
        found = read_calibration(options.calibration, encode, checkpoint.adapter.expert_names)
    else:
        vocabulary = codec.vocabulary()
        words = vocabulary_words(vocabulary) or _plain_words(vocabulary)
        found = built_in_calibration(encode, render_exchange(None), words)
    return EncoderCalibration(tuple((sample.tokens, sample.expert) for sample in found.samples), found.source)


def _plain_words(vocabulary: Mapping[str, int]) -> list[str]:
    """Whole words of a WordPiece vocabulary, where only a word's later pieces are marked, in id order."""
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    return [word for word in ordered if len(word) > 3 and word.isascii() and word.isalpha() and word.islower()]


def _describe(
    compiled: CompiledEncoder, targets: dict[str, dict[str, Any]], device: str, calibration: str | None
) -> Manifest:
    """The manifest of a compiled encoder, experts and files still missing."""
    backbone, adapter, options = compiled.checkpoint.backbone, compiled.checkpoint.adapter, compiled.options
    config = backbone.config
    quantized = [t for t in compiled.weights.values() if isinstance(t, QuantizedTensor)]
    fallbacks = [
        f"{name}.weight"
        for name, t in compiled.weights.items()
        if isinstance(t, QuantizedTensor) and options.quant == "int4" and t.codes.shape[1] % options.group
    ]
    versions = {package: importlib.metadata.version(package) for package in (*VERSIONED, "optimum")}
    labels = config.id2label if backbone.task.endswith("classification") else {}
    first = next(iter(compiled.experts.values()))
    return Manifest(
        fingerprint=compiled.fingerprint,
        model={
            "name": backbone.name,
            "kind": ENCODER.name,
            "task": backbone.task,
            "family": config.model_type,
            "architecture": type(backbone.model).__name__,
            "context": backbone.context,
            "vocab": getattr(config, "vocab_size", 0),
            "hidden": config.hidden_size,
            "layers": config.num_hidden_layers,
            "labels": [labels[index] for index in sorted(labels)],
            "inputs": [entry.name for entry in backbone.inputs],
            "outputs": list(compiled.module.outputs),
        },
        adapter={
            "variant": adapter.variant,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "fold": options.fold,
            "single": compiled.single,
            "expert_dtype": str(np.dtype(first.numpy().dtype)),
            "base": adapter.base_name,
            "sha256": hash_file(Path(adapter.path) / WEIGHTS).sha256,
            "shared_vector": any(site.shared is not None for site in adapter.sites.values()),
            "routing": adapter.routing,
        },
        quantization={
            "quant": options.quant,
            "group": options.group,
            "scheme": "symmetric",
            "rounding": compiled.rounding,
            "calibration": calibration,
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
        versions={"lime_edge": __version__} | versions,
    )
