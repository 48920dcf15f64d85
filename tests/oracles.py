"""Sessions of targets with padded calls beside the torch oracle, step by step: what their tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from test_encoder import draw_text

from lime_edge.compiler.model.decoder import Cache, DecoderModule
from lime_edge.compiler.model.encoder import CompiledEncoder
from lime_edge.session.decoder import Session
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.switching import ExpertSwitch

QUANTS: dict[str, dict[str, Any]] = {
    "int4": {"quant": "int4"},
    "all int4": {"quant": "int4", "keep_int8": ()},
    "int8": {"quant": "int8"},
    "none": {"quant": "none"},
}


def read_residual(session: ExpertSwitch, selection: Any) -> torch.Tensor:
    """d (sum_H,) float32 of a selection, a copy."""
    return torch.from_numpy(session._bank.residual(selection).copy())


def follow_decoder(
    session: Session,
    oracle: DecoderModule,
    selection: Any,
    residual: torch.Tensor | None,
    ids: torch.Tensor,
    steps: int,
    compare: Callable[[np.ndarray, np.ndarray, str], None],
) -> np.ndarray:
    """A prompt in one go, and the same with its end token by token; returns what the oracle says.

    Args:
        residual: what the oracle takes for the selection, None routes. ids: (1, S). steps: tokens fed one by one.
        compare: called with what was found, what was wanted, and how it was fed.
    """
    cache, first = Cache(), ids.shape[1] - steps
    wanted = [oracle(ids[:, :first], residual, cache)[0]]
    wanted += [oracle(ids[:, place : place + 1], residual, cache)[0] for place in range(first, ids.shape[1])]
    rows = torch.cat(wanted).numpy()
    session.use(selection)
    found = [session.logits(ids[0, :first].tolist())]
    found += [session.extend([int(token)]) for token in ids[0, first:]]
    compare(np.concatenate(found), rows, f"{selection}, token by token")
    if selection != "routed":  # a longer prompt is routed otherwise: its scale needs all of it
        compare(session.logits(ids[0].tolist()), rows, f"{selection}")
    return rows


def draw_inputs(session: EncoderSession, batch: int, length: int, half: bool = False) -> dict[str, np.ndarray]:
    """Inputs of an encoder or a vision model of 32 x 32 pixels; the later texts shorter than the first.

    Args:
        half: floats as float16 holds them.
    """
    if session.inputs == ("pixel_values",):
        pixels = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(length))
        return {"pixel_values": (pixels.half().float() if half else pixels).numpy()}
    text = draw_text(batch, length, session.bundle.manifest.backbone.vocab, length)
    return {name: tensor.numpy() for name, tensor in text.items()}


@torch.no_grad()
def ask_encoder(
    compiled: CompiledEncoder,
    session: EncoderSession,
    inputs: dict[str, np.ndarray],
    selection: Any,
    half: bool = False,
) -> np.ndarray:
    """The oracle's logits under a selection of the session's. half: d as float16 holds it."""
    routed = selection == "routed"
    d = compiled.reference if routed else read_residual(session, selection)
    compiled.module.use_routing(routed)
    try:
        tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
        return compiled.module.compute(tensors, d.half().float() if half else d)["logits"].numpy()
    finally:
        compiled.module.use_routing(False)
