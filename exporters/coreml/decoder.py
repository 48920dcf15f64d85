"""Core ML: one .mlpackage, the cache as state, the expert as an input, the compiler's own integers as weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lime_edge.compiler.model.compiled import Compiled, CompiledModel
from lime_edge.exporters.coreml.experts import PinnedExperts, RoutedExperts
from lime_edge.exporters.coreml.graph import Graph, Var, ct, get_new_symbol, mb, measure_package, types
from lime_edge.exporters.coreml.writer import DecoderWriter
from lime_edge.exporters.half import LIMIT, find_peak, store_as_half
from lime_edge.exporters.metadata import describe
from lime_edge.exporters.padded import choose_calls
from lime_edge.targets.entries import CoremlOptions

FILE = "model.mlpackage"
MAIN, ROUTED = "main", "routed"
PROVIDERS = ["CoreML", "interpreter"]
ROWS = 32  # the cache's length is a multiple of this: the Neural Engine is reported to refuse other states
Progress = Callable[[str, int, int], None]


def write_decoder(model: CompiledModel, directory: Path, options: CoremlOptions, progress: Progress) -> dict[str, Any]:
    """Write model.mlpackage: function `main`, and `routed` for a checkpoint with routing, on the same weights.

    Prompt and decode are one function of enumerated lengths: a second one would only leave the head out for all
    but the last row (a fifth of a prompt's products), and sharing a state between functions is not documented.

    Args:
        model: compiled; its integers are only re-packed, everything else becomes float16.
        directory: exists, empty. options: what to write. progress: called with (step, done, total).
    Returns:
        The target's manifest entry.
    Raises:
        LimeEdgeError: values beyond float16.
    """
    begun = time.perf_counter()
    capacity, lengths = choose_lengths(model, options)
    stored = store_as_half(model, "Core ML")
    peak = find_peak(stored, directory.parent / "tokenizer")  # the staged bundle's
    graph = Graph(options.minimum_os)
    routed = model.routing is not None and model.swaps
    progress("write coreml", 0, 2 + routed)
    pinned = PinnedExperts(stored, graph) if model.swaps else None
    write_function(graph, MAIN, stored, pinned, capacity, lengths)
    progress("write coreml", 1, 2 + routed)
    if routed:
        assert stored.routing is not None
        write_function(graph, ROUTED, stored, RoutedExperts(stored, graph, stored.routing), capacity, lengths)
        progress("write coreml", 2, 2 + routed)
    path = directory / FILE
    graph.save(path, describe_package(model, f"{model.decoder.family} decoder"))
    progress("write coreml", 2 + routed, 2 + routed)
    return {
        "file": f"coreml/{FILE}",
        "routed": ROUTED if routed else None,
        "providers": PROVIDERS,
        "minimum": options.minimum_os,
        "compute_units": options.compute_units,
        "coremltools": ct.__version__,
        "expert_input": model.swaps,
        "virtual_tokens": 0 if model.virtual is None else len(model.virtual.base),
        "layers": len(model.decoder.layers),
        "max_length": capacity,
        "lengths": list(lengths),
        "operations": count_operations(graph),
        "compute": "float16",
        "peak": asdict(peak) | {"limit": LIMIT},
        "weight_hash": model.weight_hash(),
        "bytes": measure_package(path),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def choose_lengths(model: CompiledModel, options: CoremlOptions) -> tuple[int, tuple[int, ...]]:
    """Rows of the cache, a multiple of ROWS that holds the context asked for; and input lengths, 1 among them."""
    capacity = -(-min(options.max_seq_len, model.decoder.context) // ROWS) * ROWS
    return capacity, choose_calls(options.prompt_lengths, capacity)


def write_function(
    graph: Graph,
    name: str,
    model: CompiledModel,
    experts: PinnedExperts | RoutedExperts | None,
    capacity: int,
    lengths: Sequence[int],
) -> None:
    """Write `main` or `routed`: input_ids (1, S), position (1,), length (1,), expert (sum_H,) where it is pinned."""
    c, pinned = model.decoder, isinstance(experts, PinnedExperts)
    single = len(lengths) == 1  # coremltools enumerates two shapes at least
    inputs = {
        "input_ids": mb.TensorSpec((1, lengths[0] if single else get_new_symbol()), dtype=types.int32),
        "position": mb.TensorSpec((1,), dtype=types.int32),
        "length": mb.TensorSpec((1,), dtype=types.int32),
    }
    first = (1, lengths[0])
    shape = first if single else ct.EnumeratedShapes([(1, length) for length in lengths], default=first)
    shapes = [
        ct.TensorType("input_ids", shape, np.int32),
        ct.TensorType("position", (1,), np.int32),
        ct.TensorType("length", (1,), np.int32),
    ]
    if pinned:
        inputs["expert"] = mb.TensorSpec((model.sites.total,), dtype=types.fp16)
        shapes.append(ct.TensorType("expert", (model.sites.total,), np.float16))
    for layer in range(len(c.layers)):
        for kind in ("keys", "values"):
            rows = (1, c.kv_heads, capacity, c.head_dim)
            inputs[f"{kind}_{layer}"] = mb.StateTensorSpec(rows, dtype=types.fp16)
    writer = DecoderWriter(model, graph, experts, capacity, max(lengths))

    def body(ids: Var, position: Var, length: Var, *rest: Var) -> list[tuple[str, Var]]:
        states = list(rest[pinned:])
        return [("logits", writer.write(ids, position, length, rest[0] if pinned else None, states))]

    graph.write_function(name, inputs, shapes, body)


def describe_package(compiled: Compiled, noun: str) -> dict[str, str]:
    """Metadata of the package."""
    terms = {"author": "lime_edge", "license": "that of the backbone and of the adapter"}
    return terms | describe(compiled, noun)


def count_operations(graph: Graph) -> int:
    """Operations of `main` that compute something."""
    return sum(
        op.op_type != "const" and not op.op_type.startswith("constexpr")
        for op in graph.program.functions[MAIN].operations
    )
