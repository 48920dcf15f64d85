"""Rounding a whole model: which matrix gets how many bits, and codes that know the layer's inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lime_edge.compiler.maths.quantize import QuantizedTensor, group_for, quantize, search_scales
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.rounding.calibrate import Calibration, Grams, collect_grams
from lime_edge.errors import LimeEdgeError

ROUNDINGS = ("nearest", "search", "gptq")
KINDS = ("head", "qkv", "o", "gate_up", "down")  # head: the embedding and the head
INT8_KINDS = ("head", "qkv", "down")  # what an int4 model keeps at int8, see `bits_by_name`
DAMPING = 0.1  # few calibration tokens must not be trusted too much
Progress = Callable[[str, int, int], None]


def quantize_model(
    model: CompiledModel,
    bits: int,
    group: int,
    rounding: str = "gptq",
    calibration: Calibration | None = None,
    progress: Progress = lambda *_: None,
    int8_kinds: tuple[str, ...] = INT8_KINDS,
) -> dict[str, QuantizedTensor | torch.Tensor]:
    """Quantize every matrix of a folded float model.

    An int4 model keeps some matrices at int8 per channel, see `bits_by_name`.

    Args:
        model: folded, weights float32 (nothing quantized yet).
        bits: 4 or 8. group: elements per int4 scale.
        rounding: "nearest": w / s rounded, s = max|w| / high; "search": s of least squared error;
            "gptq": int4 codes of least error on the layer's calibration outputs.
        calibration: token sequences that show the layers their inputs; only "gptq" reads it.
        progress: called with (step, done, total).
        int8_kinds: of KINDS, those that stay int8 in an int4 model.
    Returns:
        tensor name -> quantized matrix, in the order of `model.weights`.
    Raises:
        LimeEdgeError: unknown rounding; "gptq" at 4 bits without calibration.
    """
    if rounding not in ROUNDINGS:
        raise LimeEdgeError(
            f"--rounding: expected {', '.join(ROUNDINGS)}, found {rounding!r}",
            "gptq (calibrated) is the most exact for int4",
        )
    units, widths, grams = _units(model), bits_by_name(model, bits, int8_kinds), Grams()
    given = {
        key: group_for(model.weight(names[0]).shape[1], widths[names[0]], group)[0] for key, names in units.items()
    }
    if rounding == "gptq" and 4 in given.values():
        if calibration is None:
            raise LimeEdgeError("--rounding gptq at 4 bits needs calibration text", "use --rounding search")
        grams = collect_grams(model, calibration, {key for key in units if given[key] == 4}, progress)
    done: dict[str, QuantizedTensor] = {}
    for index, (key, names) in enumerate(units.items()):
        progress("quantize", index, len(units))
        parts = [model.weight(name) for name in names]
        if key in grams:
            whole = round_by_gram(torch.cat(parts), grams[key], group)
        else:
            whole = quantize(torch.cat(parts), given[key], group, search=rounding != "nearest")
        done |= dict(zip(names, split_rows(whole, [len(part) for part in parts]), strict=True))
    progress("quantize", len(units), len(units))
    return {name: done[name] for name in model.weights}


def bits_by_name(model: CompiledModel, bits: int, int8_kinds: tuple[str, ...] = INT8_KINDS) -> dict[str, int]:
    """Tensor name -> bits, before the fallback of odd widths.

    At 4 bits the groups of `int8_kinds` keep 8. What that buys, the head being among them, on
    SmolLM2-135M with a LiME adapter, gptq (400 prompts; same greedy answer as float32, packed size):
    qkv and the outer eighths of `down` 94.8%, 98 MB; qkv and all of `down` 96.8%, 107 MB.
    `down` reads the widest input, for which calibration is shortest, and holds the loudest columns.
    """
    chosen = {name: 8 if "head" in int8_kinds else bits for name in model.weights}
    for layer in range(len(model.decoder.layers)):
        for kind, group in model.groups(layer).items():
            chosen |= {f"{name}.weight": 8 if kind in int8_kinds else bits for name in group.names}
    return chosen


def _units(model: CompiledModel) -> dict[tuple[int, str], list[str]]:
    """Matrices that are rounded together, since they share one input: (layer, kind) -> tensor names."""
    units = {
        (layer, kind): [f"{name}.weight" for name in group.names]
        for layer in range(len(model.decoder.layers))
        for kind, group in model.groups(layer).items()
    }
    grouped = {name for names in units.values() for name in names}
    return units | {(-1, name): [name] for name in model.weights if name not in grouped}


def split_rows(whole: QuantizedTensor, rows: list[int]) -> list[QuantizedTensor]:
    """Cut a quantized matrix along its output axis into parts of `rows` rows."""
    codes, scales = whole.codes.split(rows), whole.scales.split(rows)
    return [
        QuantizedTensor(c.contiguous(), s.contiguous(), whole.bits, whole.group)
        for c, s in zip(codes, scales, strict=True)
    ]


def round_by_gram(weight: torch.Tensor, gram: torch.Tensor, group: int, damping: float = DAMPING) -> QuantizedTensor:
    """int4 codes that keep W x, for the inputs x seen, rather than W itself.

    Columns are rounded one after another; what rounding a column did to the output is made up for by
    the columns still to come. A group's scale is searched when its turn comes, on the weights as they
    then are. Groups, and columns within a group, go in the order of falling input power.

    Args:
        weight: (N, K) float32, K a multiple of group.
        gram: (K, K) float, sum or mean of x x^T over calibration tokens.
        group: elements per scale.
        damping: share of each column's input power added to it; of its own, not of the mean, which
            a few columns with a thousand times the power of the others make (`down` has such).
    Source: GPTQ, arXiv 2210.17323, algorithm 1 (act-order: the authors' later option).
    """
    rows, columns = weight.shape
    order = _order_columns(gram.diagonal(), group)
    factor = _inverse_factor(gram, order, damping)
    left = weight.float().t()[order].contiguous()  # (K, N): a column of W is a contiguous row here
    codes = torch.empty(columns, rows, dtype=torch.int8)
    scales = torch.empty(columns // group, rows)
    for start in range(0, columns, group):
        stop = start + group
        block = left[start:stop]
        step = _scales_of(block)
        scales[int(order[start]) // group] = step
        errors = torch.empty_like(block)
        for index in range(group):
            row = factor[start + index]
            code = (block[index] / step).round_().clamp_(-8, 7)
            errors[index] = (block[index] - code * step) / row[start + index]
            codes[start + index] = code.to(torch.int8)
            if index + 1 < group:
                block[index + 1 :].addr_(row[start + index + 1 : stop], errors[index], alpha=-1)
        if stop < columns:
            left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return QuantizedTensor(restored.t().contiguous(), scales.t().contiguous(), 4, group)


def _scales_of(block: torch.Tensor) -> torch.Tensor:
    """Scales (N,) of least squared error for one group given transposed, (g, N)."""
    grouped = block.t()[:, None, :]
    return search_scales(grouped, grouped.abs().amax(-1) / 7, 4, None)[:, 0]


def _order_columns(power: torch.Tensor, group: int) -> torch.Tensor:
    """Column order (K,): groups by falling total power, columns within each by falling power."""
    grouped = power.view(-1, group)
    groups = grouped.sum(1).argsort(descending=True, stable=True)
    within = grouped[groups].argsort(dim=1, descending=True, stable=True)
    return (groups[:, None] * group + within).flatten()


def _inverse_factor(gram: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the damped, reordered gram's inverse, (K, K) float32.

    Columns that were never used get a trace of power: plain rounding.
    """
    damped = gram.double()[order][:, order]
    power = damped.diagonal().clone()
    damped.diagonal().add_(damping * power + 1e-6 * power.mean() + torch.finfo(torch.float32).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
