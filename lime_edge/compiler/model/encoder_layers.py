"""Compiled layers inside a transformers model: folded weight, residual branch, and routing where asked.

A layer keeps its product (`StoredProduct`, `StoredTable`) apart, so that an exporter can put its own in its place.
The expert reaches a layer as its `residual` buffer, which `EncoderModule` swaps for a piece of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_edge.compiler.maths.fold import scale_leading
from lime_edge.compiler.maths.route import route
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.maths.variants import Variant
from lime_edge.compiler.model.compiled import Stored, as_float
from lime_edge.errors import LimeEdgeError


class StoredProduct(nn.Module):
    """x W'^T + bias: x (..., D) to (..., H). `stored` is the matrix as the compiler left it, bias (H,) or None."""

    bias: Tensor | None

    def __init__(self, stored: Stored, bias: Tensor | None):
        super().__init__()
        self.stored = stored
        self.register_buffer("weight", as_float(stored))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product in float32, from dequantized weights."""
        return F.linear(x, self.get_buffer("weight"), self.bias)


class StoredTable(nn.Module):
    """Rows of an embedding table (V, H): ids (...) int64 to (..., H)."""

    def __init__(self, stored: Stored):
        super().__init__()
        self.stored = stored
        self.register_buffer("weight", as_float(stored))

    def forward(self, ids: Tensor) -> Tensor:
        """The rows in float32, from a dequantized table."""
        return F.embedding(ids, self.get_buffer("weight"))


@dataclass(frozen=True)
class SiteParts:
    """What a layer needs to be a site.

    Attributes:
        variant: of the adapter. a: (D, R), or (V, R) on an embedding; b: (R, H), scale inside. R is r,
            or the ranks of all sites on the same input together, b being zero for the others'.
            SliceFine: both None.
        rows: SliceFine's modulated rows, else 0. bias: (H,), SliceFine's, added after the modulation.
        reference: p_ref (H,). bank: d_e = p_e - p_ref of the checkpoint's experts (E, H).
        routing: how they are weighed, None where the checkpoint does not route.
        pad_token_id: embeddings only: the id that no expert touches, or None.
    """

    variant: Variant
    a: Tensor | None
    b: Tensor | None
    rows: int
    bias: Tensor | None
    reference: Tensor
    bank: Tensor
    routing: RoutingConfig | None
    pad_token_id: int | None = None


class CompiledLayer(nn.Module):
    """A product with, at a site, what the expert adds; linear layers and embeddings alike.

    Without a site (or in a single-expert model) it is its product. `routed` chooses between the residual
    given from outside and zero-parameter routing over the bank.
    """

    def __init__(self, product: StoredProduct | StoredTable, parts: SiteParts | None):
        super().__init__()
        self.product: nn.Module = product
        self.parts = parts
        self.routed = False
        if parts is None:
            return
        for name in ("a", "b", "bias", "reference", "bank"):
            self.register_buffer(name, getattr(parts, name))
        self.register_buffer("residual", torch.zeros_like(parts.reference))

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix: some models ask a layer for its weight's dtype or device."""
        return self.product.get_buffer("weight")

    def forward(self, x: Tensor) -> Tensor:
        """y = W'x + b' + d * (B A x), or SliceFine's y[:r] = p[:r] * (T x) + b[:r].

        Args:
            x: (..., D) float32, or ids (...) int64.
        Source: docs/folding.md.
        """
        y = self.product(x)
        if self.parts is None:
            return y
        if self.parts.rows:
            return self._modulate(x, y)
        delta = self._branch(x)
        residual = self._weigh(y, delta) if self.routed else self.get_buffer("residual")
        pad = self._find_pad(x)
        if pad is not None:  # d = -p_ref gives the frozen row back
            residual = torch.where(pad, -self.get_buffer("reference"), residual)
        return y + residual * delta

    def _branch(self, x: Tensor) -> Tensor:
        a, b = self.get_buffer("a"), self.get_buffer("b")
        return x @ a @ b if x.is_floating_point() else F.embedding(x, a) @ b

    def _modulate(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.parts is not None
        scale = self._weigh(y, y) if self.routed else self.get_buffer("residual")
        scaled = scale_leading(y, scale, self.parts.rows)
        pad = self._find_pad(x)
        scaled = scaled if pad is None else torch.where(pad, y, scaled)
        return scaled if self.parts.bias is None else scaled + self.get_buffer("bias")

    def _weigh(self, y: Tensor, delta: Tensor) -> Tensor:
        """The routed residual (..., H): the bank mixed per token. A 2-D input is a batch of single tokens."""
        assert self.parts is not None and self.parts.routing is not None
        bank = self.get_buffer("bank")
        flat = y.dim() == 2
        if flat:
            y, delta = y.unsqueeze(1), delta.unsqueeze(1)
        if y.dim() != 3:
            raise LimeEdgeError(
                f"routing: expected a layer's output (B, T, H), found {y.dim()} axes", "export the adapter pinned"
            )
        reference = self.get_buffer("reference")
        operands = self.parts.variant.recover_routing(y, delta, reference, bank.shape[0])
        mixed = route(*operands, self.parts.routing) @ bank
        return mixed.squeeze(1) if flat else mixed

    def _find_pad(self, x: Tensor) -> Tensor | None:
        """(..., 1) bool: where an embedding's id is the padding id; None where there is no such id."""
        pad = None if self.parts is None else self.parts.pad_token_id
        return None if pad is None else (x == pad).unsqueeze(-1)
