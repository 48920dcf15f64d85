"""A CompiledModel as one function of a Core AI program: prompt and decode, the cache as two states.

What a program needs beside the oracle: the position is an input; the cache has a fixed length, of which a row sees what
lies before it; rows after the prompt's end are padding, which no real row sees and the next call overwrites.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_edge.compiler.formats.architecture import EMBEDDING
from lime_edge.compiler.model.compiled import CompiledModel, Group
from lime_edge.compiler.model.decoder import ACTIVATIONS, rotate
from lime_edge.exporters.coreai.experts import Pinned, Routed
from lime_edge.exporters.coreai.prompt import VirtualPrompt
from lime_edge.exporters.coreai.weights import Product, Table

UNSEEN = -30000.0  # added to a score that a row must not see; float16 holds it, and exp of it is 0


@torch.library.custom_op("lime_edge::put_rows", mutates_args=())
def put_rows(cache: Tensor, rows: Tensor, start: Tensor, stop: Tensor, layer: int) -> Tensor:
    """The cache with rows of one layer written from `start` to `stop`.

    An operation of our own: indexing with a tensor traces to one that Core AI's runtime dies of.

    Args:
        cache: (layers, 1, kv_heads, L, D). rows: (1, 1, kv_heads, S, D). start, stop: (1,) int32, S apart.
    """
    found = cache.clone()
    found[layer : layer + 1, :, :, int(start) : int(stop)] = rows
    return found


@put_rows.register_fake
def _(cache: Tensor, rows: Tensor, start: Tensor, stop: Tensor, layer: int) -> Tensor:
    return torch.empty_like(cache)


@dataclass(frozen=True)
class Call:
    """What every layer of one call shares.

    start, stop: (1,) int32, where the rows go. cos, sin: (S, D/2). masks: by window, (1, 1, S, L), added to scores.
    expert: d (sum_H,), None where there is none or it is routed. length: 0-dim, real rows; None where nothing reads it.
    """

    start: Tensor
    stop: Tensor
    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor]
    expert: Tensor | None
    length: Tensor | None


class Norm(nn.Module):
    """RMSNorm, in float32 whatever comes in: squares leave float16. Source: arXiv 1910.07467 eq. 4."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Buffer(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = x.float()
        wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class Branch(nn.Module):
    """What the expert does to a group's outputs: y + d * (B A x), SliceFine s * y."""

    def __init__(self, model: CompiledModel, group: Group, routed: bool):
        super().__init__()
        branch = model.group_branch(group)
        assert branch is not None
        self.routed = Routed(model, branch) if routed else None
        self.pinned = None if routed else Pinned(branch)
        self.a = None if branch.a is None else nn.Buffer(branch.a)
        self.b = None if branch.b is None else nn.Buffer(branch.b)

    def forward(self, y: Tensor, reduced: Tensor | None, call: Call) -> Tensor:
        """y: (1, S, N). reduced: A x (1, S, R), None for SliceFine."""
        delta = y if reduced is None or self.b is None else F.linear(reduced, self.b)
        if self.routed is not None:
            assert call.length is not None
            times = self.routed(y, delta, call.length)
        else:
            assert call.expert is not None and self.pinned is not None
            times = self.pinned(call.expert)
        return y * times if reduced is None else y + times * delta


def make_branch(model: CompiledModel, group: Group, routed: bool) -> Branch | None:
    """A group's branch where the expert is not in the weights."""
    return Branch(model, group, routed) if model.swaps and model.group_branch(group) is not None else None


class Projection(nn.Module):
    """A group of linears on one input as one product, with what the expert does to it (decoder.Projection)."""

    def __init__(self, model: CompiledModel, group: Group, routed: bool):
        super().__init__()
        self.branch, bias = make_branch(model, group, routed), model.group_bias(group)
        late = self.branch is not None and self.branch.a is None  # SliceFine: the bias comes after the multiplier
        self.product = Product([model.weights[f"{name}.weight"] for name in group.names], None if late else bias)
        self.bias = nn.Buffer(bias) if late and bias is not None else None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """x: (1, S, D) -> (1, S, N)."""
        y = self.product(x)
        if self.branch is not None:
            y = self.branch(y, None if self.branch.a is None else F.linear(x, self.branch.a), call)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """The token table with what the expert does to it (decoder.Embedding)."""

    def __init__(self, model: CompiledModel, routed: bool):
        super().__init__()
        self.table = Table(model.weights[f"{EMBEDDING}.weight"])
        self.branch = make_branch(model, model.embedding_group, routed)

    def forward(self, ids: Tensor, call: Call) -> Tensor:
        """ids: (1, S) -> (1, S, hidden)."""
        y = self.table(ids)
        if self.branch is None:
            return y
        return self.branch(y, None if self.branch.a is None else F.embedding(ids, self.branch.a), call)


