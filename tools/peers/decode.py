"""Decode, prefill, switch and memory of every engine on one backbone, asked in turn, round by round."""

from __future__ import annotations

import importlib.util
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from children import Child, EngineError
from prepare import EXPERT, Models

BASE = "ours-merged"
REFERENCE = "torch-peft"
SETTLE = 0.05  # seconds
TEXT = Path("examples/demo_adapter/eval/past.jsonl")
COPIES = 8  # experts to switch between: as many as the LiME checkpoint has
PIP = {
    "executorch": "pip install 'executorch>=1.5,<1.6'",
    "onnxruntime_genai": "pip install 'onnxruntime-genai>=0.18,<0.19'",
    "llama_cpp": "pip install 'llama-cpp-python>=0.3.36,<0.4'",
    "peft": "pip install 'peft>=0.21,<0.22'",
    "torch": "pip install 'torch>=2.13,<2.14'",
}


@dataclass(frozen=True)
class Contender:
    """One row: an engine with a model. needs: a module that must be installed; files: relative to the models' folder.

    weights: what its matrices are. expert: how the expert gets in, "" for none.
    """

    name: str
    engine: str
    label: str
    weights: str
    expert: str
    files: tuple[str, ...]
    adapter: str = ""
    spec: dict[str, Any] = field(default_factory=dict)
    needs: str = "lime_edge"

    @property
    def quant(self) -> str:
        """Which of our exports it is, a key of prepare.QUANTS; "" for the others."""
        return (
            self.files[0].removeprefix("executorch/").split(".lime")[0].removesuffix("-single")
            if ".lime" in self.files[0]
            else ""
        )

    def make_spec(self, models: Models, threads: int, capacity: int) -> dict[str, Any]:
        """What the worker is told to load."""
        spec: dict[str, Any] = {"engine": self.engine, "path": str(models.path(self.files[0]))}
        spec |= {"threads": threads, "capacity": capacity} | self.spec
        if self.adapter:
            found = sorted(models.folder.glob(self.adapter))
            several = found if len(found) > 1 else found * COPIES  # one expert under several names: times do not differ
            spec |= {"adapters": [str(file) for file in several], "active": 0}
        return spec


INT4, ALL4 = "int4, sensitive matrices int8", "int4, all matrices"
OURS = (
    Contender(
        BASE,
        "ours",
        "lime_edge, no branch (an expert merged: `--fold NAME --single`)",
        ALL4,
        "merged",
        ("int4-single.lime",),
    ),
    Contender("ours-pinned", "ours", "lime_edge, pinned", ALL4, "LiME", ("int4.lime",), spec={"selection": EXPERT}),
    Contender(
        "ours-routed",
        "ours",
        "lime_edge, routed",
        ALL4,
        "8 LiME, per token",
        ("int4.lime",),
        spec={"selection": "routed"},
    ),
)
IN_EXECUTORCH = (
    Contender(
        "executorch-merged",
        "executorch",
        "lime_edge on ExecuTorch, no branch",
        ALL4,
        "merged",
        ("executorch/int4-single.lime",),
        needs="executorch",
    ),
    Contender(
        "executorch-pinned",
        "executorch",
        "lime_edge on ExecuTorch, pinned",
        ALL4,
        "LiME",
        ("executorch/int4.lime",),
        spec={"selection": EXPERT},
        needs="executorch",
    ),
)
IN_GENAI = Contender(
    "ours-in-genai",
    "genai",
    "our bundle in stock ONNX Runtime GenAI (no operators of ours)",
    ALL4,
    "LiME",
    ("int4.lime/onnx",),
    "int4.lime/onnx/expert_*.onnx_adapter",
    needs="onnxruntime_genai",
)
PEERS = (
    Contender(
        "genai", "genai", "ONNX Runtime GenAI, its builder's model", ALL4, "", ("genai",), needs="onnxruntime_genai"
    ),
    Contender(
        "genai-lora",
        "genai",
        "ONNX Runtime GenAI, its builder's model with LoRA",
        ALL4,
        "LoRA",
        ("genai-lora",),
        "genai-lora/*.onnx_adapter",
        needs="onnxruntime_genai",
    ),
    Contender("llama", "llama", "llama.cpp Q4_0, head too", ALL4, "", ("q4_0.gguf",), needs="llama_cpp"),
    Contender(
        "llama-lora",
        "llama",
        "llama.cpp Q4_0, head too, with LoRA",
        ALL4,
        "LoRA",
        ("q4_0.gguf",),
        "lora.gguf",
        needs="llama_cpp",
    ),
    Contender(
        "ours-default-merged",
        "ours",
        "lime_edge as exported by default, no branch",
        INT4,
        "merged",
        ("default-single.lime",),
    ),
    Contender(
        "ours-default-pinned",
        "ours",
        "lime_edge as exported by default, pinned",
        INT4,
        "LiME",
        ("default.lime",),
        spec={"selection": EXPERT},
    ),
    Contender(
        "llama-default",
        "llama",
        "llama.cpp Q4_0 as it chooses itself",
        "int4, head int8",
        "",
        ("q4_0-default.gguf",),
        needs="llama_cpp",
    ),
    Contender("torch", "torch", "PyTorch", "float32", "", ("hf",), needs="torch"),
    Contender(REFERENCE, "torch", "PyTorch with PEFT", "float32", "LoRA", ("hf",), "peft", needs="peft"),
)
RANDOM = (
    *OURS,
    *IN_EXECUTORCH,
    IN_GENAI,
    *(one for one in PEERS if one.name in ("genai", "genai-lora", "llama", "llama-lora")),
)
CONTENDERS = {"smollm2": (*OURS, *IN_EXECUTORCH, IN_GENAI, *PEERS), "1b": RANDOM, "toy": RANDOM}


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    prompt_tokens: int
    gen_tokens: int
    rounds: int
    switches: int
    first_tokens: int
    parts: tuple[str, ...]


