"""Core AI: one .aimodel, the cache as two states, the expert as an input, the compiler's own integers as weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.exporters.coreai.convert import (
    FILE,
    MAIN,
    NOTES,
    OLDEST,
    PROVIDERS,
    ROUTED,
    Function,
    describe_versions,
    measure,
    write_program,
)
from lime_edge.exporters.coreai.program import DecoderProgram, narrow
from lime_edge.exporters.half import LIMIT, find_peak, store_as_half
from lime_edge.exporters.metadata import describe
from lime_edge.exporters.padded import EXPERT, choose_calls
from lime_edge.targets.entries import CoreaiOptions

STATES = ("keys", "values")
DTYPES = {"float16": torch.float16, "float32": torch.float32}
Progress = Callable[[str, int, int], None]


def write_decoder(model: CompiledModel, directory: Path, options: CoreaiOptions, progress: Progress) -> dict[str, Any]:
    """Write model.aimodel: main_1, main_32, ... and, for a checkpoint that routes, routed_1, ... on the same weights.

    Args:
        model: compiled; its integers are only re-packed. directory: exists, empty. options: what to write.
        progress: called with (step, done, total).
    Returns:
        The target's manifest entry.
    Raises:
        LimeEdgeError: values beyond float16, or a model that cannot be converted.
    """
    begun = time.perf_counter()
    capacity, lengths = choose_lengths(model, options)
    routed = model.routing is not None and model.swaps
    progress("write coreai", 0, 2)
    facts: dict[str, Any] = {}
    if options.activations == "float16":
        model = store_as_half(model, "Core AI")
        facts["peak"] = asdict(find_peak(model, directory.parent / "tokenizer")) | {"limit": LIMIT}  # the staged one
    progress("write coreai", 1, 2)
    functions = make_functions(model, capacity, lengths, options.activations, routed=False)
    if routed:
        functions |= make_functions(model, capacity, lengths, options.activations, routed=True)
    path = directory / FILE
    write_program(functions, path, describe(model, f"{model.decoder.family} decoder"))
    progress("write coreai", 2, 2)
    return facts | {
        "file": f"coreai/{FILE}",
        "routed": ROUTED if routed else None,
        "providers": PROVIDERS,
        "minimum": OLDEST,
        "compute_unit": "gpu",
        "packages": describe_versions(),
        "expert_input": model.swaps,
        "virtual_tokens": 0 if model.virtual is None else len(model.virtual.base),
        "layers": len(model.decoder.layers),
        "max_length": capacity,
        "lengths": lengths,
        "compute": options.activations,
        "notes": NOTES,
        "weight_hash": model.weight_hash(),
        "bytes": measure(path),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def choose_lengths(model: CompiledModel, options: CoreaiOptions) -> tuple[int, tuple[int, ...]]:
    """Rows of the cache; and the lengths of calls, 1 among them, none longer than the cache."""
    capacity = min(options.max_seq_len, model.decoder.context)
    return capacity, choose_calls(options.prompt_lengths, capacity)


def make_functions(
    model: CompiledModel, capacity: int, lengths: tuple[int, ...], activations: str, routed: bool
) -> dict[str, Function]:
    """main_S or routed_S of every length S: input_ids (1, S), position (1,), and expert (sum_H,) or length (1,).

    Every shape is fixed: with an open length, some of a routed function's stay open in the file.
    """
    c, dtype = model.decoder, DTYPES[activations]
    module = narrow(DecoderProgram(model, capacity, max(lengths), routed), dtype)
    cache = (len(c.layers), 1, c.kv_heads, capacity, c.head_dim)
    found = {}
    for length in lengths:
        inputs = {
            "input_ids": torch.zeros(1, length, dtype=torch.int32),
            "position": torch.zeros(1, dtype=torch.int32),
            **{name: torch.zeros(cache, dtype=dtype) for name in STATES},
        }
        if routed:
            inputs["length"] = torch.full((1,), length, dtype=torch.int32)
        elif module.takes_expert:
            inputs[EXPERT] = torch.zeros(model.sites.total, dtype=dtype)
        found[f"{ROUTED if routed else MAIN}_{length}"] = Function(module, inputs, ("logits",), STATES)
    return found
