"""Folding: the shared adapter moves into the backbone, the expert becomes a residual.

For every adapted linear layer, with p the expert's vector and p_ref the reference vector,

    y = W' x + b' + d * (branch_b branch_a x)          d = p - p_ref

holds exactly for every p. The algebra and the source of every formula are in docs/folding.md.
Everything is computed in float64 and returned in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lime_edge.errors import Faults, LimeEdgeError


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


def fold_linear(variant: str, tensors: Mapping[str, Tensor], p_ref: Tensor, scale: float) -> FoldedLinear:
    """Fold p_ref times the shared adapter into a linear layer's weight.

    Args:
        variant: "lora", "lora_fa", "dora" or "slicefine".
        tensors: `weight` (H, D), `A` (r, D), `B` (H, r), DoRA's `m` (H,); or SliceFine's `part_T`
            (r, D) and `part_F` (H - r, D); `bias` (H,) where the layer has one. Any float dtype.
        p_ref: (H,), the reference vector, gamma p_shared included. SliceFine folds nothing and does
            not read it (see `fold_reference`).
        scale: s = alpha / r.
    Returns:
        The folded layer.
    Raises:
        LimeEdgeError: unknown variant, missing tensor or wrong shape.
    Source: docs/folding.md, "Linear layers".
    """
    given = {name: tensor.detach().double() for name, tensor in tensors.items()}
    _check_linear(variant, given, p_ref)
    bias = given.get("bias")
    if variant == "slicefine":
        weight = torch.cat([given["part_T"], given["part_F"]])
        return FoldedLinear(weight.float(), _float(bias), None, None, given["part_T"].shape[0])
    reference = p_ref.detach().double().unsqueeze(1)
    branch_b = scale * given["B"]
    product = branch_b @ given["A"]
    weight = given["weight"] + reference * product
    if variant == "dora":
        ratio = dora_ratio(given["weight"], product, given["m"]).unsqueeze(1)
        weight, branch_b = ratio * weight, ratio * branch_b
        bias = None if bias is None else ratio.squeeze(1) * bias
    return FoldedLinear(weight.float(), _float(bias), given["A"].float(), branch_b.float(), 0)


def evaluate(folded: FoldedLinear, x: Tensor, residual: Tensor) -> Tensor:
    """Run a folded linear layer.

    Args:
        folded: the layer.
        x: (..., D) float32.
        residual: (H,) or (..., H), d = p - `fold_reference(...)`; for SliceFine that is p itself.
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


def fold_embedding(
    variant: str, tensors: Mapping[str, Tensor], p_ref: Tensor, scale: float, pad_token_id: int | None = None
) -> FoldedEmbedding:
    """Fold p_ref times the shared adapter into an embedding table.

    A head that is tied to the table keeps the old table: untie first.

    Args:
        variant: "lora", "lora_fa", "dora" or "slicefine".
        tensors: `weight` (V, H) and `A` (r, H); `B` is (H, r) for lora, (V, r) for lora_fa and dora;
            DoRA's `m` (H,). SliceFine: `part_T` (V, r), `part_F` (V, H - r). Any float dtype.
        p_ref: (H,), the reference vector; SliceFine does not read it (see `fold_reference`).
        scale: s = alpha / r.
        pad_token_id: this id gives the frozen output whatever the expert, as in the reference when a
            model is called without attention mask. None: no such id.
    Returns:
        The folded table.
    Raises:
        LimeEdgeError: unknown variant, missing tensor or wrong shape.
    Source: docs/folding.md, "Embeddings".
    """
    given = {name: tensor.detach().double() for name, tensor in tensors.items()}
    _check_embedding(variant, given, p_ref)
    if variant == "slicefine":
        table = torch.cat([given["part_T"], given["part_F"]], dim=1)
        return FoldedEmbedding(table.float(), None, None, given["part_T"].shape[1], pad_token_id)
    if variant == "lora":  # delta reads the embedding, so the branch's table is one product away
        branch_table, branch_b = given["weight"] @ given["A"].T, scale * given["B"]
    else:
        branch_table, branch_b = given["B"].clone(), scale * given["A"].T
    table = given["weight"]
    if variant == "dora":
        ratio = dora_ratio(table.T, branch_b @ branch_table.T, given["m"])
        table, branch_b = ratio * table, ratio.unsqueeze(1) * branch_b
    if pad_token_id is not None:
        branch_table[pad_token_id] = 0
    table = table + p_ref.detach().double() * (branch_table @ branch_b.T)
    return FoldedEmbedding(table.float(), branch_table.float(), branch_b.float(), 0, pad_token_id)


