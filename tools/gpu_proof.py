"""The proof on a machine with an NVIDIA GPU and no network: answers, placement, speed, switches, rows; JSON on stdout.

    python -m lime_edge.runtimes.onnx.operators.build_cuda           # optional: the branch as one operator
    python tools/gpu_proof.py BUNDLE [--single BUNDLE] [--oracle FILE] [--eval FOLDER] > docs/benchmarks-gpu.json

BUNDLE is what `lime-edge export ... --device jetson` wrote, --single the same model with one expert and no branch,
--oracle what tools/oracle_tokens.py made, --eval a folder of EXPERT.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

with contextlib.suppress(ImportError):
    import torch  # noqa: F401 - its CUDA libraries are then found by onnxruntime

import onnxruntime
from oracle_tokens import compare

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.checks.evaluate import evaluate, read_examples
from lime_edge.checks.verify import verify_bundle
from lime_edge.runtimes.onnx.operators import explain_cuda_absence
from lime_edge.targets.entries import OnnxFacts

PROMPT, STEPS, REPEATS, LENGTH = 512, 128, 7, 1024
SWITCHES = 10_000


def main() -> None:
    """Run everything and print one document; what fails is in it as text, and the exit code is 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--single", type=Path)
    parser.add_argument("--oracle", type=Path)
    parser.add_argument("--eval", type=Path, dest="examples")
    parser.add_argument("--only", nargs="*", help="these steps only")
    given = parser.parse_args()
    facts: dict[str, Any] = {"machine": describe()}
    steps: dict[str, Callable[[], Any]] = {
        "placement": lambda: lime_edge.open(given.bundle, target="onnx").placement,
        "decode": lambda: time_decode(given.bundle, given.single),
        "prefill": lambda: time_prefill(given.bundle),
        "switch": lambda: time_switch(given.bundle),
        "switches_equal_fresh_sessions": lambda: check_switches(given.bundle),
        "rows": lambda: time_rows(given.bundle),
        "verify": lambda: verify(given.bundle),
        "oracle": lambda: compare(given.oracle, given.bundle) if given.oracle else "not asked for",
        "accuracy": lambda: measure_accuracy(given.bundle, given.examples) if given.examples else "not asked for",
    }
    steps = {name: run for name, run in steps.items() if not given.only or name in given.only}
    failed = False
    for name, run in steps.items():
        try:
            facts[name] = run()
        except Exception as error:  # one step must not hide the others
            facts[name], failed = f"{type(error).__name__}: {error}", True
        print(name, json.dumps(facts[name])[:1500], file=sys.stderr, flush=True)
    print(json.dumps(facts, indent=1))
    sys.exit(failed)


