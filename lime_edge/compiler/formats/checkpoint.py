"""A checkpoint: a backbone and the LiME adapter made for it, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lime_edge.bundle.sites import SiteTable
from lime_edge.compiler.formats.adapter import Adapter, read_adapter
from lime_edge.compiler.formats.adapter_checks import PROMPT, is_named
from lime_edge.compiler.formats.architecture import Decoder
from lime_edge.compiler.formats.backbone import Backbone, read_backbone
from lime_edge.errors import Faults

EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class Checkpoint:
    """Everything the compiler needs, validated; no maths done yet."""

    backbone: Backbone
    adapter: Adapter
    sites: SiteTable

    @cached_property
    def fingerprint(self) -> str:
        """Of the original backbone: experts carry it, so that they fit every quantization of it."""
        return self.backbone.fingerprint()


def read_checkpoint(model: Path, adapter: Path) -> Checkpoint:
    """Read both halves and check that they belong together.

    Args:
        model: Hugging Face directory or GGUF file.
        adapter: LiME adapter directory.
    Raises:
        LimeEdgeError: faults of either half, or of the pair (a site that the model lacks, a target
            without tensors, other widths, another base fingerprint), all at once.
    """
    read = read_adapter(adapter)
    backbone = read_backbone(model)
    return pair(backbone, read)


def list_weights(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """Every module that can be a site, in computation order: name -> shape of its weight."""
    weights = {EMBEDDING: (decoder.vocab, decoder.hidden)}
    for layer in range(len(decoder.layers)):
        weights |= decoder.linears(layer)
    return weights


def pair(backbone: Backbone, adapter: Adapter) -> Checkpoint:
    """Put an adapter on a backbone; sites get the backbone's computation order.

    Raises:
        LimeEdgeError: the adapter was made for another model.
    """
    weights = list_weights(backbone.decoder)
    if adapter.variant == "prompt_tuning":
        weights = {PROMPT: (adapter.rank, backbone.decoder.hidden)}
    hint = f"this adapter was made for {adapter.base_name or 'another model'}"
    with Faults(f"{adapter.path} does not fit {backbone.path}", hint) as faults:
        targeted = {name for name in weights if is_named(name, list(adapter.target_modules))}
        for name in sorted(targeted - adapter.sites.keys()):
            faults.add(f"site {name} is targeted but has no tensors")
        for name, site in adapter.sites.items():
            if name not in weights:
                faults.add(f"site {name} is neither a linear layer nor the embedding of the model")
                continue
            if name not in targeted:
                faults.add(f"site {name} has tensors but target_modules leaves it out")
            if site.embedding != (name == EMBEDDING):
                found = "an embedding" if site.embedding else "a linear layer"
                faults.add(f"site {name}: embedding_modules makes it {found}, the model does not")
            elif name == PROMPT and site.width != weights[name][1]:
                faults.add("site prompt: H", weights[name][1], site.width)
            elif name != PROMPT and not _fits(site.weight_shape, weights[name]):
                faults.add(f"site {name}: {'(V, H)' if site.embedding else '(H, D)'}", weights[name], site.weight_shape)
    table = SiteTable.from_widths((n, adapter.sites[n].width) for n in weights if n in adapter.sites)
    checkpoint = Checkpoint(backbone, adapter, table)
    if adapter.base_fingerprint and adapter.base_fingerprint != checkpoint.fingerprint:
        with Faults(f"{adapter.path} does not fit {backbone.path}", hint) as faults:
            faults.add("base_fingerprint", adapter.base_fingerprint, checkpoint.fingerprint)
    return checkpoint


def _fits(wanted: tuple[int | None, ...], found: tuple[int, ...]) -> bool:
    return all(n in (None, m) for n, m in zip(wanted, found, strict=True))
