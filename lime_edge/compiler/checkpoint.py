"""A checkpoint: a backbone and the LiME adapter made for it, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lime_edge.compiler.adapter import Adapter, read_adapter
from lime_edge.compiler.backbone import Backbone, read_backbone
from lime_edge.errors import Faults
from lime_edge.sites import SiteTable


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


def pair(backbone: Backbone, adapter: Adapter) -> Checkpoint:
    """Put an adapter on a backbone; sites get the backbone's computation order.

    Raises:
        LimeEdgeError: the adapter was made for another model.
    """
    decoder = backbone.decoder
    linears: dict[str, tuple[int, int]] = {}
    for layer in range(len(decoder.layers)):
        linears |= decoder.linears(layer)
    hint = f"this adapter was made for {adapter.base_name or 'another model'}"
    with Faults(f"{adapter.path} does not fit {backbone.path}", hint) as faults:
        targeted = {n for n in linears if n.rsplit(".", 1)[-1] in adapter.target_modules or n in adapter.target_modules}
        for name in sorted(targeted - adapter.sites.keys()):
            faults.add(f"site {name} is targeted but has no tensors")
        for name, site in adapter.sites.items():
            if name not in linears:
                faults.add(f"site {name} is not a linear layer of the model")
                continue
            if name not in targeted:
                faults.add(f"site {name} has tensors but target_modules leaves it out")
            out, depth = linears[name]
            if (site.b.shape[0], site.a.shape[1]) != (out, depth):
                found = (site.b.shape[0], site.a.shape[1])
                faults.add(f"site {name}: (H, D)", (out, depth), found)
    checkpoint = Checkpoint(
        backbone, adapter, SiteTable.from_widths((n, linears[n][0]) for n in linears if n in adapter.sites)
    )
    if adapter.base_fingerprint and adapter.base_fingerprint != checkpoint.fingerprint:
        with Faults(f"{adapter.path} does not fit {backbone.path}", hint) as faults:
            faults.add("base_fingerprint", adapter.base_fingerprint, checkpoint.fingerprint)
    return checkpoint
