"""Prompt tuning in the program: ids from the vocabulary's size on are the virtual tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_edge.compiler.maths.prompt_tuning import route_static
from lime_edge.compiler.maths.route import route
from lime_edge.compiler.model.compiled import CompiledModel

UNSEEN = -30000.0


class VirtualPrompt(nn.Module):
    """Embeddings of a call in which ids vocab..vocab+V-1 stand for virtual tokens: base + d * delta.

    Args:
        model: compiled, with virtual tokens. routed: d per virtual token from the routing weights, in float32.
    """

    def __init__(self, model: CompiledModel, routed: bool):
        super().__init__()
        assert model.virtual is not None
        tokens = model.virtual
        self.conditioning, self.vocab = tokens.conditioning, model.decoder.vocab
        self.moves, self.routing = model.swaps, model.routing if routed else None
        self.base, self.delta = nn.Buffer(tokens.base), nn.Buffer(tokens.delta)
        if self.routing is not None:
            self.original, self.bank = nn.Buffer(tokens.original), nn.Buffer(model.bank(next(iter(model.sites))))
            self.project = None if tokens.input_proj is None else nn.Buffer(tokens.input_proj)

    def forward(self, ids: Tensor, embeds: Tensor, expert: Tensor | None, length: Tensor | None) -> Tensor:
        """ids: (1, S). embeds: (1, S, H), anything where a token is virtual. expert: d (H,). length: real rows."""
        if self.routing is not None:
            assert length is not None
            prompt = self.weigh(ids, embeds, length)
        elif self.moves:
            assert expert is not None
            prompt = self.base + expert * self.delta
        else:
            prompt = self.base
        index = (ids - self.vocab).clamp(0, self.base.shape[0] - 1)
        return torch.where((ids < self.vocab).unsqueeze(-1), embeds, F.embedding(index, prompt))

    def weigh(self, ids: Tensor, embeds: Tensor, length: Tensor) -> Tensor:
        """The routed virtual tokens (V, H). Calls after the first compute them too, and read none."""
        assert self.routing is not None
        experts, bank, delta = self.bank.shape[0], self.bank.float(), self.delta.float()
        if self.conditioning is None:
            tensors = {"prompt_base": self.original.float(), "prompt_delta": delta, "LiMEs": bank}
            weights = route_static(tensors, self.routing)
        else:
            summary = summarize(self.conditioning, ids, embeds.float(), length, self.vocab)
            if self.project is not None:
                summary = summary @ self.project.float().T
            frozen = self.original.float()[None] + summary
            weights = route(frozen[..., :experts], delta[None, :, :experts], self.routing)[0]
        return (self.base.float() + (weights @ bank) * delta).to(embeds.dtype)


def summarize(conditioning: str, ids: Tensor, embeds: Tensor, length: Tensor, vocab: int) -> Tensor:
    """One vector (1, 1, H) for a call's real tokens, as products with rows of 0 and 1.

    Source: compiler.maths.prompt_tuning.summarize, virtual tokens and padding masked out.
    """
    index = torch.arange(ids.shape[1], dtype=torch.int32)[None]
    real = (index < length) & (ids < vocab)
    rows = real.to(embeds.dtype).unsqueeze(1)
    if conditioning == "last":
        return (index == length - 1).to(embeds.dtype).unsqueeze(1) @ embeds
    if conditioning == "first":  # the real row with one real row up to it
        counted = real.to(torch.int32).cumsum(1)
        return (real & (counted == 1)).to(embeds.dtype).unsqueeze(1) @ embeds
    mean = (rows / rows.sum(-1, keepdim=True).clamp_min(1.0)) @ embeds
    if conditioning == "mean":
        return mean
    scores = mean @ embeds.transpose(1, 2) + (1.0 - rows) * UNSEEN
    return torch.softmax(scores, -1) @ embeds
