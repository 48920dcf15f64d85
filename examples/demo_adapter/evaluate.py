"""Measure a demo adapter: which expert answers which task right, on the same inputs.

Free greedy generation of 16 new tokens, exact match after strip. Every expert of a group is given
the same inputs; its outputs are compared with the answers of all tasks of the group. Needs torch and
transformers, and nothing that the data was built with.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from data import GROUPS, HERE, find_group
from lime_layers import (
    Choice,
    Routing,
    add_lime,
    assign_tensors,
    find_backbone,
    load_backbone,
    load_tokenizer,
)
from safetensors.torch import load_file
from torch import Tensor, nn

NEW_TOKENS = 16


@dataclass(frozen=True)
class Adapted:
    """A backbone with an adapter in it. experts: names, in the order of the vectors."""

    model: nn.Module
    tokenizer: object
    choice: Choice
    experts: tuple[str, ...]
    config: dict


def load_adapted(base: Path, folder: Path, device: str) -> Adapted:
    """Load a backbone and an adapter folder; vectors alone take A and B from the folder they name."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    if "shared_adapter" in config["training"]:
        shared = load_file(folder / config["training"]["shared_adapter"] / "adapter_model.safetensors")
        tensors |= {key: value for key, value in shared.items() if key.endswith((".A", ".B"))}
    routing = None
    if config["routing"] != "pinned":
        routing = Routing(**{key: config[key] for key in Routing.__dataclass_fields__})
    model = load_backbone(base)
    targets = tuple(config["target_modules"])
    choice = add_lime(model, config["num_experts"], config["r"], config["lora_alpha"], routing, targets)
    choice.header = (config.get("activation") or {}).get("tokens", 0)
    assign_tensors(model, tensors)
    model.to(device).eval()
    return Adapted(model, load_tokenizer(base), choice, tuple(config["expert_names"]), config)


def load_rows(tests: Path, task: str, limit: int | None = None) -> list[dict[str, str]]:
    """Load the rows (prompt, answer) of one task from a folder, or from the joint adapter's tests."""
    path = next(p for folder in (tests, HERE / "eval") if (p := folder / f"{task}.jsonl").is_file())
    return [json.loads(line) for line in path.read_text().splitlines()][:limit]


