"""Folding: the shared adapter moves into the backbone, the expert becomes a residual.

For every adapted linear layer, with p the expert's vector and p_ref the reference vector,

    y = W' x + b' + d * (branch_b branch_a x)          d = p - p_ref

holds exactly for every p. The algebra and the source of every formula are in docs/folding.md. One function per
variant and kind of layer; `variants` says which is whose, and checks what they are given. Everything is computed
in float64 and returned in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class FoldedLinear:
    """A linear site after folding (all tensors float32).

    Attributes:
        weight: (H, D), W'.
        bias: (H,) b', or None.
        branch_a: (r, D), or None when the site has no branch.
        branch_b: (H, r) with the scale s (and DoRA's n) inside, or None.
        modulated_rows: number r of leading output rows that SliceFine multiplies by p before the
            bias is added; 0 for every other variant.
    """

    weight: Tensor
    bias: Tensor | None
    branch_a: Tensor | None
    branch_b: Tensor | None
    modulated_rows: int


@dataclass(frozen=True)
class FoldedEmbedding:
    """An embedding site after folding (all tensors float32).

    Attributes:
        table: (V, H).
        branch_table: (V, r), or None when the site has no branch.
        branch_b: (H, r) with the scale s (and DoRA's n) inside, or None.
        modulated_columns: number r of leading columns that SliceFine multiplies by p; 0 otherwise.
        pad_token_id: the id that no expert touches, or None.
    """

    table: Tensor
    branch_table: Tensor | None
    branch_b: Tensor | None
    modulated_columns: int
    pad_token_id: int | None


def fold_lora(tensors: Tensors, p_ref: Tensor, scale: float) -> FoldedLinear:
    """LoRA, LoRA-FA: W' = W + diag(p_ref) s B A, b' = b.

    Args:
        tensors: `weight` (H, D), `A` (r, D), `B` (H, r), `bias` (H,) where the layer has one; float64.
        p_ref: (H,), the reference vector, gamma p_shared included. scale: s = alpha / r.
    Source: docs/folding.md, "Linear layers".
    """
    branch_b = scale * tensors["B"]
    weight = tensors["weight"] + p_ref.unsqueeze(1) * (branch_b @ tensors["A"])
    return _fold_linear(weight, tensors.get("bias"), tensors["A"], branch_b)


def fold_dora(tensors: Tensors, p_ref: Tensor, scale: float) -> FoldedLinear:
    """DoRA: W' = n (W + diag(p_ref) s B A), b' = n b, branch n s B A.

    Args: as `fold_lora`, and `m` (H,).
    Source: docs/folding.md, "Linear layers".
    """
    branch_b = scale * tensors["B"]
    product = branch_b @ tensors["A"]
    ratio = dora_ratio(tensors["weight"], product, tensors["m"]).unsqueeze(1)
    bias = None if "bias" not in tensors else ratio.squeeze(1) * tensors["bias"]
    weight = ratio * (tensors["weight"] + p_ref.unsqueeze(1) * product)
    return _fold_linear(weight, bias, tensors["A"], ratio * branch_b)


def fold_slicefine(tensors: Tensors, p_ref: Tensor, scale: float) -> FoldedLinear:
    """SliceFine: nothing folds; W' = [T; F], of which the expert multiplies the first r rows.

    Args:
        tensors: `part_T` (r, D), `part_F` (H - r, D), maybe `bias` (H,); float64. p_ref, scale: not read.
    Source: docs/folding.md, "Linear layers".
    """
    weight = torch.cat([tensors["part_T"], tensors["part_F"]])
    return _fold_linear(weight, tensors.get("bias"), None, None, len(tensors["part_T"]))


def _fold_linear(
    weight: Tensor, bias: Tensor | None, branch_a: Tensor | None, branch_b: Tensor | None, rows: int = 0
) -> FoldedLinear:
    return FoldedLinear(weight.float(), _float(bias), _float(branch_a), _float(branch_b), rows)


def run_folded(folded: FoldedLinear, x: Tensor, residual: Tensor) -> Tensor:
    """Run a folded linear layer.

    Args:
        folded: the layer.
        x: (..., D) float32.
        residual: (H,) or (..., H), d = p - `Variant.reference_of(p_ref)`; for SliceFine that is p itself.
    Returns:
        (..., H), y = W'x + b' + d * (branch_b branch_a x); SliceFine: y[:r] = p[:r] * (T x) + b[:r].
    Source: docs/folding.md, "Linear layers".
    """
    if folded.modulated_rows:
        y = scale_leading(F.linear(x, folded.weight), residual, folded.modulated_rows)
        return y if folded.bias is None else y + folded.bias
    y = F.linear(x, folded.weight, folded.bias)
    if folded.branch_a is None or folded.branch_b is None:
        return y
    return y + residual * F.linear(F.linear(x, folded.branch_a), folded.branch_b)


def fold_lora_table(tensors: Tensors, p_ref: Tensor, scale: float, pad: int | None) -> FoldedEmbedding:
    """LoRA on a table: delta reads the embedding, so the branch's table is one product away.

    A head that is tied to the table keeps the old table: untie first.

    Args:
        tensors: `weight` (V, H), `A` (r, H), `B` (H, r); float64. p_ref: (H,). scale: s = alpha / r.
        pad: this id gives the frozen output whatever the expert, as in the reference when a model is called
            without attention mask. None: no such id.
    Source: docs/folding.md, "Embeddings".
    """
    return _fold_table(tensors["weight"], tensors["weight"] @ tensors["A"].T, scale * tensors["B"], p_ref, pad)


def fold_lora_fa_table(tensors: Tensors, p_ref: Tensor, scale: float, pad: int | None) -> FoldedEmbedding:
    """LoRA-FA on a table: the branch's table is B itself.

    Args: as `fold_lora_table`, but `B` (V, r).
    Source: docs/folding.md, "Embeddings".
    """
    return _fold_table(tensors["weight"], tensors["B"].clone(), scale * tensors["A"].T, p_ref, pad)


def fold_dora_table(tensors: Tensors, p_ref: Tensor, scale: float, pad: int | None) -> FoldedEmbedding:
    """DoRA on a table: as LoRA-FA, its columns times n.

    Args: as `fold_lora_fa_table`, and `m` (H,).
    Source: docs/folding.md, "Embeddings".
    """
    branch_table, branch_b = tensors["B"].clone(), scale * tensors["A"].T
    ratio = dora_ratio(tensors["weight"].T, branch_b @ branch_table.T, tensors["m"])
    return _fold_table(ratio * tensors["weight"], branch_table, ratio.unsqueeze(1) * branch_b, p_ref, pad)


def fold_slicefine_table(tensors: Tensors, p_ref: Tensor, scale: float, pad: int | None) -> FoldedEmbedding:
    """SliceFine on a table: nothing folds; the expert multiplies the first r columns.

    Args:
        tensors: `part_T` (V, r), `part_F` (V, H - r); float64. p_ref, scale: not read. pad: as `fold_lora_table`.
    Source: docs/folding.md, "Embeddings".
    """
    table = torch.cat([tensors["part_T"], tensors["part_F"]], dim=1)
    return FoldedEmbedding(table.float(), None, None, tensors["part_T"].shape[1], pad)


def _fold_table(
    table: Tensor, branch_table: Tensor, branch_b: Tensor, p_ref: Tensor, pad: int | None
) -> FoldedEmbedding:
    if pad is not None:
        branch_table[pad] = 0
    folded = table + p_ref * (branch_table @ branch_b.T)
    return FoldedEmbedding(folded.float(), branch_table.float(), branch_b.float(), 0, pad)


def run_folded_embedding(folded: FoldedEmbedding, ids: Tensor, residual: Tensor) -> Tensor:
    """Run a folded embedding.

    Args:
        folded: the table.
        ids: (...) int64.
        residual: (H,) or (..., H), d = p - `Variant.reference_of(p_ref)`; for SliceFine that is p itself.
    Returns:
        (..., H), table'[id] + d * (branch_b branch_table[id]); SliceFine: the first columns times p.
    Source: docs/folding.md, "Embeddings".
    """
    y = F.embedding(ids, folded.table)
    if folded.modulated_columns:
        scaled = scale_leading(y, residual, folded.modulated_columns)
        return (
            scaled
            if folded.pad_token_id is None
            else torch.where((ids == folded.pad_token_id).unsqueeze(-1), y, scaled)
        )
    if folded.branch_table is None or folded.branch_b is None:
        return y
    return y + residual * F.linear(F.embedding(ids, folded.branch_table), folded.branch_b)


def scale_leading(y: Tensor, p: Tensor, count: int) -> Tensor:
    """Multiply the first `count` columns of y (..., H) by those of p (H,) or (..., H)."""
    return torch.cat([y[..., :count] * p[..., :count], y[..., count:]], dim=-1)


def dora_ratio(weight: Tensor, product: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's n = m / ||W + s B A||_row, (H,), of weight and product (H, D) and magnitude (H,).

    Source: conformance README, "DoRA scales h ..."; floor of the norm: Kowsher/LiME at 82f981f.
    """
    return magnitude / (weight + product).norm(dim=1).clamp_min(1e-8)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
