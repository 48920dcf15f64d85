"""The text that a model is calibrated with, and what the rounding left of its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from lime_edge.bundle.prompts import TextCodec
from lime_edge.compiler.compile import choose_rounding
from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.compiler.formats.checkpoint import Checkpoint
from lime_edge.compiler.kinds import ModelKind, kind_of
from lime_edge.compiler.model.compiled import Compiled
from lime_edge.compiler.options import CompileOptions
from lime_edge.compiler.rounding.calibrate import (
    Calibration,
    built_in_calibration,
    read_calibration,
    vocabulary_words,
)
from lime_edge.compiler.rounding.grams import Grams, collect_grams
from lime_edge.compiler.rounding.survival import choose_sequences, list_sources, measure_survival, summarize_survival
from lime_edge.errors import LimeEdgeError

B = TypeVar("B", bound=Backbone)
C = TypeVar("C", bound=Compiled)


def find_calibration(
    checkpoint: Checkpoint[B], options: CompileOptions, given: Path | None, tokenizer: Path
) -> Calibration | None:
    """The sequences to look at: the user's file, else the built-in text; None in float32 and without a tokenizer.

    Args:
        given: the user's file, or None. tokenizer: its directory, which may not exist.
    Raises:
        LimeEdgeError: a bad file, or a file and no tokenizer to read it with.
    """
    if not tokenizer.is_dir():
        if given is not None:
            raise LimeEdgeError("`calibration`: needs a text model and its tokenizer", "leave it out")
        return None
    if options.quant == "none":
        return None
    codec = TextCodec(tokenizer)
    encode, render = kind_of(checkpoint.backbone).speak(checkpoint.backbone, codec)
    if given is not None:
        return read_calibration(given, encode, checkpoint.adapter.expert_names)
    return built_in_calibration(encode, render, vocabulary_words(codec.vocabulary()))


def check_survival(
    kind: ModelKind[B, C],
    checkpoint: Checkpoint[B],
    folded: C,
    stored: C,
    options: CompileOptions,
    calibration: Calibration | None,
) -> dict[str, Any] | None:
    """How much of the experts' effect the rounded weights still hold, for the manifest; None in float32.

    It looks at all adapted inputs on a few sequences, where gptq looks at the narrow ones on all: a pass of its own is
    shorter than one that sums everything over everything.
    """
    if stored.quant == "none" or not checkpoint.adapter.variant.adapts_layers or not checkpoint.adapter.variant.folds:
        return None
    shown, grams, wanted = choose_sequences(calibration), Grams(), list_sources(folded)
    if shown is not None and wanted:
        grams = collect_grams(folded, kind.run(folded), shown, wanted)
    original, _ = checkpoint.backbone.split_state(())
    gptq = choose_rounding(options, calibration) == "gptq"
    sites = measure_survival(original, folded, stored, grams, gptq)
    return summarize_survival(sites, shown.source if shown else None) if sites else None
