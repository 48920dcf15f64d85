"""On which tokens an adapter's experts act, settled with the model's own tokenizer and kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lime_edge.bundle.fields import FromGenerationPrompt
from lime_edge.compiler.formats.adapter import Adapter
from lime_edge.errors import LimeEdgeError

Encode = Callable[[str], Sequence[int]]


def count_header(adapter: Adapter) -> int:
    """The prompt's last tokens, from which on the experts act; 0: they always act."""
    return adapter.activation.tokens if isinstance(adapter.activation, FromGenerationPrompt) else 0


def check_activation(adapter: Adapter, encode: Encode | None, holds_cache: bool) -> None:
    """Hold the header's text against its number of tokens.

    Args:
        encode: text to token ids, special tokens as they are written; None without a tokenizer.
        holds_cache: the model keeps what it has read, as a decoder does.
    Raises:
        LimeEdgeError: a model that reads everything in one call, or a text of another number of tokens.
    """
    activation = adapter.activation
    if not isinstance(activation, FromGenerationPrompt):
        return
    if not holds_cache:
        raise LimeEdgeError(
            f"{adapter.path}: activation: an encoder generates nothing, so there is no prompt before it",
            "train it with activation always",
        )
    if activation.text is not None and encode is not None:
        found = len(encode(activation.text))
        if found != activation.tokens:
            raise LimeEdgeError(
                f"{adapter.path}: activation: {activation.text!r}: expected {activation.tokens} tokens, found {found}",
                "give the number that this model's tokenizer makes of it",
            )
