"""A checkpoint: a backbone and the LiME adapter made for it, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from lime_edge.bundle.fields import Fit
from lime_edge.bundle.sites import SiteTable
from lime_edge.compiler.formats.adapter import Adapter, AdapterSite
from lime_edge.compiler.formats.adapter_checks import PROMPT, is_named
from lime_edge.compiler.formats.backbone import Backbone, Layer
from lime_edge.compiler.formats.sketch import judge
from lime_edge.compiler.maths.variants import LAYER_VARIANTS
from lime_edge.errors import Faults, LimeEdgeError

B = TypeVar("B", bound=Backbone)


@dataclass(frozen=True)
class Checkpoint(Generic[B]):
    """Everything the compiler needs, validated; no maths done yet. B: the kind of model's backbone."""

    backbone: B
    adapter: Adapter
    sites: SiteTable
    fit: Fit = Fit(verdict="not recorded")


def pair(backbone: B, adapter: Adapter, any_backbone: bool = False) -> Checkpoint[B]:
    """Put an adapter on a backbone; sites get the order in which the model computes them.

    Args:
        any_backbone: take one that the adapter was not trained on, if only its layers fit.

    Raises:
        LimeEdgeError: the adapter was made for another model, all faults at once: a site that the model lacks, a
            target without tensors, other widths, other values; or the model takes no such adapter.
    """
    adapter = respell(backbone, adapter)
    layers = list_candidates(backbone, adapter)
    hint = f"this adapter was made for {adapter.base_name or 'another model'}"
    where = f"{adapter.path} does not fit {backbone.path}"
    with Faults(where, hint) as faults:
        targeted = {name for name in layers if is_named(name, list(adapter.target_modules))}
        for name in sorted(targeted - adapter.sites.keys()):
            faults.add(f"site {name} is targeted but has no tensors")
        for name, site in adapter.sites.items():
            if name not in layers:
                faults.add(f"site {name} is neither a linear layer nor an embedding of the model")
                continue
            if name not in targeted:
                faults.add(f"site {name} has tensors but target_modules leaves it out")
            _check_site(name, site, layers[name], faults)
    fit = judge(backbone, adapter.base_fingerprint, adapter.base_sketch, any_backbone, where)
    table = SiteTable.from_widths((name, adapter.sites[name].width) for name in layers if name in adapter.sites)
    return Checkpoint(backbone, adapter, table, fit)


def respell(backbone: Backbone, adapter: Adapter) -> Adapter:
    """The adapter with its sites called as the backbone calls them."""
    sites = {backbone.spell(name): site for name, site in adapter.sites.items()}
    targets = tuple(backbone.spell(name) for name in adapter.target_modules)
    return replace(adapter, sites=sites, target_modules=targets)


def list_candidates(backbone: Backbone, adapter: Adapter) -> Mapping[str, Layer]:
    """What may be a site: the model's layers, or the prompt of prompt tuning.

    Raises:
        LimeEdgeError: prompt tuning on a model that takes no virtual tokens.
    """
    if adapter.variant.adapts_layers:
        return backbone.layers
    if backbone.prompt_width is None:
        raise LimeEdgeError(
            f"{adapter.path}: a {adapter.variant.name} adapter does not fit: the model takes no virtual tokens",
            f"{', '.join(LAYER_VARIANTS)} can",
        )
    return {PROMPT: Layer((adapter.rank, backbone.prompt_width), False, False, (-1, PROMPT))}


def _check_site(name: str, site: AdapterSite, layer: Layer, faults: Faults) -> None:
    if site.embedding != layer.embedding:
        found = "an embedding" if site.embedding else "a linear layer"
        faults.add(f"site {name}: embedding_modules makes it {found}, the model does not")
    elif name == PROMPT:
        if site.width != layer.shape[1]:
            faults.add("site prompt: H", layer.shape[1], site.width)
    elif any(n not in (None, m) for n, m in zip(site.weight_shape, layer.shape, strict=True)):
        faults.add(f"site {name}: {'(V, H)' if site.embedding else '(H, D)'}", layer.shape, site.weight_shape)
