"""Four ways to hold 1, 10 and 100 skills on one backbone: whole copies, LoRA of rank 64, LiME, prompt tuning.

All on ONNX Runtime with the same int4 weights. What does not fit on the disk that it may use is left out, by name.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from children import Child, EngineError
from prepare import Models

METHODS = ("copies", "lora", "lime", "prompt")
ENGINES = {"copies": "ours", "lora": "lora", "lime": "ours", "prompt": "prompt"}
SWITCHES, RELOADS = 200, 5
Row = dict[str, Any]


def compare_methods(
    models: Models,
    counts: list[int],
    threads: int,
    rounds: int,
    lengths: tuple[int, int],
    disk: float,
    told: Callable[[str], None],
) -> dict[str, Any]:
    """Measure every method at every number of experts.

    Args:
        counts: numbers of experts. lengths: tokens of the prompt, tokens decoded. disk: bytes that one method may take.
    Returns:
        rows, and left_out: "method, count" -> reason.
    """
    rows: list[Row] = []
    load = os.getloadavg()[0]
    left_out: dict[str, str] = {}
    prompt = random.Random(0).choices(range(1000, 32000), k=lengths[0])
    for count in counts:
        with ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            children: dict[str, tuple[Child, Row]] = {}
            for method in METHODS:
                told(f"{method}, {count} experts")
                try:
                    spec, facts = prepare_method(models, method, count, disk)
                    child = stack.enter_context(Child(ENGINES[method], threads, logs / f"{method}.log"))
                    spec |= {"threads": threads, "capacity": lengths[0] + lengths[1] + 2}
                    row = {"method": method, "experts": count} | facts | measure_one(child, spec, count, prompt[:16])
                except (EngineError, OSError, RuntimeError) as error:
                    left_out[f"{method}, {count}"] = str(error)
                    continue
                children[method] = (child, row)
            told(f"latency with {count} experts")
            time_latency(children, prompt, lengths[1], rounds)
            rows += [row for _, row in children.values()]
    return {
        "threads": threads,
        "load_1min": load,
        "prompt_tokens": lengths[0],
        "gen_tokens": lengths[1],
        "rounds": rounds,
        "rows": rows,
        "left_out": left_out,
    }


def prepare_method(models: Models, method: str, count: int, disk: float) -> tuple[dict[str, Any], Row]:
    """Write the files of `count` experts that are not there yet: what to load, and the bytes it takes.

    Raises:
        RuntimeError: more than `disk` bytes.
    """
    single, shared = models.bundle("int4", True), models.bundle("int4", False)
    if method == "copies":
        needed = count * sum(file.stat().st_size for file in list_files(single))
        if needed > disk:
            raise RuntimeError(f"{needed / 1e9:.1f} GB, more than the {disk / 1e9:.0f} GB allowed (--disk-gb)")
        folders = [copy_bundle(single, models.path(f"copies/{index:03d}.lime")) for index in range(count)]
        total = sum(file.stat().st_size for folder in folders for file in list_files(folder))
        return {"engine": "ours", "path": str(folders[0]), "copies": [str(folder) for folder in folders]}, {
            "bytes": total,
            "bytes_per_expert": total // count,
        }
    if method == "lime":
        bundle = grow_bundle(shared, models.path(f"lime-{count}.lime"), count)
        files = list_files(bundle)
        own = [file for file in files if file.parent.name == "experts"]
        total = sum(file.stat().st_size for file in files if file.name != "routed.onnx")
        return {"engine": "ours", "path": str(bundle)}, {
            "bytes": total,
            "bytes_per_expert": sum(file.stat().st_size for file in own) // len(own),
        }
    from methods import LORA_FILE, PROMPT_FILE, draw_experts, write_lora_graph, write_prompt_graph

    graph = single / (LORA_FILE if method == "lora" else PROMPT_FILE)
    if not graph.exists():
        (write_lora_graph if method == "lora" else write_prompt_graph)(single)
    own = draw_experts(single, method, models.path(method), count)
    each = own[0].stat().st_size
    total = graph.stat().st_size + (single / "onnx/model.onnx.data").stat().st_size + count * each
    return {"engine": method, "path": str(single), "files": [str(file) for file in own]}, {
        "bytes": total,
        "bytes_per_expert": each,
    }


def list_files(bundle: Path) -> list[Path]:
    """The files that a bundle's manifest lists, and the manifest; not what was cut out of it for this comparison."""
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.bundle.manifest import MANIFEST

    return [bundle / MANIFEST, *(bundle / name for name in Bundle.open(bundle).manifest.files)]


