"""adapter_id: what an expert vector fits. numpy only: a device computes it from an adapter directory too.

An expert multiplies s B A x. It means the same wherever A, B and what belongs to them are the same, whatever the
backbone was rounded to: so these, and not the backbone and not the experts, are what is hashed. docs/bundle-format.md,
"Identity", says the same for other languages, byte for byte.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

import numpy as np

from lime_edge.bundle.sites import SiteTable

SHARED_PARTS = ("LiME_shared", "gamma")
PARTS = ("A", "B", "m", "part_T", "prompt_base", "prompt_delta", "input_proj", *SHARED_PARTS)
Tensors = Mapping[str, np.ndarray]


def hash_adapter(variant: str, rank: int, alpha: float, sites: SiteTable, tensors: Tensors) -> str:
    """adapter_id: sha256 over the shared adapter and its site table.

    Args:
        tensors: "SITE.PART" as in adapter_model.safetensors; experts (LiMEs) are not read. Any floating type.
    """
    digest = hashlib.sha256(b"lime-edge-adapter\n2\n")
    digest.update(_text(variant) + struct.pack("<Qd", rank, alpha))
    _add_sites(digest, sites, tensors, PARTS)
    return digest.hexdigest()


def hash_shared(sites: SiteTable, tensors: Tensors) -> str | None:
    """shared_id: sha256 over the shared vectors and their gammas; None where the adapter has none."""
    if not any(f"{site.name}.{part}" in tensors for site in sites for part in SHARED_PARTS):
        return None
    digest = hashlib.sha256(b"lime-edge-shared\n2\n")
    _add_sites(digest, sites, tensors, SHARED_PARTS)
    return digest.hexdigest()


def _add_sites(digest: hashlib._Hash, sites: SiteTable, tensors: Tensors, parts: tuple[str, ...]) -> None:
    digest.update(struct.pack("<Q", len(sites)))
    for site in sites:
        held = [part for part in parts if f"{site.name}.{part}" in tensors]
        digest.update(_text(site.name) + struct.pack("<QQ", site.width, len(held)))
        for part in held:
            tensor = tensors[f"{site.name}.{part}"]
            digest.update(_text(part) + struct.pack(f"<Q{tensor.ndim}Q", tensor.ndim, *tensor.shape))
            digest.update(np.ascontiguousarray(tensor, "<f4").data)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
