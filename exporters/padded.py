"""What targets of enumerated call lengths share: which lengths, and an encoder that takes padding by its mask."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor, nn

from lime_edge.compiler.model.encoder import SENTENCE, CompiledEncoder, EncoderModule, pool
from lime_edge.errors import LimeEdgeError

EXPERT, MASK = "expert", "attention_mask"
UNSEEN = -30000.0  # added to the scores of padding; float16 holds it
LONGEST = 512  # tokens of an encoder's text; a longer context is cut here: each length is enumerated
BATCH = 32  # largest batch of a routed call


class PaddedOptions(Protocol):
    """Options of a target whose calls have enumerated lengths."""

    @property
    def max_seq_len(self) -> int:
        """Tokens of the static cache."""

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Lengths that were asked for."""


def check_lengths(title: str, kind: str, options: PaddedOptions) -> None:
    """Refuse lengths that hold nothing, before anything is compiled.

    Args:
        title: of the target. kind: of model; only a decoder has a cache.
    Raises:
        LimeEdgeError: no positive length.
    """
    if not options.prompt_lengths or min(options.prompt_lengths) < 1:
        found = ",".join(map(str, options.prompt_lengths))
        raise LimeEdgeError(f"`prompt_lengths`: expected positive integers, found {found!r}", "for example 32,128")
    if kind == "decoder" and options.max_seq_len < 1:
        raise LimeEdgeError(
            f"`max_seq_len`: for {title} expected at least 1, found {options.max_seq_len}",
            "prompt and answer have to fit into it; 1024 is the default",
        )


def choose_calls(wanted: tuple[int, ...], capacity: int) -> tuple[int, ...]:
    """Lengths of a decoder's calls: those asked for that the cache holds (itself where none does), and 1."""
    return tuple(sorted({1} | ({length for length in wanted if length <= capacity} or {capacity})))


def choose_lengths(compiled: CompiledEncoder, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Enumerated lengths of a text: those asked for that the context holds, and the context itself; () for pixels.

    The context is that of the model, LONGEST at most.
    """
    context = min(compiled.backbone.context, LONGEST)
    return tuple(sorted({length for length in wanted if length < context} | {context})) if context else ()


class Traced(nn.Module):
    """An encoder as a function of exactly one call's inputs; its mask is added to scores, not turned into one.

    Args:
        routed: weigh the checkpoint's experts while it runs. dtype: what masks become, and the expert where none is
            given.
    """

    def __init__(
        self, module: EncoderModule, takes_expert: bool, routed: bool = False, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.whole, self.takes_expert, self.routed, self.dtype = module, takes_expert, routed, dtype
        self.bare = copy.copy(module)  # the same layers
        self.bare.pooling = None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The module's outputs; a function without an expert gets zeros, which nothing reads."""
        whole = self.whole
        inputs = {entry.name: x for entry, x in zip(whole.inputs, tensors, strict=False)}
        mask = inputs.get(MASK)
        if mask is not None:
            inputs[MASK] = (1.0 - mask.to(self.dtype))[:, None, None, :] * UNSEEN
        expert = tensors[-1] if self.takes_expert else torch.zeros(whole.sites.total, dtype=self.dtype)
        whole.use_routing(self.routed)
        try:
            found = self.bare.compute(inputs, expert)
        finally:
            whole.use_routing(False)
        if whole.pooling is not None:
            assert mask is not None
            found[SENTENCE] = pool(found["last_hidden_state"], mask.to(self.dtype), whole.pooling)
        return tuple(found[name] for name in whole.outputs)
