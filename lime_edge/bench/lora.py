"""What a LoRA of the same rank on the same layers would take: calculated, to set beside an expert's bytes."""

from __future__ import annotations

from lime_edge.bundle.fields import Manifest

READS_HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # layers whose input is the model's width


def size_lora(manifest: Manifest) -> int | None:
    """Bytes of one float16 LoRA: r (D + H) numbers a layer; None where a layer's input width D is not known.

    Args:
        manifest: rank r, names and output widths H of the sites, and the widths of a language model.
    """
    decoder, rank, sites = manifest.decoder, manifest.adapter.rank, manifest.sites
    inner = {site.name.rsplit(".", 1)[0]: site.width for site in sites if site.name.endswith(("gate_proj", "up_proj"))}
    numbers = 0
    for site in sites:
        parent, _, last = site.name.rpartition(".")
        if last in READS_HIDDEN:
            width: int | None = manifest.backbone.hidden
        elif last == "o_proj":
            width = decoder.heads * decoder.head_dim if decoder is not None else None
        else:
            width = inner.get(parent) if last == "down_proj" else None
        if width is None:
            return None
        numbers += rank * (int(width) + site.width)
    return 2 * numbers