def sort_out(contenders: Sequence[Contender], models: Models) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that can run here, and why the others cannot: name -> reason."""
    able, missing = [], {}
    for one in contenders:
        absent = [file for file in one.files if not models.path(file).exists()]
        if importlib.util.find_spec(one.needs) is None:
            missing[one.name] = f"{one.needs} is not installed: {PIP.get(one.needs, '')}"
        elif absent or (one.adapter and not list(models.folder.glob(one.adapter))):
            missing[one.name] = f"{', '.join(absent) or one.adapter} could not be made"
        else:
            able.append(one)
    return able, missing


def compare(
    contenders: Sequence[Contender], models: Models, threads: int, plan: Plan, told: Callable[[str], None]
) -> dict[str, Any]:
    """Load every contender in its own process and measure them in turn.

    Returns:
        rows by contender (medians, spreads, and the share of a core that it used while others were timed), and
        left_out: name -> reason.
    """
    able, missing = sort_out(contenders, models)
    load = os.getloadavg()[0]  # of the machine before anything is started
    capacity = plan.prompt_tokens + plan.gen_tokens + 2
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        children: dict[str, Child] = {}
        for one in able:
            told(f"{threads} threads: loading {one.name}")
            try:
                child = stack.enter_context(Child(one.engine, threads, logs / f"{one.name}.log"))
                loaded = child.ask("load", spec=one.make_spec(models, threads, capacity))
            except EngineError as error:
                missing[one.name] = str(error)
                continue
            children[one.name] = child
            rows[one.name] = {
                "label": one.label,
                "weights": one.weights,
                "expert": one.expert,
                "load_ms": loaded["seconds"] * 1e3,
                "imports_rss_bytes": child.before["rss_bytes"],
                "bytes": measure_files(one, models),
            }
        prompt = random.Random(0).choices(range(1000, 32000), k=plan.prompt_tokens)
        if "decode" in plan.parts:
            time_rounds(children, rows, prompt, plan, told)
            check_logits(children, rows, read_text(models) or prompt, logs)
        if "switch" in plan.parts:
            time_switching(children, rows, prompt[:16], plan, told)
    return {"threads": threads, "load_1min": load, "rows": rows, "left_out": missing}


def read_text(models: Models) -> list[int]:
    """A prompt of text in the model's own tokens, for what is compared and not timed; empty without a tokenizer."""
    from lime_edge.bundle.prompts import TextCodec
    from lime_edge.checks.evaluate import read_examples

    if not models.path("hf/tokenizer.json").exists():
        return []
    return TextCodec(models.path("hf")).encode(read_examples(TEXT)[0].prompt)


def measure_files(one: Contender, models: Models) -> int:
    """Bytes of a contender's model: without experts, tokenizer and what other programs read."""
    path = models.path(one.files[0])
    if path.is_file():
        return path.stat().st_size
    if (path / "executorch").is_dir():
        return sum(file.stat().st_size for file in (path / "executorch").glob("*.pte"))
    folder = path / "onnx" if (path / "onnx").is_dir() else path
    names = ("model.onnx", "model.onnx.data", "model.safetensors")
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


