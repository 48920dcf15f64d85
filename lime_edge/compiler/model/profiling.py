"""Routed behaviour at pinned speed: average the routing over a task's examples into one expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lime_edge.bundle.sites import Site
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.model.decoder import Cache, DecoderModule
from lime_edge.compiler.model.multiplier import Multiplier
from lime_edge.errors import LimeEdgeError


def average_routing(
    model: CompiledModel,
    sequences: Sequence[tuple[list[int], list[int]]],
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, torch.Tensor]:
    """Mean routing weights of every site over all tokens of all sequences.

    Args:
        model: compiled with routing. sequences: (prompt ids, answer ids) each; a prompt is one call and
            an answer token one each, as on the device.
        progress: called with the number of sequences done.
    Returns:
        site name -> (E,) float64 that sums to 1.
    Raises:
        LimeEdgeError: the checkpoint has no routing.
    """
    if model.routing is None:
        raise LimeEdgeError("this checkpoint was trained without routing", "there is nothing to average: pin an expert")
    totals = {site.name: torch.zeros(len(model.experts), dtype=torch.float64) for site in model.sites}
    module, tokens = DecoderModule(model), 0

    def add(site: Site, weights: torch.Tensor) -> None:
        totals[site.name] += weights.double().sum((0, 1))

    for part in module.modules():
        if isinstance(part, Multiplier):
            part.observe = add
    for done, (prompt, answer) in enumerate(sequences, 1):
        cache = Cache()
        module(torch.tensor([prompt]), None, cache)
        for token in answer:
            module(torch.tensor([[token]]), None, cache)
        tokens += len(prompt) + len(answer)
        progress(done)
    return {name: total / tokens for name, total in totals.items()}


def mix_by_site(model: CompiledModel, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mixture as one flat vector p (sum_H,), in the experts' storage dtype: p = sum_e w_e p_e per site."""
    bank = torch.stack([vector.double() for vector in model.experts.values()])
    mixed = torch.cat([weights[site.name] @ bank[:, site.offset : site.offset + site.width] for site in model.sites])
    return mixed.to(next(iter(model.experts.values())).dtype)
