"""Asking a session again what PyTorch was asked at export: one function for each kind of model."""

from __future__ import annotations

import numpy as np

from lime_edge.bundle.golden import Golden
from lime_edge.session.decoder import Session
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.switching import ExpertSwitch
from lime_edge.session.vision import VisionSession

DECIDING = "logits"  # the output whose largest value is a decision


def replay(session: ExpertSwitch, golden: Golden, label: str) -> dict[str, np.ndarray]:
    """The rows (P, R, V) of every golden output, as the session computes them under the selection in use.

    Args:
        label: that selection, as the golden outputs call it.
    """
    match session:
        case VisionSession():
            return run_vision(session, golden, label)
        case Session():
            return run_decoder(session, golden, label)
        case EncoderSession():
            return run_encoder(session, golden)
    raise AssertionError(f"{type(session).__name__} has no golden calls")


def find_shortage(session: ExpertSwitch, golden: Golden) -> str:
    """Why the golden calls do not fit into a session, or empty."""
    needed = count_tokens(golden)
    if isinstance(session, Session) and session.max_length < needed:
        return f"its cache holds {session.max_length} tokens, {needed} are needed"
    return ""


def count_tokens(golden: Golden) -> int:
    """What a cache must hold: a prompt and the oracle's steps after it."""
    return next(iter(golden.calls.values())).shape[-1] + golden.steps


def run_decoder(session: Session, golden: Golden, label: str) -> dict[str, np.ndarray]:
    """Logits (P, steps, V) of what the cache path gives: the prompt, then the oracle's tokens one by one."""
    return run_prompts(session, golden, label, [prompt[0].tolist() for prompt in golden.calls["input_ids"]])


def run_vision(session: VisionSession, golden: Golden, label: str) -> dict[str, np.ndarray]:
    """The same with a tile before each text, seen under the selection that reads it."""
    pairs = zip(golden.calls["input_ids"], golden.calls["pixel_values"], strict=True)
    prompts = [session.place(ids[0].tolist(), session.see_tiles(tile)[0]) for ids, tile in pairs]
    return run_prompts(session, golden, label, prompts)


def run_prompts(session: Session, golden: Golden, label: str, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """Each prompt, then the oracle's tokens."""
    tokens = golden.outputs[DECIDING].expected.best[golden.selections.index(label)]
    calls = []
    for prompt, answer in zip(prompts, tokens, strict=True):
        rows = [session.logits(prompt, keep=1)[-1].copy()]
        rows += [session.extend([int(token)])[-1].copy() for token in answer[: golden.steps - 1]]
        calls.append(np.stack(rows))
    return {DECIDING: np.stack(calls)}


def run_encoder(session: EncoderSession, golden: Golden) -> dict[str, np.ndarray]:
    """The kept rows (P, R, V) of every output."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in golden.outputs}
    for index in range(golden.count):
        outputs = session.run(**{name: calls[index] for name, calls in golden.calls.items()})
        for name, output in golden.outputs.items():
            found[name].append(outputs[name].reshape(-1, outputs[name].shape[-1])[output.rows])
    return {name: np.stack(rows) for name, rows in found.items()}
