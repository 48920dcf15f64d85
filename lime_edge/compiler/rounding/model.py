"""Rounding a whole model: which matrix gets how many bits, and codes that know the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lime_edge.compiler.formats.backbone import Source
from lime_edge.compiler.maths.quantize import QuantizedTensor, group_for, quantize, search_scales
from lime_edge.compiler.model.compiled import Compiled, Stored
from lime_edge.compiler.options import QUANTS, CompileOptions, Progress
from lime_edge.compiler.rounding.grams import Grams

DAMPING = 0.1  # few calibration tokens must not be trusted too much


@dataclass(frozen=True)
class Unit:
    """Matrices that share an input and are rounded together, to equal bits.

    names: of the tensors. source: the input that multiplies them; None for tables, and for the head, which no
    calibration is run through.
    """

    names: tuple[str, ...]
    bits: int
    source: Source | None


def list_units(model: Compiled, options: CompileOptions) -> list[Unit]:
    """Every matrix of a model, in units; none for float32.

    An int4 model keeps the places of `keep_int8`, and widths that the group does not divide, at int8 per channel. What
    that buys, the head being among them, on SmolLM2-135M with a LiME adapter, gptq (400 prompts; same greedy answer as
    float32, packed size): qkv and the outer eighths of `down` 94.8%, 98 MB; qkv and all of `down` 96.8%, 107 MB.
    `down` reads the widest input, for which calibration is shortest, and holds the loudest columns.
    """
    bits = QUANTS[options.quant]
    if not bits:
        return []

    def choose_bits(name: str, place: str) -> int:
        wanted = 8 if place in options.keep_int8 else bits
        return group_for(model.weight(name).shape[1], wanted, options.group)[0]

    shared: dict[Source, list[str]] = {}
    for name, layer in model.layers.items():
        if not layer.embedding:
            shared.setdefault(layer.source, []).append(f"{name}.weight")
    units = [Unit(tuple(names), choose_bits(names[0], key[1]), key) for key, names in shared.items()]
    grouped = {name for unit in units for name in unit.names}
    return units + [Unit((n,), choose_bits(n, "head"), None) for n in model.weights if n not in grouped]


def list_narrow(units: list[Unit]) -> set[Source]:
    """The inputs of what is rounded to four bits: those that gptq must see."""
    return {unit.source for unit in units if unit.source is not None and unit.bits == 4}


def round_model(
    model: Compiled, options: CompileOptions, grams: Grams, progress: Progress = lambda *_: None
) -> dict[str, Stored]:
    """Quantize every matrix of a folded float model.

    Args:
        model: folded, weights float32 (nothing quantized yet).
        options: of which `rounding` says how: "nearest": w / s rounded, s = max|w| / high; "search": s of least squared
            error; "gptq": int4 codes of least error on the inputs seen, where `grams` has them.
        grams: of the inputs of `list_narrow`; empty but for gptq. progress: called with ("quantize", done, total).
    Returns:
        tensor name -> quantized matrix, in the order of `model.weights`.
    """
    units, done = list_units(model, options), dict[str, Stored]()
    for index, unit in enumerate(units):
        progress("quantize", index, len(units))
        done |= round_unit(model, unit, options, grams)
    progress("quantize", len(units), len(units))
    return {name: done[name] for name in model.weights} if units else dict(model.weights)


def round_unit(model: Compiled, unit: Unit, options: CompileOptions, grams: Grams) -> dict[str, QuantizedTensor]:
    """Quantize the matrices of one unit to its bits: tensor name -> quantized. Args as `round_model`."""
    parts = [model.weight(name) for name in unit.names]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    gram = None if unit.source is None else grams.get(unit.source)
    if unit.bits == 4 and gram is not None:
        stored = round_by_gram(whole, gram, options.group)
    else:
        stored = quantize(whole, unit.bits, options.group, search=options.rounding != "nearest")
    return dict(zip(unit.names, split_rows(stored, [len(part) for part in parts]), strict=True))


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
