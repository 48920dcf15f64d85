"""Re-packing the compiler's integers for ONNX Runtime's block-quantized operators, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lime_edge.compiler.maths.quantize import QuantizedTensor

INT8_BLOCKS = (64, 32, 16)  # also the block in which activations are quantized: small ones keep accuracy


@dataclass(frozen=True)
class PackedWeight:
    """Operands of MatMulNBits: codes (N, blocks, block * bits / 8) uint8, scales (N * blocks) float32."""

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    block: int


def pack_weight(tensor: QuantizedTensor) -> PackedWeight:
    """Offset the signed codes by 2^(bits-1), the operator's default zero point, and lay them in blocks.

    A per-channel int8 scale is repeated for every block; int4 groups become blocks one to one.
    """
    codes = tensor.codes.numpy()
    rows, columns = codes.shape
    block = tensor.group if tensor.bits == 4 else choose_block(columns)
    blocks = -(-columns // block)
    offset = 1 << (tensor.bits - 1)
    padded = np.full((rows, blocks * block), offset, np.uint8)
    padded[:, :columns] = codes.astype(np.int16) + offset
    if tensor.bits == 4:
        padded = padded[:, 0::2] | (padded[:, 1::2] << 4)
    scales = tensor.scales.numpy()
    if tensor.bits == 8:
        scales = np.repeat(scales, blocks, axis=1)
    return PackedWeight(
        padded.reshape(rows, blocks, block * tensor.bits // 8),
        np.ascontiguousarray(scales, dtype=np.float32),
        tensor.bits,
        block,
    )


def unpack_codes(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The signed integers (N, K) int8 inside MatMulNBits codes (N, blocks, bytes)."""
    flat = packed.reshape(packed.shape[0], -1)
    if bits == 4:
        flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(flat.shape[0], -1)
    return (flat[:, :columns].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def choose_block(columns: int) -> int:
    """The largest block that divides the width; 32 with padding where none does."""
    return next((block for block in INT8_BLOCKS if columns % block == 0), 32)
