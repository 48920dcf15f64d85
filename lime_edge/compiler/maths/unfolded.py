"""What the authors' code computes of one input, before any expert: one small function per variant.

`layers.compose` puts the parts together, y = base + delta * p; `variants` says which function is whose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Parts(NamedTuple):
    """What a variant makes of one input, all (..., H).

    Attributes:
        base: what is added to delta * p.
        delta: what the expert multiplies.
        frozen: the layer's output where attention_mask is 0.
        route_on: its first E columns are the routing's first operand.
        route_delta: its first E columns are the second one; None routes on `route_on` alone.
    """

    base: Tensor
    delta: Tensor
    frozen: Tensor
    route_on: Tensor
    route_delta: Tensor | None


def make_lora(tensors: Mapping[str, Tensor], x: Tensor, scale: float) -> Parts:
    """LoRA and LoRA-FA: h = W x + b, delta = s B A x.

    Args:
        tensors: `weight` (H, D), `A` (r, D), `B` (H, r), maybe `bias` (H,).
        x: (..., D); scale: s = alpha / r.
    Source: conformance README, "What the reference computes".
    """
    frozen = F.linear(x, tensors["weight"], tensors.get("bias"))
    delta = F.linear(F.linear(x, tensors["A"]), tensors["B"]) * scale
    return Parts(frozen, delta, frozen, frozen, delta)


def make_dora(tensors: Mapping[str, Tensor], x: Tensor, scale: float) -> Parts:
    """DoRA: LoRA's h and delta times n = m / ||W + s B A||_row; routes on n h + n delta.

    Args:
        tensors: as `make_lora`, and `m` (H,).
        x: (..., D); scale: s = alpha / r.
    Source: conformance README, "DoRA scales h ..."; floor of the norm: Kowsher/LiME at 82f981f.
    """
    plain = make_lora(tensors, x, scale)
    combined = tensors["weight"] + (tensors["B"] @ tensors["A"]) * scale
    return _scale_parts(plain, tensors["m"] / combined.norm(dim=1).clamp_min(1e-8))


def make_slicefine(tensors: Mapping[str, Tensor], x: Tensor, scale: float) -> Parts:
    """SliceFine: y = [p[:r] * T x; F x] + b; routes on [T x; F x], without the bias.

    Args:
        tensors: `part_T` (r, D), `part_F` (H - r, D), maybe `bias` (H,).
        x: (..., D); scale: not used.
    Source: conformance README, "SliceFine routes on h alone ..."; routing without the bias: fixtures slicefine-*-n3.
    """
    top, rest = F.linear(x, tensors["part_T"]), F.linear(x, tensors["part_F"])
    return _slice_parts(top, rest, tensors.get("bias"))


def embed_lora(tensors: Mapping[str, Tensor], ids: Tensor, scale: float) -> Parts:
    """LoRA on an embedding: h = table[id], delta = s B A h, so A is (r, H) and B (H, r).

    Source: fixtures embedding-lora-*.
    """
    frozen = F.embedding(ids, tensors["weight"])
    delta = F.linear(F.linear(frozen, tensors["A"]), tensors["B"]) * scale
    return Parts(frozen, delta, frozen, frozen, delta)


def embed_lora_fa(tensors: Mapping[str, Tensor], ids: Tensor, scale: float) -> Parts:
    """LoRA-FA on an embedding: delta = s (B A)[id], with A (r, H) and B (V, r).

    Source: fixtures embedding-lora_fa-*.
    """
    frozen = F.embedding(ids, tensors["weight"])
    delta = F.embedding(ids, tensors["B"]) @ tensors["A"] * scale
    return Parts(frozen, delta, frozen, frozen, delta)


def embed_dora(tensors: Mapping[str, Tensor], ids: Tensor, scale: float) -> Parts:
    """DoRA on an embedding: as LoRA-FA, times n = m / ||table + s B A||_column, (H,).

    Source: fixtures embedding-dora-*.
    """
    plain = embed_lora_fa(tensors, ids, scale)
    combined = tensors["weight"] + (tensors["B"] @ tensors["A"]) * scale
    return _scale_parts(plain, tensors["m"] / combined.norm(dim=0).clamp_min(1e-8))


def embed_slicefine(tensors: Mapping[str, Tensor], ids: Tensor, scale: float) -> Parts:
    """SliceFine on an embedding: the first r columns times p[:r]; `part_T` (V, r), `part_F` (V, H - r).

    Source: fixtures embedding-slicefine-*.
    """
    return _slice_parts(F.embedding(ids, tensors["part_T"]), F.embedding(ids, tensors["part_F"]), None)


def _scale_parts(parts: Parts, ratio: Tensor) -> Parts:
    frozen, delta = parts.frozen * ratio, parts.delta * ratio
    return Parts(frozen, delta, frozen, frozen + delta, delta)


def _slice_parts(top: Tensor, rest: Tensor, bias: Tensor | None) -> Parts:
    plain = torch.cat([top, rest], dim=-1)
    base = torch.cat([torch.zeros_like(top), rest], dim=-1)
    delta = torch.cat([top, torch.zeros_like(rest)], dim=-1)
    frozen = plain
    if bias is not None:
        base, frozen = base + bias, plain + bias
    return Parts(base, delta, frozen, plain, None)
