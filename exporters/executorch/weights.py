"""The compiler's integers as ExecuTorch takes them: products for XNNPACK, a table for the quantized kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchao.quantization.quant_primitives  # noqa: F401  registers the affine operators
from executorch.exir.passes import _quant_patterns_and_replacements as _  # noqa: F401  registers embedding_byte, _4bit
from torch import Tensor, nn

from lime_edge.compiler.maths.quantize import LIMITS, QuantizedTensor
from lime_edge.errors import LimeEdgeError

BLOCK_MULTIPLE = 32  # Source: XNNPACK, qd8_f32_qb4w (block size a multiple of 32)


def check_group(group: int) -> None:
    """Refuse int4 groups that XNNPACK would refuse only when the program is loaded.

    Raises:
        LimeEdgeError: not a multiple of 32.
    """
    if group % BLOCK_MULTIPLE:
        raise LimeEdgeError(
            f"`group`: for ExecuTorch expected a multiple of {BLOCK_MULTIPLE}, found {group}",
            "XNNPACK's int4 blocks are multiples of 32",
        )


class Product(nn.Module):
    """x W'^T + bias for stacked weights of one width.

    Quantized weights are multiplied with activations quantized to int8 per token, asymmetric: the only way
    XNNPACK multiplies them.

    Args:
        stored: matrices (N_i, K), all quantized alike or all float32. bias: (sum N_i,) or None.
    """

    def __init__(self, stored: list[QuantizedTensor | Tensor], bias: Tensor | None = None):
        super().__init__()
        self.bias = None if bias is None else nn.Buffer(bias)
        quantized = [tensor for tensor in stored if isinstance(tensor, QuantizedTensor)]
        self.bits = quantized[0].bits if quantized else 0
        if not quantized:
            self.weight = nn.Buffer(torch.cat([tensor for tensor in stored if isinstance(tensor, Tensor)]))
            return
        self.group = quantized[0].group
        self.weight = nn.Buffer(torch.cat([tensor.codes for tensor in quantized]))
        self.scales = nn.Buffer(torch.cat([tensor.scales for tensor in quantized]))
        self.zeros = nn.Buffer(torch.zeros_like(self.scales, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K) float32. Returns (..., sum N_i)."""
        if not self.bits:
            return F.linear(x, self.weight, self.bias)
        low, high = LIMITS[self.bits]
        weight = torch.ops.torchao.dequantize_affine(
            self.weight, [1, self.group], self.scales, self.zeros, torch.int8, low, high
        )
        return F.linear(round_activations(x), weight, self.bias)


def round_activations(x: Tensor) -> Tensor:
    """Activations as int8 per token and back, which XNNPACK fuses into the product. x: (..., K).

    The operators are called bare: torchao's functions switch gradients off, and torch.export takes a time that
    grows with the square of such switches (13 s for 12 layers, 1 s without).
    """
    ops, block, (low, high) = torch.ops.torchao, [*[1] * (x.dim() - 1), x.shape[-1]], LIMITS[8]
    scale, zero = ops.choose_qparams_affine(x, "ASYMMETRIC", block, torch.int8, low, high, zero_point_dtype=torch.int8)
    codes = ops.quantize_affine(x, block, scale, zero, torch.int8, low, high)
    return ops.dequantize_affine(codes, block, scale, zero, torch.int8, low, high)


class PackedTable(nn.Module):
    """Rows of a table by id: float32, int8 with a scale per row, or int4 with a scale per group.

    Args:
        stored: (V, H).
    """

    def __init__(self, stored: QuantizedTensor | Tensor):
        super().__init__()
        self.bits = stored.bits if isinstance(stored, QuantizedTensor) else 0
        if not isinstance(stored, QuantizedTensor):
            self.weight = nn.Buffer(stored)
            return
        self.weight = nn.Buffer(stored.codes if stored.bits == 8 else pack_nibbles(stored.codes))
        self.scales = nn.Buffer(stored.scales.contiguous())

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, S) int64. Returns (B, S, H) float32."""
        if not self.bits:
            return F.embedding(ids, self.weight)
        low, high = LIMITS[self.bits]
        ops = torch.ops.quantized_decomposed
        look_up = ops.embedding_byte if self.bits == 8 else ops.embedding_4bit
        return look_up(self.weight, self.scales, None, low, high, ids)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Signed int4 codes (V, H) to bytes (V, H / 2): the even column high, the odd one low, both offset by 8.

    Source: executorch 1.5.1, exir/passes/_quant_patterns_and_replacements.py (embedding_4bit).
    """
    shifted = (codes + 8).to(torch.uint8)
    return (shifted[:, 0::2] << 4) | shifted[:, 1::2]
