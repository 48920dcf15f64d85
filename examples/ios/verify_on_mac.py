"""What a person with a Mac runs: does Core ML (or Core AI) compute what PyTorch computed, on which unit, and how fast?

    pip install 'lime-edge[coreml]'                       # or [coreai]
    python verify_on_mac.py smollm2.lime
    USE_OS_COREAI=1 python verify_on_mac.py smollm2.lime --target coreai
    python verify_on_mac.py smollm2.lime --units cpu_and_ne --iterations 100 --plan --json > mac.json

For each compute unit: every golden selection of the bundle compared as `lime-edge verify` does, then load, prompt,
decode and switch times. --plan also counts where Core ML would run each operation; --benchmarker asks coremltools' own
MLModelBenchmarker, which times the prediction without Python around it. Both are Core ML's. macOS 15 or later, for Core
AI macOS 27.

Anywhere else, --units interpreter runs the same checks on the interpreter: proof of the numbers, not of speed.
Nobody has run this on a Mac yet.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import parse_selection
from lime_edge.bundle.golden import Golden, read_golden
from lime_edge.checks.judge import judge
from lime_edge.checks.replay import run_decoder
from lime_edge.checks.report import MISSED
from lime_edge.checks.tolerance import find_compute
from lime_edge.checks.verify import find_obstacle
from lime_edge.errors import EXIT_MISMATCH, EXIT_MISSING, LimeEdgeError
from lime_edge.runtimes.coreml.decoder import COREML, INTERPRETER, ROUNDED, UNITS
from lime_edge.session.decoder import Session
from lime_edge.session.engines import SessionOptions
from lime_edge.session.kinds import DECODER, require_kind
from lime_edge.session.open import open_decoder

COREAI, COREAI_UNITS = "CoreAI", ("gpu", "cpu", "neural_engine")


class Engine(NamedTuple):
    """A target as this script runs it: the system's provider, its compute units, and what interprets elsewhere."""

    title: str
    provider: str
    units: tuple[str, ...]
    interpreters: dict[str, str]  # unit -> provider


ENGINES = {
    "coreml": Engine("Core ML", COREML, tuple(UNITS), {INTERPRETER: INTERPRETER, ROUNDED: ROUNDED}),
    "coreai": Engine("Core AI", COREAI, COREAI_UNITS, {INTERPRETER: f"{COREAI}-interpreter"}),
}


def open_bundle(path: Path, target: str) -> tuple[Bundle, Golden]:
    """The bundle, its hashes compared, and what to compare its answers with.

    Args:
        target: of ENGINES.
    Raises:
        LimeEdgeError: a damaged bundle, another kind of one, or nothing in it that can be compared.
    """
    bundle = Bundle.open(path, verify=True)
    manifest = bundle.manifest
    require_kind(bundle, DECODER)  # lime-edge verify checks the others
    if target not in manifest.targets:
        raise LimeEdgeError(
            f"{path}: expected a bundle for {target}, found {', '.join(manifest.targets)}",
            f"lime-edge export --target {target} writes one",
        )
    golden = read_golden(bundle)
    if golden is None:
        raise LimeEdgeError(
            f"{path}: holds no golden outputs to compare with",
            "export the bundle again: lime-edge export of this version stores them",
        )
    obstacles = {label: find_obstacle(bundle, golden, target, label) for label in golden.selections}
    if all(obstacles.values()):
        problem = "; ".join(f"{label}: {why}" for label, why in obstacles.items())
        raise LimeEdgeError(f"{path}: nothing could be checked: {problem}", "export the bundle again")
    return bundle, golden


def check_numbers(bundle: Bundle, golden: Golden, session: Session, target: str) -> dict[str, Any]:
    """Every golden selection: worst errors in standard deviations of the logits, greedy tokens, what was missed."""
    checks = []
    for label in golden.selections:
        if find_obstacle(bundle, golden, target, label):
            continue
        session.use(parse_selection(label))
        checks.append(judge(golden, target, label, run_decoder(session, golden, label), find_compute(bundle, target)))
    return {
        "checked": len(checks),
        "missed": [f"{c.selection}: {c.why}" for c in checks if c.result == MISSED],
        "mean_error": max(c.error or 0.0 for c in checks),
        "worst_error": max(c.worst or 0.0 for c in checks),
        "tokens_equal": f"{sum(c.agreed for c in checks)} of {sum(c.decisions for c in checks)}",
    }


def time_calls(call: Callable[[], object], iterations: int) -> dict[str, float]:
    """Milliseconds, median and 95th percentile, after one call that does not count."""
    call()
    took = []
    for _ in range(iterations):
        begun = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - begun))
    return {"p50_ms": round(statistics.median(took), 3), "p95_ms": round(float(np.percentile(took, 95)), 3)}


