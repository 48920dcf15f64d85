"""What teaches the eyes to see, before the text model reads along: a small network that reads all answers at once.

Fifteen learned queries look at the projector's rows, and each names one part of the scene (the hour, the third
letter, the colour, ...). It is thrown away after the first stage.
"""

from __future__ import annotations

import torch
from scenes import COLOURS, SHAPES, Scene
from torch import Tensor, nn
from torch.nn import functional as F

LETTERS = 5
SLOTS = {  # name: number of classes
    "hour": 12,
    "minute": 12,
    "count": 9,
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    **{f"digit{k}": 10 for k in range(3)},
    **{f"letter{k}": 27 for k in range(LETTERS)},  # 26: no letter here
    "arrow": 8,
    "tallest": 5,
}


def label_scene(scene: Scene) -> list[int]:
    """The classes of a scene, in the order of SLOTS."""
    letters = [ord(c) - ord("A") for c in scene.word] + [26] * (LETTERS - len(scene.word))
    hour, minute = scene.clock
    return [
        hour - 1,
        minute // 5,
        scene.count - 1,
        tuple(COLOURS).index(scene.colour),
        SHAPES.index(scene.shape),
        *(int(d) for d in scene.digits),
        *letters,
        scene.arrow,
        scene.tallest,
    ]


class Look(nn.Module):
    """Queries attend to the rows, then think."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.think = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (self.q(self.norm(x)), *self.kv(rows).chunk(2, -1))
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.think(self.norm2(x))


class Reader(nn.Module):
    """Rows of the text model's width (N, tokens, text) to one row of logits a slot: a list of (N, classes)."""

    def __init__(self, text: int, width: int = 256) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(text), nn.Linear(text, width))
        self.queries = nn.Parameter(torch.randn(len(SLOTS), width) * 0.02)
        self.looks = nn.ModuleList(Look(width) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(width, classes) for classes in SLOTS.values())

    def forward(self, rows: Tensor) -> list[Tensor]:
        rows = self.enter(rows)
        x = self.queries.expand(rows.shape[0], -1, -1)
        for look in self.looks:
            x = look(x, rows)
        return [head(x[:, k]) for k, head in enumerate(self.heads)]


def measure_loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy over the slots. labels: (N, slots)."""
    return torch.stack([F.cross_entropy(out.float(), labels[:, k]) for k, out in enumerate(logits)]).mean()


def count_right(logits: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Share of scenes right, per task (a word is right with all its letters)."""
    right = torch.stack([out.argmax(-1) == labels[:, k] for k, out in enumerate(logits)], 1)
    names = list(SLOTS)
    parts = {"clock": ("hour", "minute"), "digits": ("digit0", "digit1", "digit2")}
    parts["word"] = tuple(f"letter{k}" for k in range(LETTERS))
    parts |= {name: (name,) for name in ("count", "colour", "shape", "arrow", "tallest")}
    return {t: right[:, [names.index(p) for p in ps]].all(1).float().mean().item() for t, ps in parts.items()}
