"""The compiler's integers as Core AI stores them, and the products and look-ups over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import Stored
from lime_edge.errors import need
from lime_edge.exporters.silence import silence

try:
    with silence():  # it warns of torch's own build for processors
        import coreai_torch._compression.custom_layers  # noqa: F401  registers constexpr_blockwise_shift_scale
except ImportError as error:  # pragma: no cover - exercised in a bare environment
    raise need((error.name or "coreai_torch").split(".")[0], "coreai") from error

CODES = {4: torch.int4, 8: torch.int8}  # type: ignore[attr-defined]  # of the file; in torch all codes are int8


class Matrix(nn.Module):
    """A matrix (N, K): float, or codes and scales that the file keeps apart.

    Args:
        stored: stacked over N; all float32, or all with the same bits and group.
    """

    def __init__(self, stored: Sequence[Stored]):
        super().__init__()
        quantized = [tensor for tensor in stored if isinstance(tensor, QuantizedTensor)]
        self.bits = quantized[0].bits if quantized else 0
        if not quantized:
            self.weight = nn.Buffer(torch.cat([tensor for tensor in stored if isinstance(tensor, Tensor)]))
            return
        assert len({(tensor.bits, tensor.group) for tensor in quantized}) == 1, "the compiler rounds a group alike"
        self.codes = nn.Buffer(torch.cat([tensor.codes for tensor in quantized]))
        self.scales = nn.Buffer(torch.cat([tensor.scales for tensor in quantized]))

    def forward(self) -> Tensor:
        """(N, K): codes times scales, an operation of the program, so that the file holds the codes."""
        if not self.bits:
            return self.weight
        return torch.ops.coreai.constexpr_blockwise_shift_scale(
            self.codes, self.scales, None, None, CODES[self.bits], None
        )


class Product(nn.Module):
    """x W'^T + bias for stacked weights of one width."""

    def __init__(self, stored: Sequence[Stored], bias: Tensor | None = None):
        super().__init__()
        self.matrix, self.bias = Matrix(stored), None if bias is None else nn.Buffer(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., N)."""
        return F.linear(x, self.matrix(), self.bias)


class Table(nn.Module):
    """Rows of a matrix (V, H) by id."""

    def __init__(self, stored: Stored):
        super().__init__()
        self.matrix = Matrix([stored])

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) int. Returns (..., H)."""
        return F.embedding(ids, self.matrix())
