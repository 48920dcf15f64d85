"""Timing a session: rounds of a prompt and its answer, switches, encoder calls; medians and percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lime_edge.session.decoder import Session
from lime_edge.session.switching import ExpertSwitch

SWITCHES = 500
Percentiles = dict[str, float]


def percentiles(values: np.ndarray) -> Percentiles:
    """p50, p95 and p99, linearly interpolated."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)}


def find_spread(values: Sequence[float]) -> Percentiles | None:
    """p5 and p95 of one number a round; None without rounds."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (5, 95)} if len(values) else None


def compare_rounds(own: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """The ratio own / base: median over the rounds of the ratio inside a round, and its p5 and p95."""
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    return {"ratio": float(np.median(ratios)), "spread": find_spread(ratios)}


def time_call(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    begin = time.perf_counter()
    value = call()
    return time.perf_counter() - begin, value


def time_round(
    session: Session, prompt: list[int], count: int, before: list[int] | None = None
) -> tuple[float, np.ndarray]:
    """One prompt and `count` greedy tokens.

    Args:
        before: ids that fill the cache before decoding is timed; None decodes after the prompt.
    Returns:
        Seconds to the prompt's last logits, and seconds of every decode step (count,).
    """
    first, logits = time_call(lambda: session.logits(prompt, keep=1))
    if before is not None:
        logits = session.logits(before, keep=1)
    steps = np.empty(count)
    for index in range(count):
        token = int(logits[-1].argmax())
        begin = time.perf_counter()
        logits = session.extend([token])
        steps[index] = time.perf_counter() - begin
    return first, steps


def time_switches(session: ExpertSwitch, count: int = SWITCHES, seed: int = 0) -> np.ndarray:
    """Microseconds of `use(NAME)`, the bare swap, over all experts in random order; the selection is restored.

    Returns:
        (count,) float64; empty where there are not two experts to switch between.
    """
    if len(session.experts) < 2:
        return np.empty(0)
    before = session.selection
    session.reset()
    random = np.random.default_rng(seed)
    times = np.empty(count)
    for index in range(count):
        name = session.experts[int(random.integers(len(session.experts)))]
        begin = time.perf_counter()
        session.use(name)
        times[index] = (time.perf_counter() - begin) * 1e6
    session.use(before)
    return times


def time_first_token(session: Session, prompt: list[int], index: int) -> float | None:
    """Seconds from `use(OTHER)` to the logits of the prompt under the new expert, its new cache included.

    Args:
        index: which expert to switch to; the selection is restored. None where there are not two.
    """
    if len(session.experts) < 2:
        return None
    before = session.selection
    others = [name for name in session.experts if name != before]
    session.logits(prompt[:1], keep=1)  # a cache for the switch to throw away

    def switch() -> None:
        session.use(others[index % len(others)])
        session.logits(prompt, keep=1)

    seconds, _ = time_call(switch)
    session.use(before)
    return seconds
