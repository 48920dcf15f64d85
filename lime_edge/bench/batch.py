"""What a row of a batch costs: decode steps of several sequences at once, each with an expert of its own. numpy only.

docs/bench-schema.md says what every key means.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import lime_edge
from lime_edge.bench.inputs import draw_prompt
from lime_edge.bench.machine import describe_machine
from lime_edge.bench.tables import Table
from lime_edge.bench.timing import compare_rounds, find_spread, percentiles
from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.engines import Rows, SessionOptions
from lime_edge.session.open import open_decoder
from lime_edge.session.requests import open_rows

SCHEMA = 1
WARMUP = 1  # rounds that are thrown away
MIXED, SAME, PLAIN = "mixed", "one_expert", "plain_nodes"
OPERATORS = "LIME_EDGE_OPERATORS"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BatchOptions:
    """What to measure.

    sizes: rows at once. prompt_tokens: in each row's cache when decoding begins. gen_tokens: steps a round.
    repeat: rounds. providers: see SessionOptions.
    """

    sizes: tuple[int, ...]
    prompt_tokens: int = 128
    gen_tokens: int = 32
    repeat: int = 5
    providers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with Faults("bench, `batch`") as faults:
            if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) < len(self.sizes):
                faults.add("rows", "1 or more, each number once", ",".join(map(str, self.sizes)) or "nothing")
            for name in ("prompt_tokens", "gen_tokens", "repeat"):
                if getattr(self, name) < 1:
                    faults.add(name.replace("_", " "), "at least 1", getattr(self, name))

    @property
    def capacity(self) -> int:
        """Tokens that a row must hold."""
        return self.prompt_tokens + self.gen_tokens


@dataclass
class Steps:
    """Decode steps of one kind at one size: milliseconds of every step; per round, the median and the processor's.

    numbers: of the rows. residuals: of their experts, (sum_H,) each.
    """

    rows: Rows
    numbers: list[int]
    residuals: list[np.ndarray]
    every: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def time_round(self, vocab: int, options: BatchOptions, kept: bool) -> None:
        """Decode after the prompt, all rows in one pass a step."""
        random, wall, cpu = np.random.default_rng(0), [], []
        for row, residual in zip(self.numbers, self.residuals, strict=True):
            self.rows.rewind(row, options.prompt_tokens)
            self.rows.set_expert(row, residual)
        for _ in range(options.gen_tokens):
            tokens = random.integers(0, vocab, len(self.numbers)).tolist()
            begin, spent = time.perf_counter(), time.process_time()
            self.rows.step(self.numbers, tokens)
            wall.append((time.perf_counter() - begin) * 1e3)
            cpu.append((time.process_time() - spent) * 1e3)
        if kept:
            self.every += wall
            self.wall.append(float(np.median(wall)))
            self.cpu.append(float(np.median(cpu)))


def bench_batch(
    path: Path, target: str | None, threads: int | None, options: BatchOptions, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Measure decode steps at several numbers of rows: with experts that differ, with one for all, without operators.

    Args:
        target: None takes the bundle's first. progress: (step, done, total) -> None.
    Returns:
        The document that docs/bench-schema.md describes.
    Raises:
        LimeEdgeError: what opening raises; an engine that runs one sequence at a time; a bundle without an expert.
    """
    bundle = Bundle.open(path)
    session = open_decoder(bundle, target, SessionOptions(threads, options.capacity, options.providers))
    if not session.experts:
        raise LimeEdgeError(f"{path}: no expert to decode with", "lime-edge experts add BUNDLE FILE")
    series = _start(session, options, MIXED, SAME)
    if session.operators:
        with _without_operators():
            plain = open_decoder(bundle, target, SessionOptions(threads, options.capacity, options.providers))
        series |= _start(plain, options, PLAIN)
    _time_rounds(series, bundle.manifest.backbone.vocab, options, progress)
    return {
        "schema": SCHEMA,
        "lime_edge": lime_edge.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": str(path),
        "model": bundle.manifest.backbone.name,
        "target": session.target,
        "provider": session.provider,
        "operators": session.operators,
        "quant": bundle.manifest.quantization.quant,
        "threads": threads or bundle.manifest.targets[session.target].threads,
        "experts": len(session.experts),
        "prompt_tokens": options.prompt_tokens,
        "gen_tokens": options.gen_tokens,
        "repeat": options.repeat,
        "warmup": WARMUP,
        "machine": describe_machine(),
        "sizes": [_summarize(series, size, min(options.sizes)) for size in options.sizes],
    }


@contextmanager
def _without_operators() -> Iterator[None]:
    before = os.environ.get(OPERATORS)
    os.environ[OPERATORS] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[OPERATORS]
        else:
            os.environ[OPERATORS] = before


