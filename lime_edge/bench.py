"""Latency and memory of a bundle on this machine. numpy only: it runs on the device."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lime_edge
from lime_edge import terminal
from lime_edge.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.experts import Selection, describe_selection
from lime_edge.session import Session, SessionOptions
from lime_edge.targets import open_session

SCHEMA = 1
SWITCHES = 500
FIRST = ""  # what the session opens with: the bundle's first expert
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchOptions:
    """What to measure: prompt and generated tokens per round, rounds, warm-up rounds."""

    prompt_tokens: int = 128
    gen_tokens: int = 64
    repeat: int = 5
    warmup: int = 1


def bench_bundle(path: Path, target: str | None, selection: Selection, threads: int | None,
                 options: BenchOptions, progress: Progress = lambda *_: None) -> dict[str, Any]:  # fmt: skip
    """Load a bundle and time prefill, decode and switching with one selection (FIRST: the bundle's first).

    Returns:
        Medians over the rounds, keys as documented in docs/benchmarks.md.
    """
    begin = time.perf_counter()
    length = options.prompt_tokens + options.gen_tokens + 1
    session = open_session(Bundle.open(path), target, SessionOptions(threads, length))
    loaded = time.perf_counter() - begin
    if selection != FIRST:
        session.use(selection)
    prompt = np.random.default_rng(0).integers(0, session.bundle.manifest.model["vocab"], options.prompt_tokens)
    firsts, steps = [], []
    total = options.warmup + options.repeat
    for index in range(total):
        progress("bench", index, total)
        first, decode = time_round(session, prompt.tolist(), options.gen_tokens)
        if index >= options.warmup:
            firsts.append(first)
            steps.append(decode)
    progress("bench", total, total)
    ttft = float(np.median(firsts))
    return {
        "schema": SCHEMA, "bundle": str(path), "target": session.target, "provider": session.provider,
        "expert": describe_selection(session.selection), "threads": threads,
        "quant": session.bundle.manifest.quantization["quant"],
        "prompt_tokens": options.prompt_tokens, "gen_tokens": options.gen_tokens, "repeat": options.repeat,
        "load_ms": loaded * 1e3, "ttft_ms": ttft * 1e3,
        "prefill_tokens_per_s": options.prompt_tokens / ttft,
        "decode_tokens_per_s": 1.0 / float(np.median([np.median(s) for s in steps])),
        "token_ms": percentiles(np.concatenate(steps) * 1e3),
        "switch_us": percentiles(time_switches(session)), "peak_rss_bytes": read_peak_rss(),
        "bundle_bytes": session.bundle.total_bytes, "machine": describe_machine(),
    }  # fmt: skip


def time_round(session: Session, prompt: list[int], count: int) -> tuple[float, np.ndarray]:
    """One prompt and `count` greedy tokens: seconds to the first logits, seconds of every decode step."""
    begin = time.perf_counter()
    logits = session.logits(prompt, keep=1)
    first = time.perf_counter() - begin
    steps = np.empty(count)
    for index in range(count):
        token = int(logits[-1].argmax())
        begin = time.perf_counter()
        logits = session.extend([token])
        steps[index] = time.perf_counter() - begin
    return first, steps


def time_switches(session: Session) -> np.ndarray:
    """Microseconds of `use(NAME)` over all experts in random order; the selection is restored."""
    if len(session.experts) < 2:
        return np.zeros(1)
    before = session.selection
    random = np.random.default_rng(0)
    times = np.empty(SWITCHES)
    for index in range(SWITCHES):
        name = session.experts[int(random.integers(len(session.experts)))]
        begin = time.perf_counter()
        session.use(name)
        times[index] = (time.perf_counter() - begin) * 1e6
    session.use(before)
    return times


def percentiles(values: np.ndarray) -> dict[str, float]:
    """p50, p95 and p99."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)}


def read_peak_rss() -> int:
    """Largest resident set of this process so far, in bytes (Linux: VmHWM)."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        raise LimeEdgeError("peak memory cannot be read on this platform") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def describe_machine() -> dict[str, Any]:
    """Processor, cores and versions, for the record."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
                 if line.startswith(("model name", "Model"))]  # fmt: skip
        model = names[0] if names else model
    return {
        "cpu": model, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "arch": platform.machine(), "system": platform.platform(), "python": platform.python_version(),
        "lime_edge": lime_edge.__version__,
    }  # fmt: skip


def print_report(facts: dict[str, Any]) -> None:
    """The table of `lime-edge bench`."""
    switch, token = facts["switch_us"], facts["token_ms"]
    rows = [
        ["load", f"{facts['load_ms']:.0f} ms"],
        [f"first token after {facts['prompt_tokens']}", f"{facts['ttft_ms']:.1f} ms"],
        ["prefill", f"{facts['prefill_tokens_per_s']:.0f} tokens/s"],
        ["decode", f"{facts['decode_tokens_per_s']:.1f} tokens/s"],
        ["decode step p50 / p95 / p99", " / ".join(f"{token[p]:.2f}" for p in token) + " ms"],
        ["switch p50 / p95 / p99", " / ".join(f"{switch[p]:.1f}" for p in switch) + " us"],
        ["peak memory", terminal.show_size(facts["peak_rss_bytes"])],
        ["bundle", terminal.show_size(facts["bundle_bytes"])],
    ]
    machine = facts["machine"]
    title = (f"{facts['bundle']} ({facts['quant']}, {facts['target']} on {facts['provider']}, expert "
             f"{facts['expert']}, {facts['repeat']} rounds, {machine['cpu']}, {machine['cores']} cores)")  # fmt: skip
    terminal.print_table(title, {"": "left", "median": "right"}, rows)
