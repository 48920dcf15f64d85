"""What the benchmark feeds a model: random token ids, random pixels; the same ones every time."""

from __future__ import annotations

import numpy as np

from lime_edge.session.encoder import EncoderSession


def draw_prompt(vocab: int, count: int, seed: int = 0) -> list[int]:
    """`count` random token ids."""
    return np.random.default_rng(seed).integers(0, vocab, count).tolist()


def draw_inputs(session: EncoderSession, tokens: int) -> dict[str, np.ndarray]:
    """One input of each name the model needs, batch 1; inputs with a default are left to it.

    Args:
        tokens: length of a text; images have their own size.
    """
    random, inputs = np.random.default_rng(0), {}
    for entry in session.bundle.manifest.targets[session.target].inputs:
        if entry.default:
            continue
        sizes = {"batch": 1}
        shape = [sizes.get(size, tokens) if isinstance(size, str) else size for size in entry.shape]
        if entry.limit:
            inputs[entry.name] = random.integers(0, entry.limit, shape).astype(entry.dtype)
        else:
            inputs[entry.name] = random.standard_normal(shape).astype(entry.dtype)
    return inputs


def takes_text(session: EncoderSession) -> bool:
    """Whether an input's length is the number of tokens."""
    return any("sequence" in entry.shape for entry in session.bundle.manifest.targets[session.target].inputs)