def _start(session: Session, options: BatchOptions, *kinds: str) -> dict[tuple[str, int], Steps]:
    """Rows of every size, their prompts read: what is timed later is decoding alone."""
    vocab, started = session.bundle.manifest.backbone.vocab, {}
    found = [session.identify(name)[0] for name in session.experts[: max(options.sizes)]]
    residuals = [residual for residual in found if residual is not None]
    for size in options.sizes:
        rows, numbers, prefix = open_rows(session, size, options.capacity, None), [], None
        for _ in range(size):  # who filled a cache changes no time: the prompt is read once
            row = rows.start(residuals[0], prefix)
            if prefix is None:
                rows.feed(row, np.array(draw_prompt(vocab, options.prompt_tokens), np.int64), 1)
                prefix = rows.save(row, options.prompt_tokens)
            numbers.append(row)
        for kind in kinds:
            own = residuals[:1] if kind == SAME else residuals
            started[kind, size] = Steps(rows, numbers, [own[index % len(own)] for index in range(size)])
    return started


def _time_rounds(series: dict[tuple[str, int], Steps], vocab: int, options: BatchOptions, progress: Progress) -> None:
    """All of them in turn, round by round, in the other order every second round."""
    rounds = WARMUP + options.repeat
    for index in range(rounds):
        for place, steps in enumerate(list(series.values())[:: 1 if index % 2 == 0 else -1]):
            progress("rows", index * len(series) + place, rounds * len(series))
            steps.time_round(vocab, options, kept=index >= WARMUP)
    progress("rows", rounds * len(series), rounds * len(series))


def _summarize(series: dict[tuple[str, int], Steps], size: int, least: int) -> dict[str, Any]:
    """One number of rows."""
    own = series[MIXED, size]
    ratios = {SAME: series[SAME, size], PLAIN: series.get((PLAIN, size))}
    return {
        "rows": size,
        "tokens_per_s": size * 1e3 / float(np.median(own.wall)),
        "spread": find_spread([size * 1e3 / value for value in own.wall]),
        "step_ms": percentiles(np.array(own.every)),
        "cpu_ms": float(np.median(own.cpu)),
        "cache_bytes": own.rows.nbytes,
        "speedup": {"rows": least, **_compare(series[MIXED, least], own, size / least)},
        **{f"to_{kind}": _compare(own, other) if other else None for kind, other in ratios.items()},
        "rounds": {
            kind: {"step_ms": steps.wall, "cpu_ms": steps.cpu} for (kind, rows), steps in series.items() if rows == size
        },
    }


def _compare(own: Steps, base: Steps, factor: float = 1.0) -> dict[str, Any]:
    """Time of `own` over that of `base`, times the factor: by the clock, and by the processor's time."""
    return {
        "clock": compare_rounds([value * factor for value in own.wall], base.wall),
        "cpu": compare_rounds([value * factor for value in own.cpu], base.cpu),
    }


def tabulate_batch(document: dict[str, Any]) -> Table:
    """A row for every number of rows."""
    least = min(size["rows"] for size in document["sizes"])
    beside = f"x {least} row{'s' if least > 1 else ''}"
    headers = ["rows", "tokens/s", "step ms, p95", beside, "mixed / one expert", "operators / nodes"]
    rows = [
        [
            str(size["rows"]),
            f"{size['tokens_per_s']:.0f}",
            f"{size['step_ms']['p50']:.1f}, {size['step_ms']['p95']:.1f}",
            *(_show(size[key]) for key in ("speedup", f"to_{SAME}", f"to_{PLAIN}")),
        ]
        for size in document["sizes"]
    ]
    return Table(_describe(document), headers, rows)


def _show(ratio: dict[str, Any] | None) -> str:
    """By the clock, with its interval."""
    if ratio is None:
        return "-"
    clock, spread = ratio["clock"]["ratio"], ratio["clock"]["spread"]
    return f"{clock:.2f} ({spread['p5']:.2f}-{spread['p95']:.2f})"


def _describe(document: dict[str, Any]) -> str:
    machine, threads = document["machine"], document["threads"]
    operators = "with operators" if document["operators"] else "without operators"
    spoken = "the engine's own threads" if threads is None else f"{threads} thread{'s' if threads > 1 else ''}"
    measured = f"{document['repeat']} rounds of {document['gen_tokens']} steps after {document['prompt_tokens']} tokens"
    return (
        f"{document['bundle']} ({document['quant']}, {document['provider']}, {operators}, "
        f"{document['experts']} experts, {measured}, {spoken}; {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load_1min']})"
    )


def write_batch_csv(document: dict[str, Any]) -> str:
    """A line for every number of rows."""
    header = "rows,tokens_per_s,step_ms_p50,step_ms_p95,cpu_ms,cache_bytes,speedup,to_one_expert,to_plain_nodes"
    lines = [header]
    for size in document["sizes"]:
        ratios: Sequence[dict[str, Any] | None] = [size["speedup"], size[f"to_{SAME}"], size[f"to_{PLAIN}"]]
        numbers = [size["rows"], size["tokens_per_s"], size["step_ms"]["p50"], size["step_ms"]["p95"]]
        numbers += [size["cpu_ms"], size["cache_bytes"], *(r["clock"]["ratio"] if r else "" for r in ratios)]
        lines.append(",".join(map(str, numbers)))
    return "\n".join(lines) + "\n"