def time_rounds(
    children: dict[str, Child],
    rows: dict[str, dict[str, Any]],
    prompt: list[int],
    plan: Plan,
    told: Callable[[str], None],
) -> None:
    """Prompt and decode, every contender once a round; the first round warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in children}
    steps: dict[str, list[float]] = {name: [] for name in children}
    idle = dict.fromkeys(children, 0.0)
    waited = dict.fromkeys(children, 0.0)
    for index in range(plan.rounds + 1):
        told(f"round {index} of {plan.rounds}")
        for name, child in children.items():
            time.sleep(SETTLE)  # threads of the engine before go to sleep
            before, begin = {other: children[other].cpu_seconds() for other in children}, time.perf_counter()
            done = child.ask("round", prompt=prompt, count=plan.gen_tokens)
            wall = time.perf_counter() - begin
            for other in children.keys() - {name}:
                idle[other] += children[other].cpu_seconds() - before[other]
                waited[other] += wall
            if index:
                times[name].append((done["first"], statistics.median(done["steps"])))
                steps[name] += done["steps"]
    for name in children:
        rows[name]["idle_cpu"] = idle[name] / waited[name] if waited[name] else 0.0
    for name, own in times.items():
        first, step = zip(*own, strict=True)
        rows[name] |= {
            "ttft_ms": statistics.median(first) * 1e3,
            "prefill_tokens_per_s": len(prompt) / statistics.median(first),
            "decode_ms": statistics.median(step) * 1e3,
            "decode_tokens_per_s": 1 / statistics.median(step),
            "decode_p95_ms": float(np.percentile(steps[name], 95)) * 1e3,
        }
        if base := times.get(BASE):
            ratios = sorted(mine[1] / theirs[1] for mine, theirs in zip(own, base, strict=True))
            rows[name] |= {
                "decode_ratio": statistics.median(ratios),
                "decode_ratio_low": ratios[0],
                "decode_ratio_high": ratios[-1],
            }


def check_logits(children: dict[str, Child], rows: dict[str, dict[str, Any]], prompt: list[int], folder: Path) -> None:
    """Whether everybody runs the same model: correlation of the last logits with PyTorch's float32 ones."""
    found = {}
    for name, child in children.items():
        file = folder / f"{name}.npy"
        rows[name] |= {"rss_bytes": child.ask("logits", prompt=prompt, file=str(file))["rss_bytes"]}
        found[name] = np.load(file).reshape(-1)
    for name, row in rows.items():
        reference = found.get(REFERENCE if row["expert"] else "torch")
        if reference is not None:
            row["logit_correlation"] = float(np.corrcoef(found[name], reference)[0, 1])


def time_switching(
    children: dict[str, Child],
    rows: dict[str, dict[str, Any]],
    prompt: list[int],
    plan: Plan,
    told: Callable[[str], None],
) -> None:
    """The bare swap, the first token under another expert, and what loading the model anew takes instead."""
    able = {name: child for name, child in children.items() if rows[name]["expert"] in ("LiME", "LoRA")}
    for name, child in able.items():
        told(f"switching {name}")
        done = child.ask("switches", count=plan.switches)
        rows[name]["switch_us"] = {f"p{q}": float(np.percentile(done["seconds"], q)) * 1e6 for q in (50, 95, 99)}
    firsts: dict[str, list[float]] = {name: [] for name in children}
    for index in range(plan.first_tokens + 1):
        for name, child in able.items():
            seconds = child.ask("first_token", prompt=prompt, index=index)["seconds"]
            if index:
                firsts[name].append(seconds)
    for name in able:
        rows[name]["switch_to_first_token_ms"] = statistics.median(firsts[name]) * 1e3
    reloads: dict[str, list[dict[str, float]]] = {name: [] for name in children}
    for index in range(min(3, plan.first_tokens) + 1):
        told(f"reloading, {index} of {min(3, plan.first_tokens)}")
        for name, child in children.items():
            done = child.ask("reload", prompt=prompt)
            if index:
                reloads[name].append(done)
    for name, own in reloads.items():
        rows[name]["reload_ms"] = statistics.median(one["load"] for one in own) * 1e3
        rows[name]["reload_to_first_token_ms"] = statistics.median(one["seconds"] for one in own) * 1e3