def time_session(bundle: Bundle, session: Session, target: str, iterations: int) -> dict[str, dict[str, float]]:
    """Prompts of every enumerated length, one decode step, and switching between two experts."""
    ids = np.random.default_rng(0).integers(0, bundle.manifest.backbone.vocab, session.max_length)
    names, found = session.experts, {}
    for length in bundle.manifest.targets[target].lengths:
        if 1 < length < session.max_length:
            prompt = ids[:length].tolist()
            found[f"prompt {length}"] = time_calls(lambda p=prompt: session.logits(p, keep=1), iterations)  # type: ignore[misc]
    room = session.max_length - 2
    session.logits(ids[: max(1, min(32, room // 2))].tolist(), keep=1)
    steps = max(1, min(iterations, room - session._engine.length))
    found["decode"] = time_calls(lambda: session.extend([int(ids[0])]), steps)
    if len(names) > 1:
        turn = iter(range(1 << 30))
        found["switch"] = time_calls(lambda: session.use(names[next(turn) % 2]), iterations)
    return found


def count_devices(bundle: Bundle, units: str) -> dict[str, int]:  # pragma: no cover - needs a Mac
    """Where Core ML plans to run the operations of `main`, by device class."""
    import coremltools
    from coremltools.models.compute_plan import MLComputePlan

    compiled = coremltools.models.utils.compile_model(str(bundle.path / bundle.manifest.targets["coreml"].file))
    plan = MLComputePlan.load_from_path(path=compiled, compute_units=getattr(coremltools.ComputeUnit, UNITS[units]))
    counts: Counter[str] = Counter()
    for operation in plan.model_structure.program.functions["main"].block.operations:
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is not None:
            counts[type(usage.preferred_compute_device).__name__] += 1
    return dict(counts)


def ask_benchmarker(bundle: Bundle, units: str, iterations: int) -> dict[str, Any]:  # pragma: no cover - needs a Mac
    """coremltools' own timing of load and prediction, milliseconds."""
    import coremltools
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

    facts = bundle.manifest.targets["coreml"]
    model = coremltools.models.MLModel(
        str(bundle.path / facts.file),
        compute_units=getattr(coremltools.ComputeUnit, UNITS[units]),
        function_name="main" if facts.routed else None,
    )
    benchmarker = MLModelBenchmarker(model=model)

    async def measure() -> dict[str, Any]:
        load = await benchmarker.benchmark_load(iterations=3)
        found = {"load": load.statistics.median}
        for length in facts.lengths:
            inputs = {
                "input_ids": np.zeros((1, length), np.int32),
                "position": np.zeros(1, np.int32),
                "length": np.full(1, length, np.int32),
            }
            if facts.expert_input:
                inputs["expert"] = np.zeros(bundle.manifest.sites.total, np.float32)
            took = await benchmarker.benchmark_predict(inputs=inputs, iterations=iterations, warmup=True)
            found[f"{length} tokens"] = took.statistics.median
        return found

    return asyncio.run(measure())


def examine(bundle: Bundle, golden: Golden, units: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one compute unit."""
    engine = ENGINES[options.target]
    provider = engine.interpreters.get(units) or f"{engine.provider}:{units}"
    begun = time.perf_counter()
    session = open_decoder(bundle, options.target, SessionOptions(providers=(provider,)))
    found: dict[str, Any] = {"provider": session.provider, "load_s": round(time.perf_counter() - begun, 2)}
    found["numbers"] = check_numbers(bundle, golden, session, options.target)
    found["times"] = time_session(bundle, session, options.target, options.iterations)
    if provider.startswith(COREML):  # pragma: no cover - needs a Mac
        found |= {"devices": count_devices(bundle, units)} if options.plan else {}
        found |= {"benchmarker": ask_benchmarker(bundle, units, options.iterations)} if options.benchmarker else {}
    return found


def show(units: str, found: dict[str, Any]) -> None:
    """One compute unit for a reader."""
    print(f"\n{units}: loaded in {found['load_s']} s")
    for name, value in found["numbers"].items():
        print(f"  {name}: {value}")
    for name, took in found["times"].items():
        print(f"  {name}: {took['p50_ms']} ms (p95 {took['p95_ms']})")
    for part in ("devices", "benchmarker"):
        for name, value in found.get(part, {}).items():
            print(f"  {part}, {name}: {value}")


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; refuses a unit that nobody knows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", choices=ENGINES, default="coreml")
    units = f"some of {', '.join(UNITS)}, {INTERPRETER}, {ROUNDED}; coreai: of {', '.join(COREAI_UNITS)}, {INTERPRETER}"
    parser.add_argument("--units", help=f"{units}; on a Mac all, elsewhere {INTERPRETER}")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--plan", action="store_true", help="count where each operation would run (Core ML)")
    parser.add_argument("--benchmarker", action="store_true", help="coremltools' own timing too (Core ML)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    engine = ENGINES[options.target]
    default = engine.units if sys.platform == "darwin" else (INTERPRETER,)
    options.units = options.units.split(",") if options.units else list(default)
    if unknown := set(options.units) - {*engine.units, *engine.interpreters}:
        parser.error(f"--units: unknown: {', '.join(sorted(unknown))}")
    if options.iterations < 1:
        parser.error("--iterations: at least 1")
    if sys.platform != "darwin" and set(options.units) & set(engine.units):
        raise LimeEdgeError(
            f"{engine.title} needs a Mac", f"--units {INTERPRETER} proves the numbers anywhere", EXIT_MISSING
        )
    for name in ("plan", "benchmarker"):
        if getattr(options, name) and (options.target != "coreml" or not set(options.units) & set(UNITS)):
            parser.error(
                f"--{name}: expected --units with some of {', '.join(UNITS)}, "
                f"found {', '.join(options.units)}: only Core ML on a Mac can tell"
            )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Examine every unit; 3 where the numbers missed."""
    try:
        options = read_options(arguments)
        bundle, golden = open_bundle(options.bundle, options.target)
        found = {units: examine(bundle, golden, units, options) for units in options.units}
    except LimeEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps({"bundle": str(options.bundle), "units": found}, indent=1))
    else:
        for units, facts in found.items():
            show(units, facts)
    return EXIT_MISMATCH if any(facts["numbers"].get("missed") for facts in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
