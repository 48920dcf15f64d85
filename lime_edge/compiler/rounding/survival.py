"""Fold survival: how much of the adapter's effect is still there once the weights are integers.

At a site, with F = W' - W what was folded in, C = branch_b branch_a and d = p - p_ref, an expert's exact
effect on the weights is E = F + diag(d) C. The stored model has Q(W') - Q(W) + diag(d) C instead, off by
N = Q(W') - Q(W) - F, the same for every expert. Over inputs x with second moment G = sum x x^T:

    error = sqrt(tr(N G N^T) / tr(E G E^T))       0: exact; 1: the rounding is as loud as the expert
    kept  = 1 + tr(N G E^T) / tr(E G E^T)         1: all of it is there; 0: rounded away

Weights matter only where inputs are, so G comes from a few calibration sequences; without a tokenizer, and for an
embedding table (where the same is said of its columns), every input counts alike. Nothing here changes what
is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lime_edge.compiler.formats.backbone import Source
from lime_edge.compiler.maths.quantize import QuantizedTensor, quantize
from lime_edge.compiler.model.compiled import Compiled, cut
from lime_edge.compiler.rounding.calibrate import Calibration
from lime_edge.compiler.rounding.grams import Grams

SEQUENCES = 16  # of the calibration: enough for a norm, and done in seconds


@dataclass(frozen=True)
class SiteSurvival:
    """One site. error: expert -> relative error; kept: expert -> share of the effect that is there."""

    name: str
    bits: int
    error: dict[str, float]
    kept: dict[str, float]


def measure_site(
    stored: Tensor,
    original: Tensor,
    folded: Tensor,
    product: Tensor | None,
    residuals: Mapping[str, Tensor],
    gram: Tensor | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Error and kept share of one site for every expert.

    Args:
        stored: (H, D) Q(W') - Q(W), dequantized. original: (H, D) W. folded: (H, D) W', before rounding.
        product: (H, D) C, or None without a branch. residuals: expert -> d (H,).
        gram: (D, D) sum of x x^T; None: the unit matrix.
    Returns:
        expert -> error, expert -> kept; experts without any effect here are left out.
    Source: this file's first lines.
    """
    effect = folded - original
    noise = stored - effect
    weigh = (lambda m: m @ gram) if gram is not None else (lambda m: m)
    loud, heard = weigh(noise), weigh(effect)
    total = float((loud * noise).sum())
    rows = {"ff": (heard * effect).sum(1), "nf": (loud * effect).sum(1)}
    if product is not None:
        rows |= {"fc": (heard * product).sum(1), "nc": (loud * product).sum(1), "cc": (weigh(product) * product).sum(1)}
    error, kept = {}, {}
    for name, d in residuals.items():
        power, shared = rows["ff"].sum(), rows["nf"].sum()
        if product is not None:
            power = power + (2 * d * rows["fc"] + d * d * rows["cc"]).sum()
            shared = shared + (d * rows["nc"]).sum()
        if float(power) > 0:
            error[name] = (max(total, 0.0) / float(power)) ** 0.5
            kept[name] = 1 + float(shared / power)
    return error, kept


@torch.no_grad()
def measure_survival(
    original: Mapping[str, Tensor], folded: Compiled, stored: Compiled, grams: Grams, gptq: bool
) -> list[SiteSurvival]:
    """Every folded site of a quantized model.

    Q(W) is W rounded to the stored bits and groups by scale search. gptq's codes of W are not at hand;
    where it rounded, W itself takes their place (on SmolLM2-135M that moved the error by less than 0.05).

    Args:
        original: the backbone's matrices. folded: float32. stored: quantized, the same fold.
        grams: by input, (D, D); where one is missing all inputs count alike.
        gptq: whether 4-bit matrices were rounded by gptq.
    """
    found = []
    for site in stored.sites:
        key = f"{site.name}.weight"
        weight, branch = stored.weights.get(key), folded.branches.get(site.name)
        if not isinstance(weight, QuantizedTensor) or branch is None or branch.a is None or branch.b is None:
            continue
        layer = stored.layers[site.name]
        table = layer.embedding  # its rows are looked up, so an output is a column: all ids count alike
        turn = Tensor.t if table else lambda matrix: matrix
        ready = weight.bits == 4 and gptq and not table
        start = original[key] if ready else quantize(original[key], weight.bits, weight.group).dequantize()
        error, kept = measure_site(
            turn(weight.dequantize() - start),
            turn(original[key]),
            turn(folded.weight(key)),
            branch.b @ turn(branch.a),
            {name: cut(site, p).float() - cut(site, stored.reference) for name, p in stored.experts.items()},
            None if table else grams.get(layer.source),
        )
        found.append(SiteSurvival(site.name, weight.bits, error, kept))
    return found


def list_sources(model: Compiled) -> set[Source]:
    """The inputs that sites are multiplied with: those worth looking at."""
    adapted = [layer for name, layer in model.layers.items() if model.sites.find(name)]
    return {layer.source for layer in adapted if not layer.embedding}


def choose_sequences(calibration: Calibration | None) -> Calibration | None:
    """A few of the sequences, spread over all of them."""
    if calibration is None:
        return None
    step = max(1, len(calibration.samples) // SEQUENCES)
    return Calibration(calibration.samples[::step][:SEQUENCES], calibration.source)


def summarize_survival(sites: list[SiteSurvival], inputs: str | None) -> dict[str, Any]:
    """What the manifest says: per kind of layer the median over sites and experts, and the worst.

    Args:
        inputs: the calibration's source; None: all inputs counted alike.
    """
    kinds: dict[str, list[SiteSurvival]] = {}
    for site in sites:
        if site.error:
            kinds.setdefault(site.name.rsplit(".", 1)[-1], []).append(site)
    summary = {}
    for kind, members in kinds.items():
        errors = [value for site in members for value in site.error.values()]
        kept = [value for site in members for value in site.kept.values()]
        worst = max(members, key=lambda site: max(site.error.values()))
        summary[kind] = {
            "sites": len(members),
            "bits": sorted({site.bits for site in members}),
            "error": round(median(errors), 4),
            "worst_error": round(max(errors), 4),
            "worst_site": worst.name,
            "kept": round(median(kept), 4),
            "worst_kept": round(min(kept), 4),
        }
    table = {
        site.name: {
            "error": round(max(site.error.values()), 4),
            "expert": max(site.error, key=site.error.__getitem__),
            "kept": round(min(site.kept.values()), 4),
        }
        for site in sites
        if site.error
    }
    return {"inputs": inputs, "kinds": summary, "sites": table}
