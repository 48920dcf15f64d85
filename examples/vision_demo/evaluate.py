"""Measure the vision demo: every expert, and no adapter, on every task of the same held-out scenes.

Free greedy generation from the picture alone, exact match. The model is transformers' SmolVLM in float32 with the
LiME layers of the text demo in its text model; nothing of the toolkit is used.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from answers import END, IMAGE, LONGEST, write_prompt
from feed import scale_pixels
from PIL import Image
from safetensors.torch import load_file
from scenes import HERE, TASKS
from torch import Tensor, nn

sys.path.append(str(HERE.parent / "demo_adapter"))
from lime_layers import Choice, add_lime, assign_tensors  # noqa: E402

PREFIX = "model.text_model."


def load_model(folder: Path, adapter: Path, device: str) -> tuple[nn.Module, object, Choice]:
    """Load the SmolVLM checkpoint and its tokenizer, and put the adapter into its text model."""
    from transformers import AutoTokenizer, SmolVLMForConditionalGeneration

    model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    config = json.loads((adapter / "adapter_config.json").read_text())
    leaves = tuple(sorted({name.rsplit(".", 1)[1] for name in config["target_modules"]}))
    choice = add_lime(model.model.text_model, config["num_experts"], config["r"], config["lora_alpha"], targets=leaves)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assign_tensors(model.model.text_model, {k.removeprefix(PREFIX): v for k, v in tensors.items()})
    return model.to(device), AutoTokenizer.from_pretrained(folder), choice


def load_rows(folder: Path, limit: int | None = None) -> list[dict[str, str]]:
    """Load the answers of all tasks, a row a picture, from a folder that scenes.py wrote."""
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()][:limit]


def load_scenes(folder: Path, limit: int | None = None) -> tuple[Tensor, list[dict[str, str]]]:
    """Load pictures as pixels (N, 3, S, S), and the answers of all tasks, from a folder that scenes.py wrote."""
    rows = load_rows(folder, limit)
    pictures = np.stack([np.asarray(Image.open(folder / row["image"]).convert("RGB")) for row in rows])
    return scale_pixels(torch.from_numpy(pictures)), rows


@torch.no_grad()
def answer_scenes(
    model: nn.Module, tokenizer, choice: Choice, pixels: Tensor, experts: list[int], batch: int = 128
) -> list[str]:
    """Answer one question a picture.

    Args:
        pixels: (N, 3, S, S). experts: one for each picture; the number of experts means "no adapter".

    Returns:
        The texts up to the end token, stripped.
    """
    device = next(model.parameters()).device
    rows = (pixels.shape[-1] // model.config.vision_config.patch_size // model.config.scale_factor) ** 2
    before, after = write_prompt().split(IMAGE)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    prompt = [*encode(before), *[model.config.image_token_id] * rows, *encode(after)]
    end, answers = tokenizer.convert_tokens_to_ids(END), []
    for part in torch.arange(len(pixels)).split(batch):
        choice.rows = torch.tensor([experts[i] for i in part.tolist()], device=device)
        seen = pixels[part].unsqueeze(1).to(device)
        step, cache, new = torch.tensor([prompt] * len(part), device=device), None, []
        for _ in range(LONGEST + 1):
            result = model(
                input_ids=step,
                pixel_values=None if cache else seen,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, step = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
            new.append(step)
        for ids in torch.cat(new, 1).tolist():
            ids = ids[: ids.index(end)] if end in ids else ids
            answers.append(tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip())
    return answers


def tabulate(table: list[list[str]], rows: list[dict[str, str]]) -> dict:
    """The matrix of answers: experts (the last of the table: no adapter) by tasks; and what a constant answer gets."""
    count = len(rows)
    matrix = [[sum(f == row[t] for f, row in zip(own, rows, strict=True)) / count for t in TASKS] for own in table]
    majority = [Counter(row[t] for row in rows).most_common(1)[0][1] / count for t in TASKS]
    outputs = {rows[i]["image"]: [own[i] for own in table] for i in range(min(8, count))}
    found = {"tasks": list(TASKS), "examples": count, "matrix": matrix[:-1], "none": matrix[-1]}
    return {**found, "majority": majority, "outputs": outputs}


def measure_bundle(bundle: Path, target: str, folder: Path, limit: int | None = None) -> dict:
    """Measure the same matrix through the toolkit's session: a picture is seen once, then every expert is asked."""
    import lime_edge

    session = lime_edge.open(bundle, target=target)
    rows = load_rows(folder, limit)
    table: list[list[str]] = [[] for _ in range(len(TASKS) + 1)]
    for row in rows:
        picture = session.see(folder / row["image"])
        for own, expert in zip(table, (*TASKS, None), strict=True):
            session.use(expert)
            pieces = session.generate(write_prompt(), images=[picture], max_new_tokens=LONGEST + 1)
            own.append("".join(pieces).strip())
    return tabulate(table, rows)