def describe() -> dict[str, str]:
    """Card, driver, versions."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {"card": card, "onnxruntime": onnxruntime.__version__, "lime_edge": lime_edge.__version__} | {
        "operators": explain_cuda_absence() or "the CUDA operators"
    }


def greedy(session: Any, ids: list[int], count: int) -> list[int]:
    """Token ids that follow, the largest logit each."""
    token, answer = int(session.logits(ids, 1)[-1].argmax()), []
    for _ in range(count):
        answer.append(token)
        token = int(session.extend([token])[-1].argmax())
    return answer


@contextlib.contextmanager
def opened(bundle: Path, selection: Any = "first") -> Iterator[Any]:
    """A session on the GPU."""
    session = lime_edge.open_decoder(bundle, max_length=LENGTH)
    assert session.provider.startswith("CUDA"), session.provider
    if selection != "first":
        session.use(selection)
    yield session


def draw(count: int, seed: int = 0) -> list[int]:
    """Token ids of no meaning."""
    return np.random.default_rng(seed).integers(0, 40000, count).tolist()


def summarize(times: list[float]) -> dict[str, float]:
    """Median and range, milliseconds."""
    return {"ms": 1e3 * statistics.median(times), "min": 1e3 * min(times), "max": 1e3 * max(times)}


def time_decode(bundle: Path, single: Path | None) -> dict[str, Any]:
    """A decode step, sampling included, pinned, routed and without a branch, in alternating rounds."""
    wanted: dict[str, tuple[Path, Any]] = {
        "pinned": (bundle, "first"),
        "none": (bundle, None),
    }
    if Bundle.open(bundle).manifest.facts_of(OnnxFacts).routed:
        wanted["routed"] = (bundle, "routed")
    if single is not None:
        wanted["branchless"] = (single, "first")
    with contextlib.ExitStack() as stack:
        sessions = {name: stack.enter_context(opened(*how)) for name, how in wanted.items()}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(REPEATS):
            for name, session in sessions.items():
                token = int(session.logits(draw(32), 1)[-1].argmax())
                session.extend([token])
                begin = time.perf_counter()
                for _ in range(STEPS):
                    token = int(session.extend([token])[-1].argmax())
                times[name].append((time.perf_counter() - begin) / STEPS)
    shown: dict[str, Any] = {
        name: summarize(one) | {"tokens_per_s": 1 / statistics.median(one)} for name, one in times.items()
    }
    if single is not None:
        shown["pinned_over_branchless"] = statistics.median(
            mine / base for mine, base in zip(times["pinned"], times["branchless"], strict=True)
        )
    return shown


def time_prefill(bundle: Path) -> dict[str, float]:
    """A prompt of PROMPT tokens, its last logits on the host."""
    times = []
    with opened(bundle) as session:
        for turn in range(REPEATS + 2):
            begin = time.perf_counter()
            session.logits(draw(PROMPT, turn), 1)
            times.append(time.perf_counter() - begin)
    times = times[2:]
    return summarize(times) | {"tokens_per_s": PROMPT / statistics.median(times)}


def time_switch(bundle: Path) -> dict[str, float]:
    """`use` of another expert with a captured step."""
    times = []
    with opened(bundle) as session:
        session.logits(draw(8), 1)
        session.extend([1])
        for turn in range(1000):
            name = session.experts[turn % len(session.experts)]
            begin = time.perf_counter()
            session.use(name, keep_cache=True)
            times.append(time.perf_counter() - begin)
    return {"p50_us": 1e6 * float(np.percentile(times, 50)), "p95_us": 1e6 * float(np.percentile(times, 95))}


def read_gpu_memory() -> int:
    """MiB in use on the card."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def check_switches(bundle: Path) -> dict[str, Any]:
    """Answers of one session that switches SWITCHES times equal those of sessions of their own; memory stays flat."""
    ids, fresh = draw(24, 5), {}
    with opened(bundle) as session:
        names: list[Any] = [*session.experts, None]
    for name in names:
        with opened(bundle, name) as session:
            fresh[name] = greedy(session, ids, 8)
    assert len({tuple(answer) for answer in fresh.values()}) > 1, "all experts answer the same"
    wrong = 0
    with opened(bundle) as session:
        memory = []
        for turn, choice in enumerate(np.random.default_rng(1).integers(0, len(names), SWITCHES)):
            session.use(names[choice])
            wrong += greedy(session, ids, 8) != fresh[names[choice]]
            if turn % (SWITCHES // 4) == SWITCHES // 8:
                memory.append(read_gpu_memory())
    assert not wrong, f"{wrong} of {SWITCHES} answers differ"
    return {"equal": f"{SWITCHES} of {SWITCHES}", "distinct": len({tuple(a) for a in fresh.values()}), "MiB": memory}


def measure_accuracy(bundle: Path, folder: Path) -> dict[str, Any]:
    """Share of correct answers of every expert on its own task, and the mean."""
    found = {}
    with opened(bundle) as session:
        for name in session.experts:
            session.use(name)
            found[name] = evaluate(session, read_examples(folder / f"{name}.jsonl")).accuracy
    return {"mean": statistics.mean(found.values()), "tasks": found}


def time_rows(bundle: Path) -> dict[str, Any]:
    """Aggregate tokens/s of rows with different experts; rows of float16 equal a single session's choices."""
    shown: dict[str, Any] = {}
    with opened(bundle) as session:
        engine, bank = session._engine, session._bank
        for count in (1, 2, 4, 8, 16, 32):
            rows = engine.open_rows(count, 256)
            taken = [rows.start(bank.residual(session.experts[i % len(session.experts)])) for i in range(count)]
            tokens = [int(rows.feed(row, np.array(draw(24, 5)), 1)[-1].argmax()) for row in taken]
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                for _ in range(30):
                    tokens = [int(row.argmax()) for row in rows.step(taken, tokens)]
                times.append((time.perf_counter() - begin) / 30)
            shown[str(count)] = {"tokens_per_s": count / statistics.median(times)}
        one = shown["1"]["tokens_per_s"]
        shown["32_over_1"] = shown["32"]["tokens_per_s"] / one
    return shown


def verify(bundle: Path) -> dict[str, Any]:
    """What `lime-edge verify` finds: every expert, a blend, none and routed against the oracle's golden outputs."""
    report = verify_bundle(bundle, ["onnx"])
    assert report.checks and not report.missed, report.describe()
    return report.describe()


if __name__ == "__main__":
    main()
