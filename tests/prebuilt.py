"""Tiny bundles made beforehand, and what torch says about them: for machines that have no torch.

On a workstation `tiny_bundle` exports what a test asks for. Where LIME_EDGE_PREBUILT names a directory that
`python tools/prebuild_bundles.py DIRECTORY` filled, it serves those bundles instead, by the same options.
Importing this module imports numpy only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Make = Callable[..., Path]
Options = dict[str, Any]
LENGTH, NEW = 20, 24  # tokens of the golden prompt and of the greedy answer
BLEND = {"expert0": 0.7, "expert2": 0.5, "expert3": -0.2}
SELECTIONS = {
    "expert0": "expert0",
    "expert1": "expert1",
    "expert2": "expert2",
    "expert3": "expert3",
    "blend": BLEND,
    "none": None,
}
BUNDLES: tuple[Options, ...] = (
    {},
    {"fold": "none"},
    {"fold": "expert1"},
    {"fold": "expert0", "single": True},
    {"quant": "int8"},
    {"quant": "int8", "fold": "expert1"},
    {"quant": "int4"},
)
# What test_operators_on_device.py runs: adapters that between them have every size of branch, of float32 and (rounded)
# float16 weights, and every selection of routing; the model's widths are no multiples of 8.
ODD: Options = {"hidden_size": 60, "head_dim": 16, "intermediate_size": 100}
_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: dict[str, Options] = {
    "rank8": {"targets": _ALL, "rank": 8},
    "gaps": {"targets": ("q_proj", "v_proj", "down_proj"), "rank": 5, "rounded": True},
    "soft": {"targets": _ALL, "rank": 16, "rounded": True, "routing": {"top_k": 2}},
    "auto": {"rank": 6, "routing": {"auto_topk": True, "auto_topk_threshold": 0.6, "soft_topk_temperature": 0.2}},
    "hard": {"rank": 12, "experts": 9, "routing": {"top_k": 3, "soft_topk": False, "temperature": 0.5}},
    "sparse": {
        "targets": _ALL,
        "rank": 4,
        "rounded": True,
        "routing": {"top_k": 2, "sparse_mode": True, "auto_topk": True, "temperature": 0.3, "n_gram": 3},
    },
}


def name_of(options: Options) -> str:
    """The file name of a bundle made with these options; the tests' default is a float32 bundle."""
    full = {"quant": "none"} | options
    return "-".join(f"{key}={full[key]}" for key in sorted(full))


def prebuilt_directory() -> Path | None:
    """Where prebuilt bundles are, or None: then bundles are exported when asked for."""
    directory = os.environ.get("LIME_EDGE_PREBUILT")
    return Path(directory) if directory else None


def serve_prebuilt(directory: Path) -> Make:
    """`tiny_bundle` of a machine without torch."""

    def get(**options: Any) -> Path:
        path = directory / f"{name_of(options)}.lime"
        assert path.is_dir(), f"{path.name} is not prebuilt: add {options} to BUNDLES in tests/prebuilt.py"
        return path

    return get


def selections_of(options: Options) -> list[str]:
    """Names of the selections that a bundle of these options can run."""
    return [options["fold"]] if options.get("single") else list(SELECTIONS)


def write_golden(file: Path, model: Path, adapter: Path, options: Options) -> None:
    """Write what torch computes for a bundle of `model` and `adapter`, none of it through ONNX.

    Float32 bundles are compared with `transformers` and its layers unfolded, quantized ones with the compiler's
    own decoder, which multiplies the dequantized weights.

    Writes:
        ids (LENGTH,); logits/SELECTION (LENGTH, V) float32; tokens/SELECTION (NEW,), greedy after `ids`.
    """
    from models import draw_ids

    ids = draw_ids(LENGTH, seed=11)
    compute = _run_unfolded if options.get("quant", "none") == "none" else _run_compiled
    values: dict[str, np.ndarray] = {"ids": ids[0].numpy()}
    for name in selections_of(options):
        logits, tokens = compute(model, adapter, options, SELECTIONS[name], ids)
        values |= {f"logits/{name}": logits, f"tokens/{name}": np.array(tokens)}
    np.savez_compressed(file, **values)  # type: ignore[arg-type]


def _run_unfolded(model: Path, adapter: Path, _: Options, selection: Any, ids: Any) -> tuple[np.ndarray, list[int]]:
    from models import load_model, load_sites

    from lime_edge.compiler.model.reference import UnfoldedModel

    numbers = {f"expert{index}": index for index in range(4)}
    mode = numbers[selection] if isinstance(selection, str) else selection
    unfolded = UnfoldedModel(load_model(model), *load_sites(adapter))
    unfolded.use({numbers[name]: weight for name, weight in mode.items()} if isinstance(mode, dict) else mode)
    logits = unfolded.logits({"input_ids": ids})[0].numpy()
    return logits, unfolded.generate(ids, NEW)[0, LENGTH:].tolist()


def _run_compiled(
    model: Path, adapter: Path, options: Options, selection: Any, ids: Any
) -> tuple[np.ndarray, list[int]]:
    import torch

    from lime_edge.compiler.compile import compile_checkpoint
    from lime_edge.compiler.kinds import read_checkpoint
    from lime_edge.compiler.model.decoder import DecoderModule
    from lime_edge.compiler.options import CompileOptions
    from lime_edge.export.calibration import find_calibration

    checkpoint, compiling = read_checkpoint(model, adapter), CompileOptions(**options)
    calibration = find_calibration(checkpoint, compiling, None, model)
    compiled = compile_checkpoint(checkpoint, compiling, calibration)
    mix = {selection: 1.0} if isinstance(selection, str) else selection or {}
    vector = sum((w * compiled.experts[n].double() for n, w in mix.items()), torch.zeros(compiled.sites.total).double())
    module, residual = DecoderModule(compiled), vector.float() - compiled.reference
    return module(ids, residual)[0].numpy(), module.greedy(ids, residual, NEW)