def measure(model: nn.Module, tokenizer, choice: Choice, pixels: Tensor, rows: list[dict[str, str]]) -> dict:
    """Measure the matrix: experts (and no adapter, last) by tasks; and what a constant answer would get."""
    count = len(rows)
    everyone = list(range(len(TASKS) + 1))
    found = answer_scenes(
        model, tokenizer, choice, pixels.repeat(len(everyone), 1, 1, 1), [e for e in everyone for _ in rows]
    )
    return tabulate([found[e * count : (e + 1) * count] for e in everyone], rows)


def summarize(result: dict) -> dict[str, float]:
    """The numbers that the goals speak of: own accuracy, what others get, and the lead over both."""
    matrix, n = result["matrix"], len(TASKS)
    own = [matrix[k][k] for k in range(n)]
    others = [sum(matrix[e][k] for e in range(n) if e != k) / (n - 1) for k in range(n)]
    leads = [o - max(m, x) for o, m, x in zip(own, result["majority"], others, strict=True)]
    summary = {
        "mean_own": sum(own) / n,
        "smallest_own": min(own),
        "mean_others": sum(others) / n,
        "smallest_lead": min(leads),
    }
    return {name: round(value, 4) for name, value in summary.items()}


def print_matrix(result: dict) -> None:
    """Print a row per expert, a column per task."""
    print(f"{result['examples']} scenes: expert x task")
    print(f"{'':>10} " + " ".join(f"{t:>8}" for t in TASKS))
    lines = [*zip(TASKS, result["matrix"], strict=True), ("none", result["none"]), ("majority", result["majority"])]
    for name, values in lines:
        print(f"{name:>10} " + " ".join(f"{v:>8.3f}" for v in values))


def plot_matrix(result: dict, path: Path) -> None:
    """Plot the matrix beside one of its scenes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = [*result["matrix"], result["none"]]
    figure, panel = plt.subplots(figsize=(7.4, 5.6))
    panel.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            panel.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    panel.set_xticks(range(len(TASKS)), TASKS, rotation=35, ha="right")
    panel.set_yticks(range(len(values)), [*TASKS, "no adapter"])
    panel.set(
        title=f"The same {result['examples']} scenes: accuracy of each expert on each task",
        xlabel="task",
        ylabel="expert",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def describe_environment(device: str) -> dict[str, str]:
    """Describe what a result was measured with."""
    import transformers

    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {**versions, "hardware": hardware, "dtype": "float32; eyes rounded to int8, adapter to float16, as shipped"}


def main() -> None:
    """Print the matrix; --json and --plot write it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="what model.py wrote: transformers, float32")
    source.add_argument("--bundle", type=Path, help="a bundle of it: the toolkit's session")
    parser.add_argument("--target", default="onnx", help="of the bundle")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter")
    parser.add_argument("--scenes", type=Path, default=HERE / "eval")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    if args.bundle:
        result = measure_bundle(args.bundle, args.target, args.scenes, args.limit)
    else:
        pixels, rows = load_scenes(args.scenes, args.limit)
        result = measure(*load_model(args.model, args.adapter, args.device), pixels, rows)
        result = {"environment": describe_environment(args.device), **result}
    result["summary"] = summarize(result)
    print_matrix(result)
    print(json.dumps(result["summary"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot_matrix(result, args.plot)


if __name__ == "__main__":
    main()
