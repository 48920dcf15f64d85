"""The eyes of the vision demo: a small SigLIP-like tower and the projector into the text model.

The layers, their names and their maths are those of transformers' SmolVLM (tower, last norm, pixel shuffle, one
linear without bias), so the trained tensors are a SmolVLM checkpoint's; tests compare the two. Kept apart from
transformers so that training can round the weights on the way (see Linear.rounding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 32  # input weights that share one scale when rounded to int4


@dataclass(frozen=True)
class Shape:
    """Sizes of tower and projector; 2 x 2 patches of a picture become one row of the text model."""

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    middle: int = 1024
    image: int = 96
    patch: int = 8
    shuffle: int = 2
    text: int = 576

    @property
    def side(self) -> int:
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        return (self.side // self.shuffle) ** 2


class Linear(nn.Linear):
    """A linear layer that can be trained to stand rounding.

    rounding: the forward pass sees the weights in int4 groups of 32, the gradient passes straight through.
    """

    rounding = False

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.rounding:
            weight = weight + (round_int4(weight.detach()) - weight.detach())
        return F.linear(x, weight, self.bias)


def round_int4(weight: Tensor) -> Tensor:
    """Round a weight (H, D) to symmetric int4, one scale for GROUP weights of a row; returns it in its own dtype."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(2**-14)
    return ((groups / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


class Attention(nn.Module):
    """Attention of every patch to every patch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(shape.hidden, shape.hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Middle(nn.Module):
    """The two-layer network of a block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(shape.hidden, shape.middle), Linear(shape.middle, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """One layer of the tower: norm before each half, a residual around it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(shape.hidden, eps=1e-6) for _ in range(2))
        self.self_attn, self.mlp = Attention(shape), Middle(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Eyes(nn.Module):
    """Pixels to rows of the text model.

    Its parameters are named as in SmolVLM below `model.`: vision_model.* and connector.*.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Conv2d(3, shape.hidden, shape.patch, shape.patch),
                "position_embedding": nn.Embedding(shape.side**2, shape.hidden),
            }
        )
        encoder = nn.ModuleDict({"layers": nn.ModuleList(Block(shape) for _ in range(shape.layers))})
        norm = nn.LayerNorm(shape.hidden, eps=1e-6)
        self.vision_model = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder, "post_layernorm": norm})
        proj = Linear(shape.hidden * shape.shuffle**2, shape.text, bias=False)
        self.connector = nn.ModuleDict({"modality_projection": nn.ModuleDict({"proj": proj})})
        nn.init.normal_(embeddings["position_embedding"].weight, std=0.02)
        nn.init.normal_(proj.weight, std=0.004)  # rows as large as the text model's embeddings

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (N, 3, S, S) in [-1, 1] to rows (N, tokens, text)."""
        tower = self.vision_model
        x = tower["embeddings"]["patch_embedding"](pixels).flatten(2).transpose(1, 2)
        x = x + tower["embeddings"]["position_embedding"].weight
        for block in tower["encoder"]["layers"]:
            x = block(x)
        return self.connector["modality_projection"]["proj"](self._shuffle(tower["post_layernorm"](x)))

    def _shuffle(self, x: Tensor) -> Tensor:
        """Join 2 x 2 patches into one row, in raster order: (N, P, C) to (N, P / 4, 4 C)."""
        side, s = self.shape.side, self.shape.shuffle
        x = x.reshape(x.shape[0], side // s, s, side // s, s, x.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).reshape(x.shape[0], self.shape.tokens, -1)


def set_rounding(eyes: Eyes, on: bool) -> None:
    """Let all linear layers see rounded weights, or their own."""
    for module in eyes.modules():
        if isinstance(module, Linear):
            module.rounding = on


def pack_eyes(eyes: Eyes) -> dict[str, Tensor]:
    """Pack the tensors as they are shipped: matrices int8 with one scale a row (NAME.scale), the rest float16."""
    packed = {}
    for name, value in eyes.state_dict().items():
        value = value.detach().float().cpu()
        if value.ndim == 2 and "embedding" not in name:
            scale = value.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
            packed[name] = (value / scale).round().clamp(-127, 127).to(torch.int8)
            packed[f"{name}.scale"] = scale[:, 0].contiguous()
        else:
            packed[name] = value.half().contiguous()
    return packed


def unpack_eyes(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unpack shipped tensors to float32, by the names of Eyes."""
    scales = {name.removesuffix(".scale"): v for name, v in packed.items() if name.endswith(".scale")}
    values = {name: v.float() for name, v in packed.items() if not name.endswith(".scale")}
    return {name: v * scales[name][:, None] if name in scales else v for name, v in values.items()}