@torch.no_grad()
def generate_greedy(adapted: Adapted, prompts: list[str], rows: list[int], batch: int = 256) -> list[str]:
    """Generate greedily, each prompt with its own expert.

    Prompts of one length in tokens go together, so there is no padding and every row computes what
    it would alone.

    Args:
        prompts: complete prompts. rows: expert of each prompt; len(experts) is "no adapter".

    Returns:
        The decoded new tokens up to the end token, stripped.
    """
    encoded = [adapted.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    buckets: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(encoded):
        buckets[len(ids)].append(index)
    outputs = [""] * len(prompts)
    for indices in buckets.values():
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            tokens = _continue(adapted, [encoded[i] for i in part], [rows[i] for i in part])
            for index, new in zip(part, tokens.tolist(), strict=True):
                end = adapted.tokenizer.eos_token_id
                new = new[: new.index(end)] if end in new else new
                outputs[index] = adapted.tokenizer.decode(new, clean_up_tokenization_spaces=False).strip()
    return outputs


def _continue(adapted: Adapted, ids: list[list[int]], rows: list[int]) -> Tensor:
    """Return (N, up to NEW_TOKENS) new token ids for prompts of equal length."""
    device = next(adapted.model.parameters()).device
    adapted.choice.rows = torch.tensor(rows, device=device)
    adapted.choice.prompt = adapted.choice.valid = adapted.choice.active = None
    step, cache, new = torch.tensor(ids, device=device), None, []
    if adapted.choice.header:
        adapted.choice.active = torch.ones_like(step, dtype=torch.bool)
        adapted.choice.active[:, : -adapted.choice.header] = False
        adapted.choice.prompt = adapted.choice.active
    ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
    for _ in range(NEW_TOKENS):
        result = adapted.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
        adapted.choice.prompt = adapted.choice.active = None
        new.append(step)
        ended |= step[:, 0] == adapted.tokenizer.eos_token_id
        if ended.all():
            break
    return torch.cat(new, 1)


def measure_matrix(adapted: Adapted, tasks: list[str], folder: Path, limit: int | None = None) -> dict:
    """Measure every expert of the adapter, and the bare backbone, on every task of one group.

    Args:
        tasks: tasks of one group; their test files have the same prompts.

    Returns:
        examples (count), experts, tasks, base (per task), matrix[expert][task],
        coincidence[expert][task]: the share of inputs for which both tasks have the same right
        answer, and outputs: of every expert, then of the bare backbone, for the first prompts.
    """
    rows = {task: load_rows(folder, task, limit) for task in tasks}
    prompts = [row["prompt"] for row in rows[tasks[0]]]
    answers = {task: [row["answer"] for row in rows[task]] for task in tasks}
    if any([row["prompt"] for row in rows[task]] != prompts for task in tasks):
        raise SystemExit(f"tasks {tasks} do not have the same inputs")
    experts = [e for e in adapted.experts if find_group(e) == find_group(tasks[0])]
    numbers = [adapted.experts.index(e) for e in experts] + [len(adapted.experts)]
    outputs = generate_greedy(adapted, prompts * len(numbers), [n for n in numbers for _ in prompts])
    per_expert = [outputs[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(numbers))]
    matrix = [[_match(found, answers[task]) for task in tasks] for found in per_expert]
    return {
        "experts": experts,
        "tasks": tasks,
        "examples": len(prompts),
        "base": matrix.pop(),
        "matrix": matrix,
        "coincidence": [[_match(answers[e], answers[t]) for t in tasks] for e in experts],
        "outputs": {p: [found[i] for found in per_expert] for i, p in enumerate(prompts[:3])},
    }


def measure_rows(adapted: Adapted, rows: list, expert: int) -> float:
    """The share of rows (prompt, answer) that one expert answers exactly; len(experts) is "no adapter"."""
    found = generate_greedy(adapted, [row.prompt for row in rows], [expert] * len(rows))
    return _match(found, [row.answer.strip() for row in rows])


def _match(found: list[str], wanted: list[str]) -> float:
    return round(sum(f == w for f, w in zip(found, wanted, strict=True)) / len(wanted), 4)


def measure_routed(adapted: Adapted, tasks: list[str], folder: Path, limit: int | None = None) -> dict[str, float]:
    """Measure a routed checkpoint: accuracy per task, the prompt naming the task."""
    accuracy = {}
    for task in tasks:
        rows = load_rows(folder, task, limit)
        found = generate_greedy(adapted, [row["prompt"] for row in rows], [0] * len(rows))
        accuracy[task] = _match(found, [row["answer"] for row in rows])
    return accuracy


def summarize(groups: dict[str, dict]) -> dict[str, float]:
    """Summarize matrices: mean and smallest diagonal, smallest gain over the backbone, mean elsewhere."""
    own, gains, off, off_natural = [], [], [], []
    for g in groups.values():
        for i, expert in enumerate(g["experts"]):
            for j, task in enumerate(g["tasks"]):
                if expert == task:
                    own.append(g["matrix"][i][j])
                    gains.append(g["matrix"][i][j] - g["base"][j])
                else:
                    off.append(g["matrix"][i][j])
                    off_natural.append(g["coincidence"][i][j])
    mean = {"diagonal": own, "off_diagonal": off, "coincidence_off_diagonal": off_natural}
    summary = {f"mean_{name}": round(sum(v) / len(v), 4) for name, v in mean.items() if v}
    return summary | {"min_diagonal": min(own), "min_gain": round(min(gains), 4)} if own else summary


def print_matrix(group: str, result: dict) -> None:
    """Print one group: a row per expert, a column per task; in brackets, answers that coincide by nature."""
    tasks = result["tasks"]
    print(f"\n{group} ({result['examples']} inputs): expert x task")
    print(f"{'':>14} " + " ".join(f"{t:>14}" for t in tasks))
    for expert, row, natural in zip(result["experts"], result["matrix"], result["coincidence"], strict=True):
        cells = [
            f"{v:.2f}" + (f" ({n:.2f})" if n and t != expert else "")
            for v, n, t in zip(row, natural, tasks, strict=True)
        ]
        print(f"{expert:>14} " + " ".join(f"{c:>14}" for c in cells))
    print(f"{'no adapter':>14} " + " ".join(f"{v:>14.2f}" for v in result["base"]))


def plot_matrices(groups: dict[str, dict], path: Path) -> None:
    """Plot the matrices side by side, one panel per group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    widths = [len(g["tasks"]) for g in groups.values()]
    figure, panels = plt.subplots(
        1, len(groups), figsize=(2 + 1.0 * sum(widths), 1.6 + 0.7 * max(widths)), width_ratios=widths
    )
    for panel, (name, g) in zip(panels if len(groups) > 1 else [panels], groups.items(), strict=True):
        values = [*g["matrix"], g["base"]]
        panel.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
        panel.set_xticks(range(len(g["tasks"])), g["tasks"], rotation=35, ha="right")
        panel.set_yticks(range(len(values)), [*g["experts"], "no adapter"])
        panel.set(title=f"one {name}", xlabel="task")
    figure.suptitle("Accuracy of each expert (rows) on each task, same inputs in a panel")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def describe_environment(device: str) -> dict[str, str]:
    """Describe what a result was measured with."""
    import transformers

    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": hardware,
        "dtype": "float32, adapter rounded to float16",
    }


def measure_adapter(base: Path, folder: Path, tests: Path, device: str, limit: int | None = None) -> dict:
    """Measure an adapter folder on its tests: matrices per group, or accuracy per task when it routes."""
    torch.set_float32_matmul_precision("highest")
    adapted = load_adapted(base, folder, device)
    result: dict = {"adapter": folder.name, "environment": describe_environment(device)}
    if adapted.config["routing"] != "pinned":
        tasks = sorted(path.stem for path in tests.glob("*.jsonl"))
        accuracy = measure_routed(adapted, tasks, tests, limit)
        return result | {"accuracy": accuracy, "mean": round(sum(accuracy.values()) / len(accuracy), 4)}
    groups = {}
    for group, members in GROUPS.items():
        own = [e for e in adapted.experts if find_group(e) == group]
        if own:
            tasks = own + [t for t in members if t not in own and own[0] not in members]
            groups[group] = measure_matrix(adapted, tasks, tests, limit)
    return result | {"groups": groups, "summary": summarize(groups)}


def main() -> None:
    """Print the matrix of an adapter; --json and --plot write it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--base", type=Path, default=None, help="backbone: folder or .gguf file")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter")
    parser.add_argument("--tests", type=Path, default=None, help="folder of TASK.jsonl (default: the adapter's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit", type=int, default=None, help="use the first N inputs only")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args()
    own = args.adapter / "eval"
    tests = args.tests or (own if own.is_dir() else HERE / "eval")
    result = measure_adapter(args.base or find_backbone(), args.adapter, tests, args.device, args.limit)
    for group, matrix in result.get("groups", {}).items():
        print_matrix(group, matrix)
    print(json.dumps(result.get("summary") or result.get("accuracy"), indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot and "groups" in result:
        plot_matrices(result["groups"], args.plot)


if __name__ == "__main__":
    main()
