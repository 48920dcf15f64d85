"""The benchmark: time, memory and energy of a bundle on this machine, as one document. numpy only.

docs/bench-schema.md says what every key means and how it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lime_edge
from lime_edge.bench.energy import find_meter
from lime_edge.bench.load import Loads, time_loads
from lime_edge.bench.lora import size_lora
from lime_edge.bench.machine import SYS, count_cores, describe_machine, measure_copy, read_temperature
from lime_edge.bench.memory import FIRST, MemoryRequest, find_imports, measure_experts, measure_stages
from lime_edge.bench.rounds import summarize
from lime_edge.bench.throttling import find_throttling, read_state
from lime_edge.bench.timing import percentiles, time_round, time_switches
from lime_edge.bench.work import Load, Work, find_work
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import ROUTED, Selection, describe_selection
from lime_edge.errors import EXIT_MISSING, Faults, LimeEdgeError
from lime_edge.session.engines import SessionOptions
from lime_edge.session.open import load_engine, open_any
from lime_edge.session.switching import ExpertSwitch

__all__ = [
    "FIRST",
    "SCHEMA",
    "BenchOptions",
    "bench_bundle",
    "describe_machine",
    "percentiles",
    "time_round",
    "time_switches",
]

SCHEMA = 2
LOADS = 5  # loads timed cold and warm, at most
INTERPRETER = "interpreter"  # the provider of a runtime that only imitates its engine
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    prompt_tokens: length of the prompt; several lengths make several runs. gen_tokens: decoded per round. repeat,
    warmup: rounds counted, rounds thrown away first. depth: tokens in the cache before decoding is timed, None: the
    prompt's. baseline: a `single` bundle of the same backbone. providers: see SessionOptions. sysfs: where the
    kernel shows its sensors.
    """

    prompt_tokens: int | tuple[int, ...] = 128
    gen_tokens: int = 128
    repeat: int = 5
    warmup: int = 1
    depth: int | None = None
    baseline: Path | None = None
    providers: tuple[str, ...] = ()
    sysfs: Path = SYS

    def __post_init__(self) -> None:
        with Faults("bench") as faults:
            numbers = {
                "prompt tokens": min(self.lengths, default=0),
                "generated tokens": self.gen_tokens,
                "repeat": self.repeat,
                "depth": 1 if self.depth is None else self.depth,
            }
            for name, number in numbers.items():
                if number < 1:
                    faults.add(name, "at least 1", number)
            if len(set(self.lengths)) < len(self.lengths):
                faults.add("prompt tokens", "each length once", ",".join(map(str, self.lengths)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The prompt lengths."""
        return (self.prompt_tokens,) if isinstance(self.prompt_tokens, int) else self.prompt_tokens

    @property
    def load(self) -> Load:
        """What a model is given to do."""
        return Load(self.lengths, self.gen_tokens, self.depth)


@dataclass(frozen=True)
class Job:
    """One target of one bundle, and how to measure it."""

    bundle: Bundle
    target: str
    selection: Selection
    threads: int | None
    options: BenchOptions
    progress: Progress

    @property
    def used_threads(self) -> int:
        """Threads of the engine: asked for, the bundle's, or one a core."""
        return self.threads or self.bundle.manifest.targets[self.target].threads or count_cores()

    @property
    def work(self) -> Work:
        """What its kind of model is given to do."""
        return find_work(self.bundle)

    def tell(self, step: str) -> Callable[[int, int], None]:
        """Progress of one step: (done, total) -> None."""
        return lambda done, total: self.progress(f"{self.target} {step}", done, total)

    def open(self, bundle: Bundle) -> ExpertSwitch:
        """A session of `bundle` on the target.

        Raises:
            LimeEdgeError: what opening raises, or the runtime only imitates its engine.
        """
        session = open_any(
            bundle, self.target, SessionOptions(self.threads, self.options.load.filled, self.options.providers)
        )
        if session.provider.startswith(INTERPRETER):
            raise LimeEdgeError(
                f"{self.target} runs in an interpreter here: its times say nothing about a device",
                f"leave out `target={self.target}`, or run lime-edge bench where the engine itself runs",
                EXIT_MISSING,
            )
        return session

    def use(self, session: ExpertSwitch) -> None:
        """Switch to the selection."""
        if self.selection != FIRST:
            session.use(self.selection)


def bench_bundle(
    path: Path,
    target: str | Sequence[str] | None,
    selection: Selection,
    threads: int | None,
    options: BenchOptions,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Measure a bundle with one selection (FIRST: the bundle's first expert).

    Args:
        target: one or several; None takes the bundle's first. progress: (step, done, total) -> None.
    Returns:
        The document that docs/bench-schema.md describes: the first run's keys, the machine, all runs.
    Raises:
        LimeEdgeError: what opening raises; a baseline that is no branchless bundle of the same backbone; a runtime
            that is an interpreter.
    """
    bundle = Bundle.open(path)
    names = [target] if target is None or isinstance(target, str) else list(target)
    names = [load_engine(bundle, name)[0] for name in names]  # imports are not loads
    _check(bundle, names, options)
    machine, before = describe_machine(options.sysfs), read_state(options.sysfs)
    jobs = [Job(bundle, name, selection, threads, options, progress) for name in names]
    for job in jobs:  # what cannot run is refused before anything is timed, and the first load warms up
        job.use(job.open(bundle))
    speeds = _measure_copies(jobs)
    runs = [run for job in jobs for run in _bench_target(job, speeds.get(job.used_threads))]
    after = read_state(options.sysfs)
    return {
        "schema": SCHEMA,
        "lime_edge": lime_edge.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": str(path),
        "model": bundle.manifest.backbone.name,
        "fingerprint": bundle.manifest.backbone.fingerprint,
        **runs[0],
        "machine": machine,
        "state": {"before": before.describe(), "after": after.describe()},
        "throttled": find_throttling(before, after),
        "device": None,
        "runs": runs,
    }


def _check(bundle: Bundle, targets: list[str], options: BenchOptions) -> None:
    """Refuse before anything is timed."""
    context = bundle.manifest.backbone.context  # pictures have none
    needed = find_work(bundle).count_tokens(options.load)
    with Faults(str(bundle.path)) as faults:
        if context and needed > context:
            faults.add("tokens of the prompt (or `depth`) and the answer", f"at most {context}", needed)
        if len(set(targets)) < len(targets):
            faults.add("targets", "each once", ", ".join(targets))
    if options.baseline is not None:
        check_baseline(bundle, Bundle.open(options.baseline), targets)


def check_baseline(bundle: Bundle, baseline: Bundle, targets: list[str]) -> None:
    """Refuse a baseline that overheads cannot be measured against.

    Raises:
        LimeEdgeError: it has branches (not `single`), another backbone, other weights, or lacks a target.
    """
    own, base = bundle.manifest, baseline.manifest
    hint = "export the same checkpoint with `single`, everything else as before"
    with Faults(f"{baseline.path} as baseline", hint) as faults:
        if not base.adapter.single:
            faults.add("branches", "none (`single`)", "a bundle with expert branches")
        mine, others = own.backbone.fingerprint, base.backbone.fingerprint
        if mine != others:
            faults.add("backbone fingerprint", mine[:16], others[:16])
        for key in ("quant", "group", "matrices"):
            wanted, found = getattr(own.quantization, key), getattr(base.quantization, key)
            if found != wanted:
                faults.add(key, wanted, found)
        for target in set(targets) - set(base.targets):
            faults.add("targets", target, ", ".join(base.targets))


def _bench_target(job: Job, copy: float | None) -> list[dict[str, Any]]:
    """A run for every prompt length, on one target.

    Args:
        copy: bytes per second of a copy of memory with as many threads.
    """
    options, target = job.options, job.bundle.manifest.targets[job.target]
    loads = _time_loads(job)
    session = job.open(job.bundle)
    job.use(session)
    baseline = job.open(Bundle.open(options.baseline)) if options.baseline else None
    heat = read_temperature(options.sysfs)
    found = job.work.time(session, baseline, options.load, options.warmup, options.repeat, job.tell("rounds"))
    heat_after = read_temperature(options.sysfs)
    facts = {
        "kind": job.work.name,
        "target": job.target,
        "provider": session.provider,
        "operators": session.operators,
        "expert": describe_selection(session.selection),
        "quant": job.bundle.manifest.quantization.quant,
        "threads": job.threads or target.threads,
        "repeat": options.repeat,
        "warmup": options.warmup,
        "cache_dropped": loads.dropped,
        "bundle_bytes": job.bundle.total_bytes,
        "temperature_c": None if heat is None else {"before": heat, "after": heat_after},
        "expert_bytes": _size_experts(job.bundle),
    }
    meter = find_meter(options.sysfs)
    energy = {length: meter and job.work.spend(meter, session, options.load, length) for length in found}
    text = job.work.takes_text(session)
    del session, baseline  # the memory of the machine belongs to the fresh process now
    tell = job.tell("memory")
    tell(0, len(found) + 2)
    modules = find_imports(_ask_memory(job, job.selection, 1, None, 1))
    tell(1, len(found) + 2)
    experts = _count_experts(job)
    runs = []
    for place, (length, series) in enumerate(found.items()):
        tell(place + 2, len(found) + 2)
        series.rounds |= {"load_ms": [t * 1e3 for t in loads.warm], "load_cold_ms": [t * 1e3 for t in loads.cold]}
        summary = summarize(series, length)
        ratios = summary.pop("ratios")
        runs.append(
            {
                **facts,
                "prompt_tokens": length if text else None,
                **job.work.describe(options.load, length),
                **summary,
                **_measure_stages(job, length, modules, experts),
                "energy": energy[length],
                "bandwidth": _compare_bandwidth(job, copy, summary["decode_tokens_per_s"]),
                "baseline": ratios and {"bundle": str(options.baseline), **ratios},
            }
        )
    tell(len(found) + 2, len(found) + 2)
    return runs


def _measure_copies(jobs: list[Job]) -> dict[int, float]:
    """Bytes per second by number of threads: measured once, so that targets are compared with one number."""
    wanted = sorted({job.used_threads for job in jobs if job.work.decodes})
    found = {}
    for place, threads in enumerate(wanted):
        jobs[0].progress("copying memory", place, len(wanted))
        found[threads] = measure_copy(threads)
        jobs[0].progress("copying memory", place + 1, len(wanted))
    return found


def _time_loads(job: Job) -> Loads:
    files = [job.bundle.path / name for name in job.bundle.manifest.files]
    count, tell = min(job.options.repeat, LOADS), job.tell("loads")
    done = 0

    def load() -> Any:
        nonlocal done
        tell(done, 2 * count)
        done += 1
        return job.open(Bundle.open(job.bundle.path))

    loads = time_loads(load, files, count)
    tell(2 * count, 2 * count)
    return loads


def _size_experts(bundle: Bundle) -> dict[str, int | None] | None:
    """Bytes of one expert: its file, its vector in memory, its float32 residual while it is kept ready; and of a LoRA
    in its place."""
    manifest = bundle.manifest
    if not manifest.experts:
        return None
    wide = manifest.adapter.expert_dtype == "float32"
    total = manifest.sites.total
    return {
        "file": manifest.find_expert(manifest.experts[0]).size,
        "vector": total * (4 if wide else 2),
        "ready": total * 4,
        "lora": size_lora(manifest),
    }


def _ask_memory(
    job: Job, selection: Selection, tokens: int, before: int | None, decoded: int, modules: tuple[str, ...] = ()
) -> MemoryRequest:
    path, providers = str(job.bundle.path), job.options.providers
    return MemoryRequest(path, job.target, selection, job.threads, tokens, before, decoded, modules, providers)


def _count_experts(job: Job) -> dict[str, Any] | None:
    """Memory with 1, 10, 100 experts; None where no expert can be installed."""
    manifest = job.bundle.manifest
    if manifest.adapter.single or not manifest.experts:
        return None
    tokens = min(job.options.lengths)
    return measure_experts(_ask_memory(job, FIRST, tokens, None, 1))


def _measure_stages(job: Job, length: int, modules: tuple[str, ...], experts: dict[str, Any] | None) -> dict[str, Any]:
    """Memory by stage in a fresh process; the routed graph counts when it is what runs."""
    options = job.options
    stages = measure_stages(_ask_memory(job, job.selection, length, options.depth, options.gen_tokens, modules))
    peak, imports = stages["switches"]["peak_bytes"], stages["imports"]["rss_bytes"]
    net = None if peak is None or imports is None else peak - imports
    return {
        "peak_rss_bytes": peak,
        "memory": {"net_peak_bytes": net, "artifact_bytes": size_artifact(job), "stages": stages, "experts": experts},
    }


def size_artifact(job: Job) -> int:
    """Bytes of what the selection runs: its graph, pinned or routed, and the weights beside it (FILE.*, FILE/*)."""
    target, files = job.bundle.manifest.targets[job.target], job.bundle.manifest.files
    file = chosen = target.file
    if job.selection == ROUTED and target.routed in files:  # else it is a part of the same file
        chosen = target.routed
    beside = tuple(f"{name}{mark}" for name in (file, chosen) for mark in "./")
    return sum(entry.size for name, entry in files.items() if name == chosen or name.startswith(beside))


def _compare_bandwidth(job: Job, copy: float | None, rate: float | None) -> dict[str, Any] | None:
    """How near decoding comes to what memory can do: the artifact's bytes per token, at this rate, beside a copy."""
    if copy is None or rate is None:
        return None
    size = size_artifact(job)
    return {
        "threads": job.used_threads,
        "copy_bytes_per_s": copy,
        "weight_bytes_per_token": size,
        "read_bytes_per_s": size * rate,
        "fraction": size * rate / copy,
    }
