"""Bits where they matter: what four bits do to each matrix is measured, and eight go where they spare the most a byte.

One matrix at a time is rounded to int4 in a float32 model that reads calibration text with its experts active; the
Kullback-Leibler divergence of the next-token distributions from float32's is the matrix's loss. Losses are taken to add
up, which they do not quite: so the curve that an export prints is measured again, on whole models.

On SmolLM2-135M the tied table at int4 is two thirds of all loss, rounded by scale search. So here it is rounded by what
the head reads (gptq): 0.061 nats a token in place of 0.192, 87% of the likeliest tokens float32's in place of 73% (271
tokens that the sums had not seen; at int8 0.003 and 98%).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lime_edge.compiler.maths.quantize import QuantizedTensor, group_for
from lime_edge.compiler.model.compiled import Compiled, CompiledModel
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.options import CompileOptions, Progress
from lime_edge.compiler.rounding.budget import Candidate, Weigh, spend, spread, weigh_all
from lime_edge.compiler.rounding.calibrate import Calibration
from lime_edge.compiler.rounding.grams import Grams, collect_grams
from lime_edge.compiler.rounding.model import Unit, list_narrow, list_units, round_by_gram, round_unit
from lime_edge.compiler.rounding.probe import HEAD, TABLE, Part, Probe
from lime_edge.errors import LimeEdgeError

SEQUENCES, LENGTH = 24, 40  # of the calibration that are listened to, and their tokens at most
POINTS = 6  # of the curve, beside the one that is taken


@dataclass(frozen=True)
class Budget:
    """What the matrices may take.

    allowed: bytes for all of them; None: `bits` times their weights. weigh: how a target stores one. rest: bytes of the
    bundle that are no matrices.
    """

    allowed: int | None
    weigh: Weigh
    rest: int = 0


@dataclass(frozen=True)
class Spent:
    """What came of it. weights: tensor name -> quantized, in the model's order; report: for the manifest."""

    weights: dict[str, QuantizedTensor]
    report: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A model at both widths, and what four bits cost. units: in rounding order, as candidates are."""

    model: CompiledModel
    units: list[Unit]
    narrow: dict[str, QuantizedTensor]
    wide: dict[str, QuantizedTensor]
    probe: Probe
    candidates: list[Candidate]


def spend_bits(
    model: Compiled,
    options: CompileOptions,
    calibration: Calibration | None,
    budget: Budget,
    progress: Progress = lambda *_: None,
) -> Spent:
    """Round a folded float32 decoder to a size.

    Args:
        model: folded, weights float32. calibration: text to listen to.
        progress: called with (step, done, total).
    Raises:
        LimeEdgeError: no decoder, no text, or a size that all-int4 exceeds.
    """
    if not isinstance(model, CompiledModel) or calibration is None:
        raise LimeEdgeError(
            "`size` and `bits`: need a language model and its tokenizer, to measure with", "take `keep_int8`"
        )
    units = list_units(model, replace(options, keep_int8=(), size=None, bits=None))
    check_room(model, units, options, budget)
    measured = measure_units(model, units, options, calibration, budget.weigh, progress)
    return choose_bits(measured, _allow(model, options, budget), budget.rest)


@torch.no_grad()
def measure_units(
    model: CompiledModel,
    units: list[Unit],
    options: CompileOptions,
    calibration: Calibration,
    weigh: Weigh,
    progress: Progress = lambda *_: None,
) -> Measured:
    """Round every unit both ways, and listen to each at four bits. Args as `spend_bits`."""
    module, grams = DecoderModule(model), Grams()
    if options.rounding == "gptq":
        grams = collect_grams(model, module, calibration, list_narrow(units), progress)
    probe, candidates = Probe(module, *choose_rows(model, calibration)), []
    head = probe.sum_head() if options.rounding == "gptq" else None
    narrow, wide = _round_both(model, units, options, grams, head, progress)
    for index, unit in enumerate(units):
        progress("listen", index, len(units))
        loss = probe.listen({_place(model, unit): _join(narrow, unit)}).loss if unit.bits == 4 else 0.0
        least, most = (_weigh(model, unit, bits, options, weigh) for bits in (unit.bits, 8))
        candidates.append(Candidate(unit.names[0], least, most, max(0.0, loss)))
    progress("listen", len(units), len(units))
    return Measured(model, units, narrow, wide, probe, candidates)


def choose_bits(measured: Measured, allowed: int, rest: int) -> Spent:
    """Spend what is allowed, and listen to whole models of several sizes.

    Args:
        allowed: bytes for all matrices. rest: bytes of the bundle beside them.
    """
    units, candidates, curve = measured.units, measured.candidates, {}
    for size in sorted({*spread(candidates, POINTS), allowed}):
        widened = spend(candidates, size)
        heard = measured.probe.listen(
            {_place(measured.model, unit): _join(_pick(measured, unit, widened), unit) for unit in units}
        )
        weighed = weigh_all(candidates, widened) + rest
        curve[weighed] = {"bytes": weighed, "same": round(heard.same, 4), "loss": round(heard.loss, 5)}
    chosen = spend(candidates, allowed)
    done = {name: _pick(measured, unit, chosen)[name] for unit in units for name in unit.names}
    weighed = weigh_all(candidates, chosen)
    report = {
        "chosen": weighed + rest,
        "bits": round(8 * weighed / _count(measured.model, units), 3),
        "tokens": int(measured.probe.real.sum()),
        "int8": [name for unit in units if unit.names[0] in chosen for name in unit.names],
        "curve": [curve[key] for key in sorted(curve)],
        "losses": {one.name: round(one.loss, 6) for one in sorted(candidates, key=lambda one: -one.loss)},
    }
    return Spent({name: done[name] for name in measured.model.weights}, report)


def _pick(measured: Measured, unit: Unit, widened: frozenset[str]) -> dict[str, QuantizedTensor]:
    return measured.wide if unit.names[0] in widened else measured.narrow


def check_room(model: CompiledModel, units: list[Unit], options: CompileOptions, budget: Budget) -> None:
    """Refuse a size that even int4 everywhere exceeds, before anything is measured.

    Raises:
        LimeEdgeError: with the least size that can be had.
    """
    least = sum(_weigh(model, unit, unit.bits, options, budget.weigh) for unit in units)
    if least <= _allow(model, options, budget):
        return
    if budget.allowed is None:
        count = _count(model, units)
        found = f"`bits`: expected at least {8 * least / count + 0.005:.2f} for this model, found {options.bits}"
        raise LimeEdgeError(found, "that is every matrix at int4, scales included")
    total = -(-(least + budget.rest) // 100_000) / 10
    raise LimeEdgeError(
        f"`size`: expected at least {total:.1f}MB for this model, found {(options.size or 0) / 1e6:.1f}MB",
        f"matrices at int4 take {least / 1e6:.1f} MB, experts, tokenizer and graph {budget.rest / 1e6:.1f} MB",
    )


def choose_rows(model: Compiled, calibration: Calibration) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A few sequences spread over the calibration, as `Probe` takes them; nameless ones go round the experts."""
    step, names = max(1, len(calibration.samples) // SEQUENCES), list(model.experts)
    samples = calibration.samples[::step][:SEQUENCES]
    rows = [sample.tokens[: min(LENGTH, model.context)] for sample in samples]
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    real = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
    experts = [sample.expert or names[index % len(names)] for index, sample in enumerate(samples)]
    return ids, real, torch.stack([model.experts[name].float() - model.reference for name in experts])


def _round_both(
    model: CompiledModel,
    units: list[Unit],
    options: CompileOptions,
    grams: Grams,
    head: torch.Tensor | None,
    progress: Progress,
) -> tuple[dict[str, QuantizedTensor], dict[str, QuantizedTensor]]:
    """Every matrix at its narrow bits, and at eight. head: gram of the head's input, which a tied table is for too."""
    narrow, wide = dict[str, QuantizedTensor](), dict[str, QuantizedTensor]()
    for index, unit in enumerate(units):
        progress("quantize", index, len(units))
        wide |= round_unit(model, replace(unit, bits=8), options, grams)
        if unit.bits == 4 and head is not None and unit.names == (model.head_name,):
            narrow[model.head_name] = round_by_gram(model.weight(model.head_name), head, options.group)
            continue
        narrow |= round_unit(model, unit, options, grams) if unit.bits == 4 else {n: wide[n] for n in unit.names}
    progress("quantize", len(units), len(units))
    return narrow, wide


def _place(model: CompiledModel, unit: Unit) -> Part:
    if unit.source is not None:
        return unit.source
    return TABLE if unit.names[0] == f"{model.decoder.embedding}.weight" else HEAD


def _join(stored: dict[str, QuantizedTensor], unit: Unit) -> torch.Tensor:
    return torch.cat([stored[name].dequantize() for name in unit.names])


def _weigh(model: CompiledModel, unit: Unit, bits: int, options: CompileOptions, weigh: Weigh) -> int:
    shapes, table = [model.weight(name).shape for name in unit.names], _place(model, unit) == TABLE
    return sum(weigh(rows, columns, *group_for(columns, bits, options.group), table) for rows, columns in shapes)


def _count(model: Compiled, units: list[Unit]) -> int:
    return sum(model.weight(name).numel() for unit in units for name in unit.names)


def _allow(model: Compiled, options: CompileOptions, budget: Budget) -> int:
    if budget.allowed is not None:
        return budget.allowed
    assert options.bits is not None
    return int(options.bits * sum(model.weight(name).numel() for name in model.weights) / 8)
