"""The unfolded LiME layers: what the authors' code computes, one small function per variant.

A variant says how it makes `Parts` from an input; `compose` knows one formula,
y = base + delta * p. Routing is in `routing`, folding in `fold`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_edge.compiler.maths.route import route
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.errors import LimeEdgeError

Mode = None | int | Mapping[int, float] | str
VARIANTS = ("lora", "lora_fa", "dora", "slicefine")


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
    Source: design, "SliceFine"; routing without the bias: fixtures slicefine-*-n3.
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


MakeParts = Callable[[Mapping[str, Tensor], Tensor, float], Parts]
LINEAR: dict[str, MakeParts] = {
    "lora": make_lora,
    "lora_fa": make_lora,
    "dora": make_dora,
    "slicefine": make_slicefine,
}
EMBEDDING: dict[str, MakeParts] = {
    "lora": embed_lora,
    "lora_fa": embed_lora_fa,
    "dora": embed_dora,
    "slicefine": embed_slicefine,
}


def routing_for(variant: str, hyper: Mapping[str, object]) -> RoutingConfig:
    """The routing that a variant really applies.

    Args:
        variant: one of VARIANTS, or "prompt_tuning".
        hyper: hyper-parameters, keys as in the reference.
    Raises:
        LimeEdgeError: a value out of range.
    Source: conformance README, "LoRA ignores n_gram"; prompt tuning's default sparse_mode:
        Kowsher/LiME at 82f981f.
    """
    values = dict(hyper)
    if variant == "lora":
        values["n_gram"] = 1
    if variant == "prompt_tuning":
        values.setdefault("sparse_mode", True)
    return RoutingConfig.from_mapping(values)


def compose(base: Tensor, delta: Tensor, weights: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """y = base + delta * (sum_e w_e p_e + gamma p_shared).

    The shared vector's term is added apart, as the reference does: adding the vectors first is the
    same on paper, but moves an ill-conditioned model's logits (llama-lora-auto) by 4e-5.

    Args:
        base, delta: (..., H).
        weights: (E,) or (..., E).
        tensors: `LiMEs` (E, H), maybe `LiME_shared` (H,) and `gamma` (1,).
    Returns:
        (..., H).
    Source: conformance README, "What the reference computes".
    """
    adapted = delta * (weights @ tensors["LiMEs"])
    if "LiME_shared" in tensors and "gamma" in tensors:
        adapted = adapted + tensors["gamma"] * (delta * tensors["LiME_shared"])
    return base + adapted


def fix_weights(mode: int | Mapping[int, float], experts: int) -> Tensor:
    """The fixed weights (E,) of a pinned expert or a blend.

    Args:
        mode: an expert's index, or index -> weight; the weights must sum to 1.
        experts: E.
    Raises:
        LimeEdgeError: no such expert, or weights that do not sum to 1.
    Source: design, "Blends must sum to 1"; conformance README, "Pinning".
    """
    blend = {mode: 1.0} if isinstance(mode, int) else dict(mode)
    unknown = [index for index in blend if not 0 <= index < experts]
    if unknown:
        raise LimeEdgeError(f"expert: expected an index below {experts}, found {unknown[0]}")
    total = math.fsum(blend.values())
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise LimeEdgeError(
            f"blend: expected weights that sum to 1, found {total:.6g}",
            "otherwise the shared vector would be scaled too",
        )
    weights = torch.zeros(experts)
    for index, weight in blend.items():
        weights[index] = weight
    return weights


def check_mode(mode: Mode, variant: str) -> None:
    """Refuse a mode that the variant cannot have.

    Raises:
        LimeEdgeError: an unknown word, or None for DoRA and SliceFine.
    Source: design, "no adapter".
    """
    if isinstance(mode, str) and mode != "routed":
        raise LimeEdgeError(f"mode: expected None, an expert, a blend or 'routed', found {mode!r}")
    if mode is None and variant in ("dora", "slicefine"):
        raise LimeEdgeError(
            f"a {variant} adapter cannot be switched off: no expert vector gives the original layer",
            "pin an expert, or use the original model",
        )


class LimeLayer(nn.Module):
    """One unfolded site, linear or embedding, float, inference only."""

    def __init__(
        self,
        variant: str,
        tensors: Mapping[str, Tensor],
        scale: float,
        routing: RoutingConfig,
        embedding: bool = False,
        pad_token_id: int | None = None,
    ):
        """Hold a site's tensors; it starts routed.

        Args:
            variant: one of VARIANTS.
            tensors: the variant's (see LINEAR and EMBEDDING), `LiMEs` (E, H), maybe `LiME_shared` (H,)
                and `gamma` (1,).
            scale: s = alpha / r (SliceFine: not used).
            routing: what `routing_for` gives.
            embedding: the input is token ids.
            pad_token_id: embeddings only: without an attention mask, this id gets the frozen output.
        """
        super().__init__()
        makers = EMBEDDING if embedding else LINEAR
        if variant not in makers:
            raise LimeEdgeError(f"variant: expected one of {', '.join(makers)}, found {variant!r}")
        self.variant, self.scale, self.routing = variant, scale, routing
        self.embedding, self.pad_token_id = embedding, pad_token_id
        self.make_parts = makers[variant]
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone())
        self.attention_mask: Tensor | None = None
        self.fixed: Tensor | None = None
        self.mode: Mode = "routed"

    def use(self, mode: Mode) -> None:
        """Switch: None (frozen output), an expert's index, index -> weight, or "routed".

        Raises:
            LimeEdgeError: see `check_mode` and `fix_weights`.
        """
        check_mode(mode, self.variant)
        experts = self.get_buffer("LiMEs")
        fixed = None if mode is None or isinstance(mode, str) else fix_weights(mode, experts.shape[0])
        self.fixed = None if fixed is None else fixed.to(experts)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """Run the site: x (B, T, D) or (N, D) float, or ids (B, T); returns (..., H)."""
        if x.dim() == 2 and not self.embedding:
            return self.compute(x.unsqueeze(1)).squeeze(1)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """The layer on (B, T, D), or ids (B, T): y = base + delta * p, masked positions frozen."""
        tensors = {name: self.get_buffer(name) for name in self.names}
        parts = self.make_parts(tensors, x, self.scale)
        if self.mode is None:
            return parts.frozen
        weights = self.fixed if self.fixed is not None else self.weigh(parts)
        y = compose(parts.base, parts.delta, weights, tensors)
        mask = self.find_mask(x)
        return y if mask is None else torch.where(mask.bool().unsqueeze(-1), y, parts.frozen)

    def weigh(self, parts: Parts) -> Tensor:
        """The routed weights (B, T, E) of one call."""
        experts = self.get_buffer("LiMEs").shape[0]
        if parts.route_on.dim() != 3:
            problem = f"routing: expected an output (B, T, H), found {tuple(parts.route_on.shape)}"
            raise LimeEdgeError(problem, "pin an expert instead")
        delta = None if parts.route_delta is None else parts.route_delta[..., :experts]
        return route(parts.route_on[..., :experts], delta, self.routing)

    def find_mask(self, x: Tensor) -> Tensor | None:
        """The mask (B, T) of this call: the one given, or for embeddings the non-padding ids."""
        if self.attention_mask is None and self.embedding and self.pad_token_id is not None:
            return x != self.pad_token_id
        if self.attention_mask is None or self.attention_mask.shape != x.shape[:2]:
            return None
        return self.attention_mask
