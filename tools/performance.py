"""Where a decode step's time goes, and what each idea in the graph is worth: docs/performance.json.

Compiles SmolLM2-135M with the routed demo checkpoint (rounded to the nearest: no speed depends on how), writes every
variant of tools/graph_variants.py, decodes with all of them in turn, round by round, in one process, and profiles
three of them. `make performance` runs it; tools/performance_page.py puts the results into docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from graph_variants import VARIANTS, write_variant
from performance_page import write_page

from lime_edge import terminal
from lime_edge.bench.measure import describe_machine
from lime_edge.bundle.staging import write_file
from lime_edge.cli.demo import find_backbone
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.exporters.onnx.experts import EXPERT
from lime_edge.runtimes.onnx.operators import find_library

ADAPTER = Path("examples/demo_adapter/routed")
PROFILED = ("branchless", "pinned", "routed")
PROMPT, CAPACITY = 32, 256
RESULTS = Path("docs/performance.json")


class Decoding:
    """One variant's graph, loaded, with its cache bound; `step` decodes one token."""

    def __init__(self, path: Path, model: CompiledModel, threads: int, profile: bool = False):
        settings = ort.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = threads, 3
        if library := find_library():
            settings.register_custom_ops_library(str(library))
        settings.enable_profiling, settings.profile_file_prefix = profile, str(path.with_suffix(""))
        self.session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.held: list[ort.OrtValue] = []
        config = model.decoder
        for layer in range(len(config.layers)):
            for kind in ("key", "value"):
                cache = self._hold(np.zeros((1, config.kv_heads, CAPACITY, config.head_dim), np.float32))
                self.binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", cache)
                self.binding.bind_ortvalue_output(f"present.{layer}.{kind}", cache)
        self.binding.bind_ortvalue_input("logits_to_keep", self._hold(np.ones(1, np.int64)))
        self.binding.bind_ortvalue_output("logits", self._hold(np.zeros((1, 1, config.vocab), np.float32)))
        residual = np.random.default_rng(0).normal(0, 0.1, model.sites.total).astype(np.float32)
        if any(entry.name == EXPERT for entry in self.session.get_inputs()):
            self.binding.bind_ortvalue_input(EXPERT, self._hold(residual[None]))
        self.mask, self.length = np.ones((1, CAPACITY), np.int64), 0

    def _hold(self, array: np.ndarray) -> ort.OrtValue:
        """An OrtValue over an array that lives as long as this object."""
        self.held.append(array)
        return ort.OrtValue.ortvalue_from_numpy(array)

    def feed(self, ids: list[int]) -> None:
        """Append tokens to the cache."""
        self.length += len(ids)
        array, mask = np.array([ids], np.int64), np.ascontiguousarray(self.mask[:, : self.length])
        self.binding.bind_ortvalue_input("input_ids", ort.OrtValue.ortvalue_from_numpy(array))
        self.binding.bind_ortvalue_input("attention_mask", ort.OrtValue.ortvalue_from_numpy(mask))
        self.session.run_with_iobinding(self.binding)

    def decode(self, steps: int) -> float:
        """Median seconds of a decode step after a fresh prompt."""
        self.length = 0
        self.feed(list(range(100, 100 + PROMPT)))
        times = []
        for index in range(steps):
            begin = time.perf_counter()
            self.feed([200 + index])
            times.append(time.perf_counter() - begin)
        return statistics.median(times)


def compare(
    paths: dict[str, Path], model: CompiledModel, threads: int, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Every variant in turn, round by round; a first round warms up."""
    loaded = {name: Decoding(path, model, threads) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in loaded}
    with terminal.show_steps() as progress:
        for index in range(rounds + 1):
            progress(f"{threads} threads", index, rounds + 1)
            for name, decoding in loaded.items():
                seconds = decoding.decode(steps)
                if index:
                    times[name].append(seconds)
        progress(f"{threads} threads", rounds + 1, rounds + 1)
    rows = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times[VARIANTS[name].base], strict=True)]
        spread = [float(np.percentile(ratios, q)) for q in (25, 75)]
        rows.append(
            {
                "variant": name,
                "decode_ms": statistics.median(own) * 1e3,
                "ratio": statistics.median(ratios),
                "quartiles": spread,
            }
        )
    return rows


def profile(path: Path, model: CompiledModel, threads: int, steps: int) -> list[dict[str, Any]]:
    """Kernel time of one decode step by operator. Profiling itself costs time."""
    decoding = Decoding(path, model, threads, profile=True)
    decoding.decode(steps)
    log = Path(decoding.session.end_profiling())
    events = json.loads(log.read_text())
    log.unlink()
    begin = [event["ts"] for event in events if event["name"] == "model_run"][-steps]
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= begin:
            spent[event["args"]["op_name"]].append(event["dur"])
    rows = [{"op": op, "us": sum(all_) / steps, "nodes": len(all_) / steps} for op, all_ in spent.items()]
    return sorted(rows, key=lambda row: -row["us"])


def main() -> None:
    """Measure, write docs/performance.json and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=list(VARIANTS),
        default=list(VARIANTS),
        help="those and what they are compared with; no page then",
    )
    arguments = parser.parse_args()
    bases = {VARIANTS[name].base for name in arguments.variants}
    variants = {name: variant for name, variant in VARIANTS.items() if name in (*arguments.variants, *bases)}
    checkpoint = read_checkpoint(find_backbone(), ADAPTER)
    model = compile_checkpoint(checkpoint, CompileOptions(rounding="nearest"))
    del checkpoint
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{index}.onnx" for index, name in enumerate(variants)}
        nodes = {name: write_variant(model, variants[name], path) for name, path in paths.items()}
        decoding = [
            {"threads": count, "rows": compare(paths, model, count, arguments.rounds, arguments.steps)}
            for count in arguments.threads
        ]
        if len(variants) < len(VARIANTS):
            print(json.dumps(decoding, indent=1))
            return
        profiles = {name: profile(paths[name], model, arguments.threads[0], arguments.steps) for name in PROFILED}
    results = {
        "machine": describe_machine(),
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "prompt_tokens": PROMPT,
        "operators": find_library() is not None,
        "model": "SmolLM2-135M, int4 with sensitive matrices at int8",
        "versions": {name: importlib.metadata.version(name) for name in ("lime-edge", "onnxruntime", "numpy")},
        "predicted": {name: variant.predicted for name, variant in VARIANTS.items()},
        "nodes": nodes,
        "bases": {name: variant.base for name, variant in VARIANTS.items()},
        "decoding": decoding,
        "profile_threads": arguments.threads[0],
        "profiles": profiles,
    }
    write_file(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    write_page(results)


if __name__ == "__main__":
    main()
