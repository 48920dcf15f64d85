"""What the expert multiplies a branch with: its residual, or per token the routed mixture of the bank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lime_edge.bundle.sites import Site
from lime_edge.compiler.maths.route import route
from lime_edge.compiler.model.compiled import CompiledModel, GroupBranch, Part


class Multiplier(nn.Module):
    """The multiplier of one group's branch.

    Args:
        model: compiled. branch: of the group, see CompiledModel.group_branch.
    """

    def __init__(self, model: CompiledModel, branch: GroupBranch):
        super().__init__()
        self.parts, self.adds = branch.parts, branch.a is not None
        self.variant, self.routing = model.variant, model.routing
        self.observe: Callable[[Site, Tensor], None] | None = None  # told a site's weights (B, S, E)
        sites = [part.site for part in branch.parts if part.site is not None and model.routing is not None]
        self.banks = nn.ParameterList([nn.Parameter(model.bank(site), False) for site in sites])
        ends = [(site.offset, site.offset + site.width) for site in sites]
        self.references = nn.ParameterList([nn.Parameter(model.reference[i:j], False) for i, j in ends])

    def forward(self, y: Tensor, delta: Tensor, expert: Tensor | None) -> Tensor:
        """(N,) for a residual (sum_H,), (rows, 1, N) for (rows, sum_H), or (B, S, N) routed where expert is None.

        Args:
            y: (B, S, N) before the residual (SliceFine: before the bias). delta: (B, S, N).
        """
        return self._route(y, delta) if expert is None else self._pick(expert)

    def _pick(self, expert: Tensor) -> Tensor:
        rows, pieces = expert if expert.dim() == 1 else expert.unsqueeze(1), []
        for part in self.parts:
            offset = part.site.offset if part.site else 0
            vector = rows[..., offset : offset + part.width] if part.site else None
            piece = self._widen(vector, part, rows)
            pieces.append(piece.expand(*rows.shape[:-1], -1))
        return torch.cat(pieces, dim=-1)

    def _widen(self, vector: Tensor | None, part: Part, like: Tensor) -> Tensor:
        """A member's multiplier: its residual, or what leaves the output as it is where it has none."""
        if self.adds:
            return like.new_zeros(part.width) if vector is None else vector
        ones = like.new_ones(part.width - part.rows)
        if vector is None:
            return ones
        return torch.cat([vector[..., : part.rows], ones.expand(*vector.shape[:-1], -1)], dim=-1)

    def _route(self, y: Tensor, delta: Tensor) -> Tensor:
        assert self.routing is not None
        pieces, row, index = [], 0, 0
        for part in self.parts:
            stop = row + part.width
            if part.site is None:
                pieces.append(self._widen(None, part, y).expand(*y.shape[:2], -1))
            else:
                bank, reference = self.banks[index], self.references[index]
                operands = self.variant.recover_routing(
                    y[..., row:stop], delta[..., row:stop], reference, bank.shape[0]
                )
                weights = route(*operands, self.routing)
                if self.observe is not None:
                    self.observe(part.site, weights)
                pieces.append(self._widen(weights @ bank, part, y))
                index += 1
            row = stop
        return torch.cat(pieces, dim=-1)