def copy_bundle(source: Path, output: Path) -> Path:
    """A whole copy, byte for byte."""
    for file in list_files(source) if not output.exists() else []:
        target = output / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return output


def grow_bundle(source: Path, output: Path, count: int) -> Path:
    """The bundle with `count` experts, its weights linked, without GenAI's adapters: our runtime does not read them."""
    from msgspec import structs

    from lime_edge.bundle.bundle import Bundle
    from lime_edge.bundle.create import write_bundle
    from lime_edge.bundle.experts import Expert

    if output.exists():
        return output
    opened = Bundle.open(source)
    bank = opened.open_bank()
    first = bank.vector(bank.names[0])
    draw = np.random.default_rng(0)
    experts = [
        Expert(
            f"expert_{index}",
            (first + 0.1 * draw.standard_normal(first.size)).astype(np.float16),
            bank.adapter_id,
        )
        for index in range(count)
    ]
    target = structs.replace(opened.manifest.targets["onnx"], routed=None)
    changed = structs.replace(opened.manifest, target_list=(target,), companions={}, default="expert_0")
    stage = output.with_suffix(".partial")
    (stage / "onnx").mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data"):
        os.link(source / "onnx" / name, stage / "onnx" / name)
    write_bundle(stage, changed, experts, bank.reference)
    stage.rename(output)
    return output


def measure_one(child: Child, spec: dict[str, Any], count: int, prompt: list[int]) -> Row:
    """Load time and memory, then memory once every expert was used, and switching."""
    copies = spec.pop("copies", [])
    loaded = child.ask("load", spec=spec)  # from the page cache: the files were just written or listed
    row: Row = {"load_ms": loaded["seconds"] * 1e3, "imports_rss_bytes": child.before["rss_bytes"]}
    child.ask("round", prompt=prompt, count=1)
    if copies:
        row["rss_bytes"] = child.ask("logits", prompt=prompt)["rss_bytes"]
        if count > 1:
            draw = random.Random(1)
            done = [child.ask("reload", prompt=prompt, path=draw.choice(copies)) for _ in range(RELOADS)]
            row["switch_us"] = {f"p{q}": float(np.percentile([one["load"] for one in done], q)) * 1e6 for q in (50, 95)}
            row["switch_to_first_token_ms"] = statistics.median(one["seconds"] for one in done) * 1e3
        return row
    row["rss_bytes"] = child.ask("touch", prompt=prompt[:1])["rss_bytes"]
    if count > 1:
        seconds = child.ask("switches", count=SWITCHES)["seconds"]
        row["switch_us"] = {f"p{q}": float(np.percentile(seconds, q)) * 1e6 for q in (50, 95)}
        firsts = [child.ask("first_token", prompt=prompt, index=7 * index + 1)["seconds"] for index in range(RELOADS)]
        row["switch_to_first_token_ms"] = statistics.median(firsts) * 1e3
    return row


def time_latency(children: dict[str, tuple[Child, Row]], prompt: list[int], count: int, rounds: int) -> None:
    """A prompt and `count` tokens, the methods in turn; the first round warms up."""
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in children}
    for index in range(rounds + 1):
        for method, (child, _) in children.items():
            done = child.ask("round", prompt=prompt, count=count)
            if index:
                times[method].append((done["first"], statistics.median(done["steps"])))
    for method, (_, row) in children.items():
        row["ttft_ms"] = statistics.median(first for first, _ in times[method]) * 1e3
        row["decode_ms"] = statistics.median(step for _, step in times[method]) * 1e3