def evaluate_embedding(folded: FoldedEmbedding, ids: Tensor, residual: Tensor) -> Tensor:
    """Run a folded embedding.

    Args:
        folded: the table.
        ids: (...) int64.
        residual: (H,) or (..., H), d = p - `fold_reference(...)`; for SliceFine that is p itself.
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


def recover_routing(
    variant: str, folded_output: Tensor, delta: Tensor, p_ref: Tensor, experts: int
) -> tuple[Tensor, Tensor | None]:
    """The two operands of `routing.route`, from what a folded site has at hand.

    Args:
        variant: "lora", "lora_fa", "dora" or "slicefine".
        folded_output: (B, T, H), W'x + b' (or table'[id]) before the residual is added; SliceFine:
            W'x before scale and bias.
        delta: (B, T, H), the branch: branch_b branch_a x, DoRA's n included. SliceFine: not read.
        p_ref: (H,), the folded reference vector. SliceFine: not read.
        experts: E.
    Returns:
        frozen (B, T, E) and delta (B, T, E); for SliceFine the latter is None.
    Source: docs/folding.md, "Routing on a folded layer".
    """
    frozen = folded_output[..., :experts]
    if variant == "slicefine":
        return frozen, None
    adapted = delta[..., :experts]
    kept = 1.0 if variant == "dora" else 0.0  # DoRA routes on h + delta, the others on h
    return frozen + (kept - p_ref[:experts]) * adapted, adapted


def scale_leading(y: Tensor, p: Tensor, count: int) -> Tensor:
    """Multiply the first `count` columns of y (..., H) by those of p (H,) or (..., H)."""
    return torch.cat([y[..., :count] * p[..., :count], y[..., count:]], dim=-1)


def dora_ratio(weight: Tensor, product: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's n = m / ||W + s B A||_row, (H,), of weight and product (H, D) and magnitude (H,).

    Source: conformance README, "DoRA scales h ..."; floor of the norm: Kowsher/LiME at 82f981f.
    """
    return magnitude / (weight + product).norm(dim=1).clamp_min(1e-8)


def fold_reference(variant: str, p_ref: Tensor) -> Tensor:
    """The vector to subtract from p at run time, (H,): p_ref, and zero for SliceFine (nothing folds)."""
    return torch.zeros_like(p_ref) if variant == "slicefine" else p_ref


def original_of(variant: str, p_ref: Tensor) -> Tensor:
    """The residual (H,) that gives the original backbone back: d = -p_ref.

    Raises:
        LimeEdgeError: DoRA and SliceFine, where no expert vector gives the original layer.
    Source: design, "no adapter": p = 0.
    """
    if variant in ("dora", "slicefine"):
        raise LimeEdgeError(
            f"a {variant} adapter cannot be switched off: no expert vector gives the original layer",
            "use(None) exists for lora and lora_fa; pin an expert, or use the original model",
        )
    return -p_ref


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


_TENSORS = {
    "lora": ("weight", "A", "B"),
    "lora_fa": ("weight", "A", "B"),
    "dora": ("weight", "A", "B", "m"),
    "slicefine": ("part_T", "part_F"),
}


def _check_linear(variant: str, tensors: Mapping[str, Tensor], p_ref: Tensor) -> None:
    _check_names(variant, tensors)
    if variant == "slicefine":
        (rank, width), rest = tensors["part_T"].shape, tensors["part_F"].shape[0]
        height, expected = rank + rest, _shapes(part_F=(rest, width))
    else:
        (height, width), rank = tensors["weight"].shape, tensors["A"].shape[0]
        expected = _shapes(A=(rank, width), B=(height, rank), m=(height,))
    _check_shapes(variant, tensors, p_ref, height, expected)


def _check_embedding(variant: str, tensors: Mapping[str, Tensor], p_ref: Tensor) -> None:
    _check_names(variant, tensors)
    if variant == "slicefine":
        (words, rank), rest = tensors["part_T"].shape, tensors["part_F"].shape[1]
        width, expected = rank + rest, _shapes(part_F=(words, rest))
    else:
        (words, width), rank = tensors["weight"].shape, tensors["A"].shape[0]
        b_rows = width if variant == "lora" else words
        expected = _shapes(A=(rank, width), B=(b_rows, rank), m=(width,))
    _check_shapes(variant, tensors, p_ref, width, expected)


def _shapes(**shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return shapes


def _check_names(variant: str, tensors: Mapping[str, Tensor]) -> None:
    if variant not in _TENSORS:
        raise LimeEdgeError(
            f"variant: expected one of {', '.join(_TENSORS)}, found {variant!r}",
            "check `variant` in the hyper-parameters",
        )
    missing = [name for name in _TENSORS[variant] if name not in tensors]
    if missing:
        raise LimeEdgeError(
            f"{variant} site: expected tensors {', '.join(_TENSORS[variant])}, found "
            f"{', '.join(sorted(tensors))} (missing: {', '.join(missing)})"
        )


def _check_shapes(
    variant: str, tensors: Mapping[str, Tensor], p_ref: Tensor, height: int, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    present = {**tensors, "p_ref": p_ref}
    with Faults(f"{variant} site of {height} outputs") as faults:
        for name, shape in {**shapes, "bias": (height,), "p_ref": (height,)}.items():
            if name in present and tuple(present[name].shape) != shape:
                faults.add(name, shape, tuple(present[name].shape))
