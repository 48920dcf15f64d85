"""Core AI for encoders and vision models: the compiled module traced, our integers as they are.

Text comes as one sequence in an enumerated length, padded by its mask; pixels as one image. A routed call weighs over
everything it is given, so the function `routed` takes any length and batch instead of padding.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lime_edge.compiler.formats.encoder import make_sample
from lime_edge.compiler.model.encoder import CompiledEncoder, EncoderModule
from lime_edge.compiler.model.encoder_layers import StoredProduct, StoredTable
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
from lime_edge.exporters.coreai.decoder import DTYPES
from lime_edge.exporters.coreai.weights import Product, Table
from lime_edge.exporters.metadata import describe
from lime_edge.exporters.padded import BATCH, EXPERT, Traced, choose_lengths
from lime_edge.targets.entries import CoreaiOptions

Progress = Callable[[str, int, int], None]


def write_encoder(
    compiled: CompiledEncoder, directory: Path, options: CoreaiOptions, progress: Progress
) -> dict[str, Any]:
    """Write model.aimodel: main_S of every length S, `main` for pixels, and `routed` where the checkpoint routes.

    Args:
        compiled: its integers are only re-packed. directory: exists, empty. options: but for its cache.
        progress: called with (step, done, total).
    Returns:
        The target's manifest entry.
    Raises:
        LimeEdgeError: a model that cannot be converted.
    """
    begun = time.perf_counter()
    lengths, dtype = choose_lengths(compiled, options.prompt_lengths), DTYPES[options.activations]
    takes_expert, routed = compiled.single is None, compiled.routing is not None
    progress("write coreai", 0, 1)
    with compiled.module.replace_products(pack_product):
        module = copy.deepcopy(compiled.module).eval().to(dtype)
    functions = {
        f"{MAIN}_{length}" if length else MAIN: make_pinned(module, length, dtype, takes_expert)
        for length in lengths or (0,)
    }
    if routed:
        functions[ROUTED] = make_routed(module, dtype, max(lengths, default=0))
    path = directory / FILE
    write_program(functions, path, describe(compiled, type(compiled.backbone.model).__name__))
    progress("write coreai", 1, 1)
    return {
        "file": f"coreai/{FILE}",
        "routed": ROUTED if routed else None,
        "providers": PROVIDERS,
        "minimum": OLDEST,
        "compute_unit": "gpu",
        "packages": describe_versions(),
        "expert_input": takes_expert,
        "lengths": lengths,
        "compute": options.activations,
        "inputs": [asdict(entry) | {"shape": list(entry.shape)} for entry in compiled.module.inputs],
        "outputs": list(compiled.module.outputs),
        "notes": NOTES,
        "weight_hash": compiled.weight_hash(),
        "bytes": measure(path),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def pack_product(product: StoredProduct | StoredTable) -> nn.Module:
    """A layer's product over the compiler's integers."""
    return Table(product.stored) if isinstance(product, StoredTable) else Product([product.stored], product.bias)


def make_pinned(module: EncoderModule, length: int, dtype: torch.dtype, takes_expert: bool) -> Function:
    """One row of a fixed shape. length: tokens; 0: pixels."""
    sample = {name: cast_input(tensor[:1], dtype) for name, tensor in make_sample(module.inputs).items()}
    if length:
        sample = {name: tensor[:, :1].repeat(1, length) for name, tensor in sample.items()}
    if takes_expert:
        sample[EXPERT] = torch.zeros(module.sites.total, dtype=dtype)
    return Function(Traced(module, takes_expert, False, dtype), sample, module.outputs)


def make_routed(module: EncoderModule, dtype: torch.dtype, longest: int) -> Function:
    """Any batch and length."""
    sample = {name: cast_input(tensor, dtype) for name, tensor in make_sample(module.inputs).items()}
    limits = {"batch": BATCH, "sequence": longest}
    axes = {
        entry.name: {axis: (size, limits[size]) for axis, size in enumerate(entry.shape) if isinstance(size, str)}
        for entry in module.inputs
    }
    return Function(Traced(module, False, True, dtype), sample, module.outputs, axes=axes)


def cast_input(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Ids as int32, pixels in what the file computes in."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor.int()
