"""For runners that pass tokens and position only: the expert is a buffer that `set_expert` overwrites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lime_edge.exporters.executorch.program import DecoderProgram


class StockProgram(nn.Module):
    """`forward(tokens, pos)`, as ExecuTorch's text runner calls it.

    Args:
        program: pinned. neutral: (sum_H,), the expert until `set_expert` is called: the folded model.
    """

    def __init__(self, program: DecoderProgram, neutral: Tensor):
        super().__init__()
        self.program = program
        self.register_buffer("expert", neutral.clone())

    def forward(self, tokens: Tensor, pos: Tensor) -> Tensor:
        """tokens: (1, S) int64; pos: (1,) int64. Logits (1, 1, vocab) of the last position."""
        last = torch.full((1,), 1, dtype=torch.int64) * (tokens.shape[1] - 1)
        expert = self.get_buffer("expert") if self.program.takes_expert else None
        return self.program(tokens, pos, last, expert)


class StockExpert(nn.Module):
    """`set_expert(d)`: overwrites the buffer that `forward` reads. Returns its length."""

    def __init__(self, neutral: Tensor):
        super().__init__()
        self.register_buffer("expert", neutral.clone())

    def forward(self, residual: Tensor) -> Tensor:
        """residual: d (sum_H,) float32."""
        self.get_buffer("expert").copy_(residual)
        return torch.ones(1)
