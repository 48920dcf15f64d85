"""Rounds: everything that is timed, once each; the baseline in the same round, so that a ratio is inside a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lime_edge.bench.inputs import draw_inputs, draw_prompt
from lime_edge.bench.timing import (
    Percentiles,
    compare_rounds,
    find_spread,
    percentiles,
    time_call,
    time_first_token,
    time_round,
    time_switches,
)
from lime_edge.session.decoder import Session
from lime_edge.session.encoder import EncoderSession

SWITCHES = 100  # a round
CALLS = 10  # of an encoder, a round
TIMED = ("load_ms", "load_cold_ms", "ttft_ms", "decode_ms", "run_ms", "switch_us", "switch_to_first_token_ms")
BASE = ("baseline_ttft_ms", "baseline_decode_ms", "baseline_run_ms")
RATIOS = {"decode": "decode_ms", "ttft": "ttft_ms", "run": "run_ms"}
Count = Callable[[int, int], None]


@dataclass
class Series:
    """What the rounds of one run gave.

    rounds: by name one number a round (medians, where a round holds many): TIMED and BASE, empty where a number does
    not apply. tokens: milliseconds of every decode step; calls: of every call of an encoder; switches: microseconds.
    """

    rounds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*TIMED, *BASE)})
    tokens: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)

    def note_switches(self, times: np.ndarray) -> None:
        """Microseconds of one round's switches; nothing where there is nothing to switch to."""
        if times.size:
            self.rounds["switch_us"].append(float(np.median(times)))
            self.switches += times.tolist()


def time_decoder(
    session: Session,
    baseline: Session | None,
    lengths: Sequence[int],
    count: int,
    depth: int | None,
    warmup: int,
    repeat: int,
    progress: Count,
) -> dict[int, Series]:
    """Time prompts of several lengths and `count` tokens after each; who goes first changes every round.

    Args:
        baseline: a branchless bundle's session. depth: tokens in the cache before decoding, None: the prompt's.
    """
    vocab = session.bundle.manifest.backbone.vocab
    found = {length: Series() for length in lengths}
    before = None if depth is None else draw_prompt(vocab, depth)
    for index in range(warmup + repeat):
        for place, (length, series) in enumerate(found.items()):
            progress(index * len(found) + place, (warmup + repeat) * len(found))
            prompt, kept = draw_prompt(vocab, length), series if index >= warmup else Series()
            variants = [("", session)] + ([("baseline_", baseline)] if baseline else [])
            for prefix, one in variants[:: 1 if index % 2 == 0 else -1]:
                first, steps = time_round(one, prompt, count, before)
                kept.rounds[f"{prefix}ttft_ms"].append(first * 1e3)
                kept.rounds[f"{prefix}decode_ms"].append(float(np.median(steps)) * 1e3)
                if not prefix:
                    kept.tokens += (steps * 1e3).tolist()
            kept.note_switches(time_switches(session, SWITCHES, seed=index))
            if (seconds := time_first_token(session, prompt, index)) is not None:
                kept.rounds["switch_to_first_token_ms"].append(seconds * 1e3)
    progress((warmup + repeat) * len(found), (warmup + repeat) * len(found))
    return found


def time_encoder(
    session: EncoderSession,
    baseline: EncoderSession | None,
    lengths: Sequence[int],
    warmup: int,
    repeat: int,
    progress: Count,
) -> dict[int, Series]:
    """Time calls on inputs of several lengths; who goes first changes every round."""
    found = {length: Series() for length in lengths}
    for index in range(warmup + repeat):
        for place, (length, series) in enumerate(found.items()):
            progress(index * len(found) + place, (warmup + repeat) * len(found))
            inputs, kept = draw_inputs(session, length), series if index >= warmup else Series()
            variants = [("", session)] + ([("baseline_", baseline)] if baseline else [])
            for prefix, one in variants[:: 1 if index % 2 == 0 else -1]:
                times = [time_call(lambda one=one: one.run(**inputs))[0] * 1e3 for _ in range(CALLS)]  # type: ignore[misc]  # noqa: B023
                kept.rounds[f"{prefix}run_ms"].append(float(np.median(times)))
                if not prefix:
                    kept.calls += times
            kept.note_switches(time_switches(session, SWITCHES, seed=index))
    progress((warmup + repeat) * len(found), (warmup + repeat) * len(found))
    return found


def summarize(series: Series, length: int) -> dict[str, Any]:
    """Medians, percentiles, spread, and ratios to the baseline; null for what does not apply.

    Args:
        length: tokens of the prompt.
    Returns:
        Keys of a run, as documented in docs/bench-schema.md.
    """
    rounds = series.rounds
    rates = {
        "prefill_tokens_per_s": [length * 1e3 / value for value in rounds["ttft_ms"]],
        "decode_tokens_per_s": [1e3 / value for value in rounds["decode_ms"]],
    }
    plain = {name: rounds[name] for name in ("load_ms", "load_cold_ms", "ttft_ms")} | rates
    spread = plain | {name: rounds[name] for name in ("run_ms", "switch_us", "switch_to_first_token_ms")}
    ratios = {
        name: compare_rounds(rounds[key], rounds[f"baseline_{key}"]) if rounds[f"baseline_{key}"] else None
        for name, key in RATIOS.items()
    }
    return {name: _median(values) for name, values in plain.items()} | {
        "token_ms": _percentiles(series.tokens),
        "run_ms": _percentiles(series.calls),
        "switch_us": _percentiles(series.switches),
        "switch_to_first_token_ms": _percentiles(rounds["switch_to_first_token_ms"]),
        "spread": {name: find_spread(values) for name, values in spread.items()},
        "ratios": ratios if any(ratios.values()) else None,
        "rounds": rounds,
    }


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def _percentiles(values: Sequence[float]) -> Percentiles | None:
    return percentiles(np.asarray(values)) if len(values) else None
