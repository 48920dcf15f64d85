"""The methods of the table: what each puts into the frozen backbone, what of it is trained, and what a task owns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lime_layers import ATTENTION, add_lime
from stacks import (
    PromptTable,
    Stack,
    StackedHead,
    StackedLinear,
    StackedLora,
    StackedNorm,
    StackedTable,
    replace_modules,
)
from torch import Tensor, nn

VIRTUAL_TOKENS = 20


@dataclass(frozen=True)
class Method:
    """One row of the table.

    put: (model, tasks) -> what the layers follow; it freezes the model and puts the method in.
    rates: candidates, of which validation chooses; each AdamW's rate of what a task owns and of what all share.
    decay: of what is not a vector. stacked: tasks learn apart (their own loss, their own clipping).
    """

    title: str
    put: Callable[[nn.Module, int], Stack]
    rates: tuple[tuple[float, float], ...]
    decay: float = 0.01
    stacked: bool = True
    virtual: int = 0


def put_full(model: nn.Module, tasks: int) -> Stack:
    """A whole model per task."""
    choice = Stack()
    model.requires_grad_(False)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        raise SystemExit("full fine-tuning here needs a tied head")
    model.model.embed_tokens = StackedTable(model.model.embed_tokens, tasks, choice)
    model.lm_head = StackedHead(model.model.embed_tokens)
    replace_modules(model, nn.Linear, lambda _, linear: StackedLinear(linear.weight.repeat(tasks, 1, 1), choice))
    norm = type(model.model.norm)
    replace_modules(model, norm, lambda _, module: StackedNorm(module, tasks, choice))
    return choice


def put_lora(rank: int) -> Callable[[nn.Module, int], Stack]:
    """One LoRA per task on q, k, v and o, alpha = 2 r."""

    def put(model: nn.Module, tasks: int) -> Stack:
        choice = Stack()
        model.requires_grad_(False)

        def make(name: str, linear: nn.Linear) -> nn.Module:
            adapted = name.rsplit(".", 1)[-1] in ATTENTION
            return StackedLora(linear, choice, tasks, rank, 2.0 * rank) if adapted else linear

        replace_modules(model, nn.Linear, make)
        return choice

    return put


def put_lime(rank: int) -> Callable[[nn.Module, int], Stack]:
    """The demo adapter: one shared LoRA, one vector per task and layer."""

    def put(model: nn.Module, tasks: int) -> Stack:
        old = add_lime(model, tasks, rank, 2.0 * rank)
        choice = Stack()
        for module in model.modules():
            if getattr(module, "choice", None) is old:
                module.choice = choice
        return choice

    return put


def put_prompts(model: nn.Module, tasks: int) -> Stack:
    """Virtual tokens of each task before the prompt."""
    choice = Stack()
    model.requires_grad_(False)
    model.model.embed_tokens = PromptTable(model.model.embed_tokens, choice, tasks, VIRTUAL_TOKENS)
    return choice


METHODS = {
    "full": Method("full fine-tuning", put_full, ((1e-4, 0.0), (3e-5, 0.0))),
    "lora64": Method("LoRA r=64", put_lora(64), ((1e-3, 0.0), (2e-4, 0.0))),
    "moelora": Method("MoE-LoRA r=8", put_lora(8), ((3e-3, 0.0), (1e-3, 0.0))),
    "lime": Method("LiME r=8", put_lime(8), ((5e-3, 1e-3), (1e-2, 2e-3)), stacked=False),
    "prompt": Method("prompt tuning", put_prompts, ((3e-2, 0.0), (5e-3, 0.0)), decay=0.0, virtual=VIRTUAL_TOKENS),
}


def split_trained(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a task owns (first axis: tasks), and what all tasks share; by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shared = {n: p for n, p in trained.items() if n.endswith((".A", ".B")) and p.dim() == 2}
    return {n: p for n, p in trained.items() if n not in shared}, shared


def count_parameters(model: nn.Module, tasks: int) -> dict[str, int]:
    """Numbers that a task owns, and numbers that all share (the frozen backbone apart)."""
    own, shared = split_trained(model)
    return {
        "per_expert": sum(p.numel() for p in own.values()) // tasks,
        "shared": sum(p.numel() for p in shared.values()),
    }


@torch.no_grad()
def round_trained(model: nn.Module) -> dict[str, Tensor]:
    """Round what was trained to float16, as it is stored, in place; returned on the CPU."""
    own, shared = split_trained(model)
    for tensor in (own | shared).values():
        tensor.copy_(tensor.half().float())
    return {name: tensor.detach().half().cpu() for name, tensor in (own | shared).items()}
