"""Norms as XNNPACK takes them: every mean is a product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_edge.compiler.model.compiled import CompiledModel


class Norm(nn.Module):
    """RMSNorm or LayerNorm, whose mean is a product, which XNNPACK takes and `mean` not. Source: decoder.Norm."""

    def __init__(self, model: CompiledModel, name: str):
        super().__init__()
        weight, bias = model.vectors[f"{name}.weight"], model.vectors.get(f"{name}.bias")
        self.weight, self.eps, self.centers = nn.Buffer(weight), model.decoder.norm_eps, centers(model)
        self.bias = None if bias is None else nn.Buffer(bias)
        self.mean = nn.Buffer(torch.full((1, weight.numel()), 1.0 / weight.numel()))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if self.centers:
            x = x - F.linear(x, self.mean)
        y = x * torch.rsqrt(F.linear(x * x, self.mean) + self.eps) * self.weight
        return y if self.bias is None else y + self.bias


def centers(model: CompiledModel) -> bool:
    """Whether the model's norms subtract the mean first."""
    return model.decoder.block.norm == "layer"


def list_head_gains(model: CompiledModel, layer: int) -> Tensor:
    """The weights of the norm on queries and keys, zeros for values: (heads + 2 kv_heads, D)."""
    c, norm = model.decoder, model.decoder.block.head_norm
    assert norm is not None
    rows = []
    for name, heads in ((norm.query, c.heads), (norm.key, c.kv_heads)):
        vector = model.vectors[f"{c.prefix(layer)}self_attn.{name}.weight"]
        rows.append(vector.expand(heads, -1) if norm.width == "head" else vector.view(heads, -1))
    return torch.cat([*rows, torch.zeros(c.kv_heads, c.head_dim)]).contiguous()


class HeadNorm(nn.Module):
    """The norm of every query and key head, values left as they are: one call for all heads of a layer."""

    def __init__(self, model: CompiledModel, layer: int):
        super().__init__()
        c, width = model.decoder, model.decoder.head_dim
        self.eps, self.centers = c.norm_eps, centers(model)
        self.weight = nn.Buffer(list_head_gains(model, layer))
        keep = torch.zeros(c.heads + 2 * c.kv_heads, width)
        keep[c.heads + c.kv_heads :] = 1.0
        self.keep = nn.Buffer(keep)
        self.mean = nn.Buffer(torch.full((1, width), 1.0 / width))
        self.normed = nn.Buffer(1.0 - keep[:, :1]) if self.centers else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (1, S, heads + 2 kv_heads, D)."""
        if self.normed is not None:
            x = x - F.linear(x, self.mean) * self.normed
        scale = torch.rsqrt(F.linear(x * x, self.mean) + self.eps)
        return x * (scale * self.weight + self.keep)


class WideNorm(nn.Module):
    """The norm over all query heads at once, and over all key heads; values left as they are. RMS alone.

    The sums of the two parts are one product, and so is their way back to every element.
    """

    def __init__(self, model: CompiledModel, layer: int):
        super().__init__()
        assert not centers(model), "no family centers all heads at once"
        widths, self.eps = model.decoder.head_widths, model.decoder.norm_eps
        parts = torch.repeat_interleave(torch.eye(3), torch.tensor(widths), dim=1)  # (3, N)
        self.means = nn.Buffer((parts[:2] / torch.tensor(widths[:2])[:, None]).contiguous())
        self.spread = nn.Buffer((parts[:2].T * list_head_gains(model, layer).view(-1, 1)).contiguous())
        self.keep = nn.Buffer(parts[2])

    def forward(self, x: Tensor) -> Tensor:
        """x: (1, S, N)."""
        return x * (F.linear(torch.rsqrt(F.linear(x * x, self.means) + self.eps), self.spread) + self.keep)
