"""Latency of one answer with each method, float32 PyTorch on one CPU thread, all methods in turn in one process.

    latency.py --out latency.json

The skill that is active has random numbers in it: what a step costs does not depend on them. Full fine-tuning and a
LoRA merged beforehand are the backbone itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo_adapter"))

import torch  # noqa: E402
from data import HERE  # noqa: E402
from evaluate import describe_environment, load_rows  # noqa: E402
from lime_layers import find_backbone, load_backbone, load_tokenizer  # noqa: E402
from methods import ATTENTION, VIRTUAL_TOKENS  # noqa: E402
from stacks import replace_modules  # noqa: E402
from torch import Tensor, nn  # noqa: E402

NEW_TOKENS = 16


class Branch(nn.Module):
    """A linear layer with one low-rank branch beside it, and an expert's vector if there is one."""

    def __init__(self, linear: nn.Linear, rank: int, vector: bool) -> None:
        super().__init__()
        self.linear = linear
        width, depth = linear.weight.shape
        self.A, self.B = 0.01 * torch.randn(rank, depth), 0.01 * torch.randn(width, rank)
        self.d = torch.randn(width) if vector else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, T, D) to (N, T, H)."""
        delta = nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        y = self.linear(x)
        return y + delta if self.d is None else torch.addcmul(y, self.d, delta)


def add_branches(base: nn.Module, rank: int, vector: bool) -> nn.Module:
    """The backbone with branches on q, k, v and o; the weights are shared, not copied."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})

    def make(name: str, linear: nn.Linear) -> nn.Module:
        return Branch(linear, rank, vector) if name.rsplit(".", 1)[-1] in ATTENTION else linear

    replace_modules(model, nn.Linear, make)
    return model


@torch.no_grad()
def time_answer(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """Milliseconds until the first token, and of a later one (mean of NEW_TOKENS - 1)."""
    start = time.perf_counter()
    result = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    step = result.logits[:, -1].argmax(-1, keepdim=True)
    first = time.perf_counter()
    for _ in range(NEW_TOKENS - 1):
        result = model(input_ids=step, past_key_values=result.past_key_values, use_cache=True, logits_to_keep=1)
        step = result.logits[:, -1].argmax(-1, keepdim=True)
    end = time.perf_counter()
    return 1e3 * (first - start), 1e3 * (end - first) / (NEW_TOKENS - 1)


def main() -> None:
    """Measure in turn, several rounds; medians, and the median of each round's ratio to the backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(17)
    path = args.base or find_backbone()
    base, tokenizer = load_backbone(path), load_tokenizer(path)
    prompt = load_rows(HERE / "eval", "question", 1)[0]["prompt"]
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    longer = torch.cat([ids[:, :1].expand(1, VIRTUAL_TOKENS), ids], 1)
    contenders = {
        "full": (base, ids),
        "lora64": (add_branches(base, 64, False), ids),
        "moelora": (add_branches(base, 8, False), ids),
        "lime": (add_branches(base, 8, True), ids),
        "prompt": (base, longer),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(args.rounds + 2):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            found = time_answer(*contenders[name])
            if turn > 1:  # the first two warm up
                times[name].append(found)
    result = {
        "environment": describe_environment("cpu"),
        "rounds": args.rounds,
        "prompt_tokens": ids.shape[1],
        "methods": {},
    }
    result["environment"]["hardware"] += f", {describe_processor()}"
    for name, found in times.items():
        answers = [[f + (NEW_TOKENS - 1) * s for f, s in times[key]] for key in (name, "full")]
        result["methods"][name] = {
            "first_ms": round(statistics.median(f for f, _ in found), 2),
            "step_ms": round(statistics.median(s for _, s in found), 2),
            "answer_ratio": round(statistics.median(a / b for a, b in zip(*answers, strict=True)), 4),
            "step_ratio": round(
                statistics.median(s / t for (_, s), (_, t) in zip(found, times["full"], strict=True)), 4
            ),
        }
        print(name, result["methods"][name], flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def describe_processor() -> str:
    """The processor's name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


if __name__ == "__main__":
    main()
