"""One model per task, all in one module: every layer holds E sets of weights, and a row of a batch uses its task's.

Training 16 models one after another leaves a GPU waiting for its next small kernel; here 16 of them are one batched
matrix product. The rows of a batch come sorted by task, equally many of each, so a layer views (E n, T, D) as
(E, n T, D) and no row is ever mixed with another task's weights.
"""

from __future__ import annotations

import math

import torch
from lime_layers import Choice
from torch import Tensor, nn
from torch.nn import functional as F


class Stack(Choice):
    """The choice of lime_layers, for stacked layers too: rows (N,) sorted, equally many of each task."""

    seen: Tensor | None = None
    span: slice = slice(0, 0)

    def chosen(self) -> slice:
        """The tasks of this batch, neighbours in the stack; read from the device once a batch."""
        if self.seen is not self.rows:
            first, last = int(self.rows[0]), int(self.rows[-1])
            tasks = last - first + 1
            even = torch.arange(first, last + 1, device=self.rows.device).repeat_interleave(len(self.rows) // tasks)
            if not torch.equal(self.rows, even):
                raise ValueError(f"rows must be sorted, equally many of each task, found {self.rows.tolist()}")
            self.seen, self.span = self.rows, slice(first, last + 1)
        return self.span

    def take(self, stacked: Tensor) -> Tensor:
        """The part of a stacked tensor (E, ...) that this batch needs."""
        span = self.chosen()
        return stacked if span == slice(0, len(stacked)) else stacked[span]


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x (E n, T, D) times weight (E, H, D), each task its own: (E n, T, H)."""
    tasks = len(weight)
    flat = x.reshape(tasks, -1, x.shape[-1])
    return torch.bmm(flat, weight.transpose(1, 2)).view(*x.shape[:-1], weight.shape[1])


class StackedLinear(nn.Module):
    """E linear layers, without biases: weight (E, H, D)."""

    def __init__(self, weight: Tensor, choice: Stack) -> None:
        super().__init__()
        self.weight, self.choice = nn.Parameter(weight), choice

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, T, D) to (N, T, H)."""
        return multiply(x, self.choice.take(self.weight))


class StackedNorm(nn.Module):
    """E RMS norms: weight (E, D)."""

    def __init__(self, norm: nn.Module, tasks: int, choice: Stack) -> None:
        super().__init__()
        self.weight, self.choice = nn.Parameter(norm.weight.repeat(tasks, 1)), choice
        self.epsilon = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (N, T, D)."""
        weight = self.choice.take(self.weight)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return wide.to(x.dtype) * weight.repeat_interleave(len(x) // len(weight), 0).unsqueeze(1)


class StackedTable(nn.Module):
    """E embedding tables, which are the heads too: weight (E, V, D)."""

    def __init__(self, table: nn.Embedding, tasks: int, choice: Stack) -> None:
        super().__init__()
        self.weight, self.choice = nn.Parameter(table.weight.repeat(tasks, 1, 1)), choice

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (N, T)."""
        words, width = self.weight.shape[1:]
        return F.embedding(ids + self.choice.rows[:, None] * words, self.weight.view(-1, width))


class StackedHead(nn.Module):
    """The head of every task: its embedding table."""

    def __init__(self, table: StackedTable) -> None:
        super().__init__()
        self.table = [table]  # in a list: its weight is not counted twice

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x: (N, T, D), or (M, D) with `choice.rows` (M,) sorted but not equally many."""
        table = self.table[0]
        if x.dim() == 3:
            return multiply(x, table.choice.take(table.weight))
        sizes = table.choice.rows.bincount(minlength=len(table.weight)).tolist()
        parts = zip(x.split(sizes), table.weight.unbind(0), strict=True)
        return torch.cat([part @ weight.t() for part, weight in parts])


class StackedLora(nn.Module):
    """A frozen linear layer and one LoRA per task: A (E, r, D), B (E, H, r)."""

    def __init__(self, linear: nn.Linear, choice: Stack, tasks: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.choice, self.scale = linear, choice, alpha / rank
        width, depth = linear.weight.shape
        self.A = nn.Parameter(torch.empty(tasks, rank, depth, device=linear.weight.device))
        self.B = nn.Parameter(torch.zeros(tasks, width, rank, device=linear.weight.device))
        for one in self.A.data:  # as PEFT starts each
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, T, D) to (N, T, H)."""
        low = multiply(x, self.choice.take(self.A))
        return self.linear(x) + multiply(low, self.choice.take(self.B)) * self.scale

    def merge(self) -> Tensor:
        """W + alpha/r B A of every task: (E, H, D)."""
        return self.linear.weight + self.scale * torch.bmm(self.B, self.A)


class PromptTable(nn.Module):
    """An embedding whose ids from V on are virtual tokens, other ones for every task: prompts (E, P, D)."""

    def __init__(self, table: nn.Embedding, choice: Stack, tasks: int, length: int) -> None:
        super().__init__()
        self.table, self.choice = table, choice
        start = torch.randint(len(table.weight), (tasks, length), device=table.weight.device)
        self.prompts = nn.Parameter(table.weight[start].clone())  # words of the vocabulary, as in arXiv 2104.08691

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (N, T)."""
        words = len(self.table.weight)
        virtual = ids >= words
        found = self.table(ids.clamp_max(words - 1))
        own = self.prompts[self.choice.rows[:, None], (ids - words).clamp_min(0)]
        return torch.where(virtual.unsqueeze(-1), own, found)


def replace_modules(model: nn.Module, kind: type, make) -> None:
    """Put make(name, module) in the place of every module of a kind."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(name, module))
