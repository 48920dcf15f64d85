"""FP8 checkpoints: their weights are floats of 8 bits times a scale, and become float32 again by one product.

Three makers' forms are one: a weight `X.weight` of float8_e4m3fn beside `X.weight_scale_inv` (a scale a block) or
`X.weight_scale` (one, or one a row). The adapter is folded into the products.

Source: transformers, integrations/finegrained_fp8.py (blocks) and fbgemm_fp8.py (rows); compressed-tensors,
    float-quantized (one, or rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lime_edge.errors import Faults

EIGHT = torch.float8_e4m3fn
SCALES = ("_scale_inv", "_scale")  # what a scale's name adds to its weight's
UNUSED = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")  # of activations, which stay float here


def read_block(config: Mapping[str, Any]) -> Sequence[int] | None:
    """Rows and columns of a block, as a config.json says; None where scales are of rows or of a whole matrix."""
    claim = config.get("quantization_config")
    block = claim.get("weight_block_size") if isinstance(claim, dict) else None
    sizes = block if isinstance(block, list) and len(block) == 2 else None
    return sizes if sizes and all(isinstance(one, int) and one > 0 for one in sizes) else None


def widen(tensors: Mapping[str, torch.Tensor], block: Sequence[int] | None, where: str) -> dict[str, torch.Tensor]:
    """Every float8 weight as float32, without the scales.

    Args:
        block: see `read_block`.
    Raises:
        LimeEdgeError: a scale that is missing, or of another shape: all of them at once.
    """
    eight = [name for name, tensor in tensors.items() if tensor.dtype == EIGHT]
    if not eight:
        return dict(tensors)
    scales = {name: next((name + end for end in SCALES if name + end in tensors), "") for name in eight}
    left_out = {*scales.values()}
    kept = {n: t for n, t in tensors.items() if n not in left_out and n not in scales and not n.endswith(UNUSED)}
    with Faults(where, "take the original checkpoint of the same model, in bfloat16, float16 or float32") as faults:
        for name, scale in scales.items():
            weight, factors = tensors[name], tensors.get(scale)
            spread = None if factors is None else spread_scale(factors.float(), weight.shape, block)
            if spread is None:
                found = "none" if factors is None else tuple(factors.shape)
                faults.add(f"tensor {name}: its scale", "one, one a row or one a block", found)
            else:
                kept[name] = weight.float() * spread
    return kept


def spread_scale(scale: torch.Tensor, shape: torch.Size, block: Sequence[int] | None) -> torch.Tensor | None:
    """A scale as it multiplies a weight (N, K): (1, 1), (N, 1) or (N, K); None where it is none of those."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if len(shape) != 2:
        return None
    if scale.numel() == shape[0] and scale.shape[0] == shape[0]:
        return scale.reshape(-1, 1)
    counts = None if block is None else [-(-size // part) for size, part in zip(shape, block, strict=True)]
    if block is None or list(scale.shape) != counts:
        return None
    rows = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]
