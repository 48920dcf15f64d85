"""What rounding does to a decoder's answers: some text is read once in float32, and again with other matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lime_edge.compiler.formats.backbone import Source
from lime_edge.compiler.model.decoder import Cache, DecoderModule, cap

TABLE, HEAD = "table", "head"  # what is multiplied by no layer's input
Part = Source | str


@dataclass(frozen=True)
class Heard:
    """How far answers are from float32's. loss: mean over tokens of KL(float32 || this), in nats.

    same: share of tokens whose likeliest successor is float32's.
    """

    loss: float
    same: float


class Probe:
    """A float32 decoder that has read some text.

    Args:
        module: float32; its weights change while `listen` runs, and are float32 again afterwards.
        ids: (B, S) int64, padded on the right. real: (B, S) bool. residuals: (B, sum_H) float32, a row's expert.
    """

    @torch.no_grad()
    def __init__(self, module: DecoderModule, ids: Tensor, real: Tensor, residuals: Tensor):
        self.module, self.ids, self.real, self.residuals = module, ids, real, residuals
        self.added = 0  # virtual tokens before every row
        self.tied = module.head is module.embedding.table
        states = [self._embed()]
        self.tables = module.make_tables(0, states[0].shape[1])
        for block in module.blocks:
            states.append(block(states[-1], self.tables, _Uncached(), residuals))
        self.states = states  # what every block reads; the last one is what the head's norm reads
        self.wanted = self._answer(states[-1])

    def _embed(self) -> Tensor:
        x = self.module.embedding(self.ids, self.residuals)
        if self.module.virtual is None:
            return x
        prompt = self.module.virtual(x, self.residuals)
        self.added = prompt.shape[1]
        return torch.cat([prompt, x], dim=1)

    def _answer(self, x: Tensor) -> Tensor:
        """Log-probabilities of the real positions, (T, V)."""
        module = self.module
        logits = F.linear(module.norm(x[:, self.added :][self.real]), module.head)
        return cap(logits, module.config.logit_cap).log_softmax(-1)

    @torch.no_grad()
    def sum_head(self) -> Tensor:
        """Sum of x x^T over what the head reads, (hidden, hidden)."""
        x = self.module.norm(self.states[-1][:, self.added :][self.real])
        return x.t() @ x

    @torch.no_grad()
    def listen(self, weights: Mapping[Part, Tensor]) -> Heard:
        """Read again with other weights (a tied head is the table's), from the first layer that changes on."""
        module, kept = self.module, {part: self._exchange(part, weight) for part, weight in weights.items()}
        touched = [part[0] for part in weights if isinstance(part, tuple)]
        first = -1 if TABLE in weights else min(touched, default=len(module.blocks))
        x = self._embed() if first < 0 else self.states[first]
        for block in list(module.blocks)[max(first, 0) :]:
            x = block(x, self.tables, _Uncached(), self.residuals)
        found = self._answer(x)
        for part, weight in kept.items():
            self._exchange(part, weight)
        loss = F.kl_div(found, self.wanted, reduction="sum", log_target=True) / len(found)
        same = (found.argmax(-1) == self.wanted.argmax(-1)).float().mean()
        return Heard(float(loss), float(same))

    def _exchange(self, part: Part, weight: Tensor) -> Tensor:
        """Put a weight into its place; returns the one that was there."""
        module = self.module
        if isinstance(part, tuple):
            layer = module.list_readers()[part]
            old = layer.get_buffer("weight")
            layer.register_buffer("weight", weight)
            return old
        old = module.head if part == HEAD else module.embedding.table
        if part == TABLE:
            module.embedding.register_buffer("table", weight)
        if part == HEAD or self.tied:
            module.register_buffer("head", weight)
        return old


class _Uncached(Cache):
    """A cache for one block of one call: whichever block asks is the first."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads: this call's own."""
        return key, value
