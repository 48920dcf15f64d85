"""What a branch is multiplied with: pieces of the expert, which is an input, or routed weights times the bank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lime_edge.compiler.maths.route import route
from lime_edge.compiler.model.compiled import CompiledModel, GroupBranch


class Pinned(nn.Module):
    """A group's multiplier (N,) from the flat residual."""

    def __init__(self, branch: GroupBranch):
        super().__init__()
        neutral = float(branch.a is None)  # SliceFine multiplies the output itself
        self.pieces = [(offset, width, 0) for offset, width in branch.find_runs()]  # and outputs left as they are
        if branch.gaps:
            offsets = [0 if part.site is None else part.site.offset for part in branch.parts]
            rests = [(part.adapted, part.width - part.adapted) for part in branch.parts]
            self.pieces = [(offset, *rest) for offset, rest in zip(offsets, rests, strict=True)]
        self.fill = nn.Buffer(torch.full((max(rest for _, _, rest in self.pieces),), neutral))

    def forward(self, expert: Tensor) -> Tensor:
        """expert: d (sum_H,)."""
        found = []
        for offset, width, rest in self.pieces:
            found += [expert[offset : offset + width]] if width else []
            found += [self.fill[:rest]] if rest else []
        return torch.cat(found) if len(found) > 1 else found[0]


class Routed(nn.Module):
    """A group's multiplier (1, S, N) per token: the checkpoint's experts weighed at every site.

    The weights are found in float32: a scale or a sum of float16 would tip tokens to other experts.
    """

    def __init__(self, model: CompiledModel, branch: GroupBranch):
        super().__init__()
        assert model.routing is not None
        self.parts, self.variant, self.routing = branch.parts, model.variant, model.routing
        self.neutral = float(branch.a is None)
        sites = [part.site for part in branch.parts if part.site is not None]
        self.experts = len(model.experts)
        self.banks = nn.ParameterList([nn.Parameter(model.bank(site), False) for site in sites])
        heads = [model.reference[site.offset : site.offset + self.experts] for site in sites]
        self.references = nn.ParameterList([nn.Parameter(head.clone(), False) for head in heads])

    def forward(self, y: Tensor, delta: Tensor, length: Tensor) -> Tensor:
        """y: (1, S, N) before the residual (SliceFine: before the bias). delta: (1, S, N). length: real rows."""
        found, start, index = [], 0, 0
        for part in self.parts:
            stop = start + part.width
            if part.site is not None:
                cut = slice(start, start + self.experts)
                reads = self.variant.recover_routing(
                    y[..., cut].float(), delta[..., cut].float(), self.references[index].float(), self.experts
                )
                weights = route(*reads, self.routing, length).to(y.dtype)
                found.append((weights @ self.banks[index])[..., : part.adapted])
                index += 1
            if rest := part.width - part.adapted:
                found.append(torch.full_like(y[..., :rest], self.neutral))
            start = stop
        return torch.cat(found, -1) if len(found) > 1 else found[0]
