"""One quantization for every target: integer codes and scales that bfloat16 and float16 both hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lime_edge.errors import LimeEdgeError

INT4_GROUP = 32
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16; bfloat16 holds it too
LIMITS = {4: (-8, 7), 8: (-128, 127)}
# Scales to try, in units of max|w| / high. 1 clips nothing; 7/8 is enough when the largest value is
# negative and sits on -8; less clips outliers for finer steps; a little more can fit a grid better.
FACTORS = {4: [step / 48 for step in range(30, 51)], 8: [0.9, 0.92, 0.94, 0.96, 0.98, 1.0]}


@dataclass(frozen=True)
class QuantizedTensor:
    """Symmetric integers with a scale per group of the input axis.

    codes: (N, K) int8 in [-8, 7] or [-128, 127]; scales: (N, K / group) float32, each exactly a
    bfloat16 and a float16; group: elements per scale (K itself: per output channel).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int

    def dequantize(self) -> torch.Tensor:
        """codes * scale: (N, K) float32."""
        rows, columns = self.codes.shape
        grouped = self.codes.float().view(rows, -1, self.group) * self.scales[:, :, None]
        return grouped.view(rows, columns)

    def nbytes(self) -> int:
        """Packed size in bytes: codes at `bits` each, scales at two bytes."""
        return self.codes.numel() * self.bits // 8 + self.scales.numel() * 2


def round_scales(scales: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 that float16 also holds exactly, as float32; never below 2^-14.

    Raises:
        LimeEdgeError: a scale is beyond float16's range: the weights are not sane.
    """
    rounded = scales.to(torch.bfloat16).float().clamp_min(SMALLEST_SCALE)
    if not bool((rounded <= torch.finfo(torch.float16).max).all()):
        raise LimeEdgeError(
            f"a quantization scale of {rounded.max():.3g} is beyond float16's range",
            "the weights are not sane: check the checkpoint, or export with `quant=none`",
        )
    return rounded


def encode(weight: torch.Tensor, scales: torch.Tensor, bits: int, group: int) -> QuantizedTensor:
    """Codes for given (already rounded) scales: clamp(round(w / s)).

    Args:
        weight: (N, K) float. scales: (N, K / group) from `round_scales`.
    """
    low, high = LIMITS[bits]
    rows, columns = weight.shape
    grouped = weight.float().view(rows, -1, group) / scales[:, :, None]
    codes = grouped.round().clamp(low, high).to(torch.int8)
    return QuantizedTensor(codes.view(rows, columns), scales, bits, group)


def group_for(columns: int, bits: int, group: int) -> tuple[int, int]:
    """(bits, group) that a width can have: int4 needs a multiple of the group, else int8 per channel."""
    if bits == 4 and columns % group == 0:
        return 4, group
    return 8, columns


def quantize(
    weight: torch.Tensor, bits: int, group: int, search: bool = True, importance: torch.Tensor | None = None
) -> QuantizedTensor:
    """Quantize one matrix, each scale chosen among candidates for the least squared error.

    Args:
        weight: (N, K) float32. bits: 4 or 8. group: elements per scale, dividing K.
        search: try shrunken and grown scales; without it the scale is max|w| / high.
        importance: (K,) non-negative, the mean squared input of each column: errors there weigh more.
    Returns:
        The tensor; a width that int4's group does not divide becomes int8 per channel.
    """
    bits, group = group_for(weight.shape[1], bits, group)
    grouped = weight.float().view(weight.shape[0], -1, group)
    top = grouped.abs().amax(-1) / LIMITS[bits][1]
    if not search:
        return encode(weight, round_scales(top), bits, group)
    return encode(weight, search_scales(grouped, top, bits, importance), bits, group)


def search_scales(grouped: torch.Tensor, top: torch.Tensor, bits: int, importance: torch.Tensor | None) -> torch.Tensor:
    """The rounded scale of least (weighted) squared error per group.

    Args:
        grouped: (N, G, g) weights. top: (N, G) the scale that clips nothing.
        importance: (G*g,) or None.
    Returns:
        (N, G) float32 scales.
    """
    low, high = LIMITS[bits]
    weigh = None if importance is None else importance.view(1, -1, grouped.shape[-1])
    best = torch.full_like(top, float("inf"))
    chosen = round_scales(top)
    for factor in FACTORS[bits]:
        scales = round_scales(top * factor)
        steps = grouped / scales[:, :, None]
        error = (steps.round().clamp(low, high) - steps).mul_(scales[:, :, None]).square_()
        cost = (error if weigh is None else error * weigh).sum(-1)
        better = cost < best
        best = torch.where(better, cost, best)
        chosen = torch.where(better, scales, chosen)
    return chosen
