"""The unfolded LiME layer: the authors' formula, y = base + delta * p, in every mode.

The parts come from `unfolded`, by way of the variant; routing is in `routing`, folding in `fold`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lime_edge.compiler.maths.route import route
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.maths.unfolded import Parts
from lime_edge.compiler.maths.variants import Variant
from lime_edge.errors import LimeEdgeError

Mode = None | int | Mapping[int, float] | str


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
    Source: conformance README, "Pinning".
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


def check_mode(mode: Mode, variant: Variant) -> None:
    """Refuse a mode that the variant cannot have.

    Raises:
        LimeEdgeError: an unknown word, or None where nothing switches the adapter off.
    """
    if isinstance(mode, str) and mode != "routed":
        raise LimeEdgeError(f"mode: expected None, an expert, a blend or 'routed', found {mode!r}")
    if mode is None:
        variant.require_off()


class LimeLayer(nn.Module):
    """One unfolded site, linear or embedding, float, inference only."""

    def __init__(
        self,
        variant: Variant,
        tensors: Mapping[str, Tensor],
        scale: float,
        routing: RoutingConfig,
        embedding: bool = False,
        pad_token_id: int | None = None,
    ):
        """Hold a site's tensors; it starts routed.

        Args:
            variant: one that adapts layers.
            tensors: the variant's (see `unfolded`), `LiMEs` (E, H), maybe `LiME_shared` (H,) and `gamma` (1,).
            scale: s = alpha / r (SliceFine: not used).
            routing: what `Variant.read_routing` gives.
            embedding: the input is token ids.
            pad_token_id: embeddings only: without an attention mask, this id gets the frozen output.
        """
        super().__init__()
        self.variant, self.scale, self.routing = variant, scale, routing
        self.embedding, self.pad_token_id = embedding, pad_token_id
        self.make_parts = variant.find_form(embedding).unfold
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