class Block(nn.Module):
    """One decoder layer over its part of the cache."""

    def __init__(self, model: CompiledModel, index: int, routed: bool):
        super().__init__()
        c = self.config = model.decoder
        self.index, self.attention = index, c.layers[index]
        prefix, groups = f"model.layers.{index}.", model.groups(index)
        self.qkv, self.o, self.gate_up, self.down = (
            Projection(model, groups[kind], routed) for kind in ("qkv", "o", "gate_up", "down")
        )
        self.input_norm = Norm(model.vectors[f"{prefix}input_layernorm.weight"], c.norm_eps)
        self.post_norm = Norm(model.vectors[f"{prefix}post_attention_layernorm.weight"], c.norm_eps)
        self.q_norm = self.k_norm = None
        if c.qk_norm:
            self.q_norm = Norm(model.vectors[f"{prefix}self_attn.q_norm.weight"], c.norm_eps)
            self.k_norm = Norm(model.vectors[f"{prefix}self_attn.k_norm.weight"], c.norm_eps)

    def forward(self, x: Tensor, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (1, S, hidden); keys, values: (layers, 1, kv_heads, L, D). Returns all three anew."""
        attended, keys, values = self.attend(self.qkv(self.input_norm(x), call), call, keys, values)
        x = x + self.o(attended, call)
        gate, up = self.gate_up(self.post_norm(x), call).chunk(2, dim=-1)
        return x + self.down(ACTIVATIONS[self.config.activation](gate) * up, call), keys, values

    def attend(self, qkv: Tensor, call: Call, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Causal grouped-query attention over the cache. qkv: (1, S, N) -> (1, S, heads * D)."""
        c = self.config
        heads = qkv.view(1, qkv.shape[1], c.heads + 2 * c.kv_heads, c.head_dim).transpose(1, 2)
        query, key, value = heads.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.attention.rope:
            query, key = rotate(query, call.cos, call.sin), rotate(key, call.cos, call.sin)
        put = torch.ops.lime_edge.put_rows
        keys = put(keys, key[None], call.start, call.stop, self.index)
        values = put(values, value[None], call.start, call.stop, self.index)
        mask = call.masks[self.attention.window]
        out = F.scaled_dot_product_attention(query, keys[self.index], values[self.index], mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(1, qkv.shape[1], c.heads * c.head_dim), keys, values


class DecoderProgram(nn.Module):
    """One function of a language model.

    Args:
        model: compiled. capacity: L, rows of the cache. longest: the longest prompt of one call. routed: weigh the
            checkpoint's experts per token and site instead of taking a residual.
    """

    def __init__(self, model: CompiledModel, capacity: int, longest: int, routed: bool = False):
        super().__init__()
        c = self.config = model.decoder
        self.capacity, self.routed, self.takes_expert = capacity, routed, model.swaps and not routed
        self.embedding = Embedding(model, routed)
        self.virtual = VirtualPrompt(model, routed) if model.virtual is not None else None
        self.blocks = nn.ModuleList(Block(model, index, routed) for index in range(len(c.layers)))
        self.norm = Norm(model.vectors["model.norm.weight"], c.norm_eps)
        self.head = Product([model.weights[model.head_name]])
        cos, sin = c.rope_tables(capacity + longest)
        self.cos, self.sin = nn.Buffer(cos), nn.Buffer(sin)

    def forward(
        self, input_ids: Tensor, position: Tensor, keys: Tensor, values: Tensor, last: Tensor | None = None
    ) -> Tensor:
        """Logits of every row; keys and values are written in place.

        Args:
            input_ids: (1, S) int32; ids from `vocab` on are virtual tokens. position: (1,) int32, tokens in the cache.
            keys, values: (layers, 1, kv_heads, L, D).
            last: the expert's d (sum_H,); routed, (1,) int32, real rows of this call; None where one is in the weights.
        Returns:
            (1, S, vocab).
        """
        call = self.prepare(input_ids, position, last, keys.dtype)
        x, stored = self.embed(input_ids, call), (keys, values)
        for block in self.blocks:
            x, *stored = block(x, call, *stored)
        keys.copy_(stored[0])
        values.copy_(stored[1])
        return self.head(self.norm(x))

    def prepare(self, ids: Tensor, position: Tensor, last: Tensor | None, dtype: torch.dtype) -> Call:
        """Rotations and masks, once for all layers."""
        rows = torch.arange(ids.shape[1], dtype=torch.int32) + position
        cos, sin = (table.index_select(0, rows).to(dtype) for table in (self.cos, self.sin))
        behind = rows[:, None] - torch.arange(self.capacity, dtype=torch.int32)[None]
        masks = {}
        for window in {layer.window for layer in self.config.layers}:
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            masks[window] = torch.where(seen, 0.0, UNSEEN).to(dtype)[None, None]
        expert, length = last if self.takes_expert else None, last[0] if self.routed and last is not None else None
        return Call(position, position + ids.shape[1], cos, sin, masks, expert, length)

    def embed(self, ids: Tensor, call: Call) -> Tensor:
        """(1, S, hidden), virtual tokens put in where there are any."""
        if self.virtual is None:
            return self.embedding(ids, call)
        embeds = self.embedding(ids.clamp(max=self.config.vocab - 1), call)
        return self.virtual(ids, embeds, call.expert, call.length)
