"""One way to train every method: the demo adapter's rows, steps, schedule and seed; AdamW; clipping per task."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import torch
from methods import Method, split_trained
from stacks import Stack
from torch import Tensor, nn
from torch.nn import functional as F
from train import Corpus, Plan, _scale_rate, draw_rows


def add_virtual(corpus: Corpus, count: int, first: int) -> Corpus:
    """Put `count` virtual tokens (ids from `first` on) before every row."""
    if not count:
        return corpus
    virtual = torch.arange(first, first + count).expand(len(corpus.ids), -1)
    return replace(
        corpus, ids=torch.cat([virtual, corpus.ids], 1), prompt=corpus.prompt + count, length=corpus.length + count
    )


def measure_rows(model: nn.Module, choice: Stack, corpus: Corpus, rows: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Mean loss per task on answer and end tokens (E,), and which rows are right token for token (N,).

    Args:
        rows: (N,) sorted by task, equally many of each.
    """
    length, prompt = corpus.length[rows], corpus.prompt[rows]
    places = torch.arange(int(length.max()))
    ids = corpus.ids[rows, : len(places)].to(device)
    choice.rows = experts = corpus.expert[rows].to(device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    predicts = ((places >= prompt[:, None] - 1) & (places < length[:, None] - 1)).to(device)
    choice.rows = owners = experts[:, None].expand_as(predicts)[predicts]
    logits = model.lm_head(hidden[predicts]).float()
    wanted = ids.roll(-1, 1)[predicts]
    losses = F.cross_entropy(logits, wanted, reduction="none")
    count = owners.bincount(minlength=len(corpus.by_task)).clamp_min(1)
    per_task = losses.new_zeros(len(count)).index_add(0, owners, losses) / count
    wrong = torch.zeros_like(predicts)
    wrong[predicts] = logits.detach().argmax(-1) != wanted
    return torch.stack([per_task, count / count.sum()]), ~wrong.any(1)


@torch.no_grad()
def clip_per_task(own: list[Tensor], shared: list[Tensor], stacked: bool) -> None:
    """Clip gradients to norm 1: of each task's own where tasks learn apart, else of all together."""
    if not stacked:
        nn.utils.clip_grad_norm_(own + shared, 1.0)
        return
    norms = torch.stack([p.grad.flatten(1).norm(dim=1) for p in own]).square().sum(0).sqrt()
    scale = (1.0 / (norms + 1e-6)).clamp_max(1.0)
    for p in own:
        p.grad.mul_(scale.view(-1, *[1] * (p.dim() - 1)))


def sort_by_task(corpus: Corpus, rows: Tensor) -> Tensor:
    """Rows in the order of their tasks."""
    return rows[corpus.expert[rows].argsort(stable=True)]


def fit(
    model: nn.Module, choice: Stack, method: Method, rates: tuple[float, float], train: Corpus, plan: Plan, device: str
) -> float:
    """Train in place: warm-up, cosine decay to 2%; returns seconds."""
    own, shared = (list(part.values()) for part in split_trained(model))
    groups = [{"params": own, "lr": rates[0], "weight_decay": method.decay if method.stacked else 0.0}]
    if shared:
        groups.append({"params": shared, "lr": rates[1], "weight_decay": method.decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _scale_rate(step, plan))
    generator = torch.Generator().manual_seed(plan.seed)
    model.train()
    start, total = time.monotonic(), torch.zeros((), device=device)
    for step in range(1, plan.steps + 1):
        rows = sort_by_task(train, draw_rows(train, plan.batch, generator))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            (losses, share), _ = measure_rows(model, choice, train, rows, device)
        loss = losses.sum() if method.stacked else (losses * share).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_per_task(own, shared, method.stacked)
        optimizer.step()
        schedule.step()
        total += losses.detach().mean()
        if step % max(1, plan.steps // 8) == 0:
            mean = total.item() / max(1, plan.steps // 8)
            print(
                f"{method.title} {rates} step {step}/{plan.steps} loss {mean:.4f} {time.monotonic() - start:.0f}s",
                flush=True,
            )
            total.zero_()
    model.eval()
    return time.monotonic() - start


@torch.no_grad()
def measure_valid(model: nn.Module, choice: Stack, corpus: Corpus, device: str) -> tuple[float, float]:
    """Mean over tasks of the share of right validation rows (teacher-forced), and of the loss."""
    right, losses = [], []
    for rows in corpus.by_task:
        loss, found = measure_rows(model, choice, corpus, rows, device)
        right.append(found.float().mean().item())
        losses.append(loss[0].sum().item())
    return sum(right) / len(right), sum(losses) / len(losses)


def put_anew(base: nn.Module, method: Method, tasks: int, seed: int, device: str) -> tuple[nn.Module, Stack]:
    """A copy of the backbone with the method in it, the same start for the same seed."""
    model = copy.deepcopy(base).to(device)
    torch.manual_seed(seed)
    return model, method.put(model, tasks)


def choose_rates(
    base: nn.Module, method: Method, train: Corpus, valid: Corpus, plan: Plan, device: str
) -> tuple[tuple[float, float], list[dict]]:
    """Try every pair of rates for a short run; the one with the most right validation rows, then the least loss."""
    tried = []
    for rates in method.rates:
        model, choice = put_anew(base, method, len(train.by_task), plan.seed, device)
        fit(model, choice, method, rates, train, plan, device)
        right, loss = measure_valid(model, choice, valid, device)
        tried.append({"rates": rates, "valid": round(right, 4), "loss": round(loss, 4)})
        print(method.title, tried[-1], flush=True)
        del model, choice
        torch.cuda.empty_cache()
    best = max(tried, key=lambda one: (one["valid"], -one["loss"]))
    return best["rates"], tried
