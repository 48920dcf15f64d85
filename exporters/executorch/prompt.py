"""Prompt tuning in the program: ids beyond the vocabulary are the virtual tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lime_edge.compiler.maths.prompt_tuning import VirtualTokens, route_static
from lime_edge.compiler.maths.route import route
from lime_edge.compiler.model.compiled import CompiledModel


class VirtualPrompt(nn.Module):
    """Embeddings of a call in which ids vocab..vocab+V-1 stand for virtual tokens: base + d * delta.

    Args:
        model: compiled, with virtual tokens. routed: d per virtual token from the routing weights.
    """

    def __init__(self, model: CompiledModel, routed: bool):
        super().__init__()
        assert model.virtual is not None
        self.tokens: VirtualTokens = model.virtual
        self.vocab, self.moves, self.routing = model.decoder.vocab, model.swaps, model.routing if routed else None
        self.base, self.delta = nn.Buffer(self.tokens.base), nn.Buffer(self.tokens.delta)
        if self.routing is not None:
            self.original, self.bank = nn.Buffer(self.tokens.original), nn.Buffer(model.bank(next(iter(model.sites))))
            self.project = None if self.tokens.input_proj is None else nn.Buffer(self.tokens.input_proj)

    def forward(self, ids: Tensor, embeds: Tensor, real: Tensor, expert: Tensor | None) -> Tensor:
        """embeds: (1, S, H), anything where a token is virtual. real: (1, S, 1) bool. expert: d (sum_H,)."""
        if self.routing is not None:
            prompt = self.weigh(embeds, real.to(embeds.dtype))[0]
        else:
            prompt = self.base
            if self.moves:
                assert expert is not None
                prompt = self.base + expert * self.delta
        index = (ids - self.vocab).clamp(0, prompt.shape[0] - 1)
        return torch.where(real, embeds, prompt[index])

    def weigh(self, embeds: Tensor, real: Tensor) -> Tensor:
        """The routed virtual tokens (1, V, H). real: (1, S, 1), 1 for tokens of the prompt."""
        assert self.routing is not None
        experts = self.bank.shape[0]
        if self.tokens.conditioning is None:
            tensors = {"prompt_base": self.original, "prompt_delta": self.delta, "LiMEs": self.bank}
            weights = route_static(tensors, self.routing)[None]
        else:
            summary = summarize(self.tokens.conditioning, embeds, real)
            if self.project is not None:
                summary = summary @ self.project.T
            frozen = self.original[None] + summary
            weights = route(frozen[..., :experts], self.delta[None, :, :experts], self.routing)
        return self.base + (weights @ self.bank) * self.delta


def summarize(conditioning: str, embeds: Tensor, real: Tensor) -> Tensor:
    """One vector (1, 1, H) for a call's real tokens, which come last.

    Args:
        embeds: (1, S, H). real: (1, S, 1) float, 1 for real tokens.
    Source: compiler.maths.prompt_tuning.summarize_prompt, the virtual tokens masked out.
    """
    if conditioning == "last":
        return embeds[:, -1:]
    if conditioning == "first":
        first = (real.cumsum(1) == 1).to(embeds.dtype) * real
        return (embeds * first).sum(1, keepdim=True)
    mean = (embeds * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
    if conditioning == "mean":
        return mean
    scores = torch.where(real > 0, (embeds * mean).sum(-1, keepdim=True), -1e30)
    return (torch.softmax(scores, 1) * embeds).sum(1, keepdim=True)
