"""What an artifact's own metadata says of the model in it, for targets whose files hold some."""

from __future__ import annotations

from lime_edge import __version__
from lime_edge.compiler.model.compiled import Compiled


def describe(compiled: Compiled, noun: str) -> dict[str, str]:
    """Version, description, experts and hashes, as text. noun: what the model is without its adapter."""
    kind = f"single expert {compiled.single}" if compiled.single else f"{len(compiled.experts)} experts"
    return {
        "version": __version__,
        "description": f"{noun} with a LiME adapter ({kind}), {compiled.quant}",
        "experts": ",".join(compiled.experts),
        "fingerprint": compiled.fingerprint,
        "sites": compiled.sites.hash,
        "fold": compiled.fold,
        "quant": compiled.quant,
        "variant": compiled.variant.name,
    }
