"""A CompiledModel as one function of a Core AI program: prompt and decode, the cache as two states.

What a program needs beside the oracle: the position is an input; the cache has a fixed length, of which a row sees what
lies before it; rows after the prompt's end are padding, which no real row sees and the next call overwrites.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_edge.compiler.maths.block import PLACES, Place, Source, run_block
from lime_edge.compiler.model.compiled import CompiledModel, Group
from lime_edge.compiler.model.decoder import ACTIVATIONS, HeadNorm, cap, make_norm, rotate
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


@dataclass
class Call:
    """What every layer of one call shares.

    start, stop: (1,) int32, where the rows go. tables: cos and sin (S, pairs) of every rotation. masks: by window,
    (1, 1, S, L), added to scores. keys, values: (layers, 1, kv_heads, L, D), as far as layers have written them.
    expert: d (sum_H,), None where there is none or it is routed. length: 0-dim, real rows; None where nothing reads it.
    """

    start: Tensor
    stop: Tensor
    tables: list[tuple[Tensor, Tensor]]
    masks: dict[int | None, Tensor]
    keys: Tensor
    values: Tensor
    expert: Tensor | None
    length: Tensor | None

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's new rows, (1, kv_heads, S, D), into the cache; all rows of that layer."""
        put = torch.ops.lime_edge.put_rows
        self.keys = put(self.keys, key[None], self.start, self.stop, layer)
        self.values = put(self.values, value[None], self.start, self.stop, layer)
        return self.keys[layer], self.values[layer]


class Wide(nn.Module):
    """A norm of the oracle's in float32, whatever comes in: squares leave float16. It stays float32 (see `narrow`)."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        found: Tensor = self.norm(x.float())
        return found.to(x.dtype)


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
        self.table = Table(model.weights[f"{model.decoder.embedding}.weight"])
        self.branch = make_branch(model, model.embedding_group, routed)

    def forward(self, ids: Tensor, call: Call) -> Tensor:
        """ids: (1, S) -> (1, S, hidden)."""
        y = self.table(ids)
        if self.branch is None:
            return y
        return self.branch(y, None if self.branch.a is None else F.embedding(ids, self.branch.a), call)


class Block(nn.Module):
    """One decoder layer over its part of the cache, put together as the plan says."""

    def __init__(self, model: CompiledModel, index: int, routed: bool):
        super().__init__()
        c = self.config = model.decoder
        self.index, self.plan, self.rotation, self.window = index, c.block, c.rotation_of(index), c.layers[index].window
        prefix, groups = c.prefix(index), model.groups(index)
        self.qkv, self.o, self.gate_up, self.down = (
            Projection(model, groups[kind], routed) for kind in ("qkv", "o", "gate_up", "down")
        )
        names = {place: self.plan.norms.find(place) for place in PLACES}
        self.norms = nn.ModuleDict({p: Wide(make_norm(model, prefix + name)) for p, name in names.items() if name})
        self.head_norms: nn.ModuleList | None = None
        if (norm := self.plan.head_norm) is not None:
            weights = [model.vectors[f"{prefix}self_attn.{name}.weight"] for name in (norm.query, norm.key)]
            counts = (c.heads, c.kv_heads)
            self.head_norms = nn.ModuleList(
                Wide(HeadNorm(weight, count, c.block, c.norm_eps))
                for weight, count in zip(weights, counts, strict=True)
            )

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """x: (1, S, hidden) -> the same shape; the cache is in `call`."""
        return run_block(self.plan, Step(self, call), x)

    def attend(self, qkv: Tensor, call: Call) -> Tensor:
        """Causal grouped-query attention over the cache. qkv: (1, S, N) -> (1, S, heads * D)."""
        c, length = self.config, qkv.shape[1]
        heads = qkv.view(1, length, c.heads + 2 * c.kv_heads, c.head_dim).transpose(1, 2)
        query, key, value = heads.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
        query, key = self.turn(query, key, call)
        keys, values = call.store(self.index, key, value)
        mask = call.masks[self.window]
        if self.plan.cap is None:
            out = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
        else:
            out = attend_capped(query * c.head_dim**-0.5, keys, values, mask, self.plan.cap)
        return out.transpose(1, 2).reshape(1, length, c.heads * c.head_dim)

    def turn(self, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Queries and keys normalised and rotated, in the plan's order."""
        norm, both = self.plan.head_norm, [query, key]
        if self.head_norms is not None and norm is not None and not norm.rotated:
            both = [part(x) for part, x in zip(self.head_norms, both, strict=True)]
        if self.rotation is not None:
            both = [rotate(x, *call.tables[self.rotation], self.plan.interleaved) for x in both]
        if self.head_norms is not None and norm is not None and norm.rotated:
            both = [part(x) for part, x in zip(self.head_norms, both, strict=True)]
        return both[0], both[1]

    def feed(self, x: Tensor, call: Call) -> Tensor:
        """The MLP."""
        both, activate = self.gate_up(x, call), ACTIVATIONS[self.plan.activation]
        if not self.plan.gated:
            return self.down(activate(both), call)
        gate, up = both.chunk(2, dim=-1)
        return self.down(activate(gate) * up, call)


def attend_capped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, limit: float) -> Tensor:
    """Attention whose scores are capped, which Core AI's own operation cannot. query: scaled, (1, heads, S, D)."""
    shared = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    return torch.softmax(cap(query @ keys.transpose(2, 3), limit) + mask, -1) @ values


@dataclass(frozen=True)
class Step:
    """One block in one call: the operations of its plan (`maths.block.Operations`)."""

    block: Block
    call: Call

    def read(self, place: Place, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The stream normalised, where there is a norm, and the stream."""
        return (self.normalise(place, stream) if place in self.block.norms else stream), stream

    def normalise(self, place: Place, x: Tensor) -> Tensor:
        """Through the norm of that place."""
        found: Tensor = self.block.norms[place](x)
        return found

    def attend(self, x: Tensor) -> Tensor:
        """Attention, and the products before and after it."""
        block, call = self.block, self.call
        attended: Tensor = block.o(block.attend(block.qkv(x, call), call), call)
        return attended

    def feed(self, x: Tensor) -> Tensor:
        """The MLP."""
        return self.block.feed(x, self.call)

    def add(self, stream: Tensor, x: Tensor, source: Source) -> Tensor:
        """The residual sum."""
        return stream + x


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
        self.norm = Wide(make_norm(model, c.norm))
        self.head = Product([model.weights[model.head_name]])
        tables = [c.rope_tables(capacity + longest, which) for which in range(len(c.rotations))]
        self.cos = nn.ParameterList([nn.Parameter(cos, False) for cos, _ in tables])
        self.sin = nn.ParameterList([nn.Parameter(sin, False) for _, sin in tables])

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
        call = self.prepare(input_ids, position, keys, values, last)
        x = self.embed(input_ids, call)
        for block in self.blocks:
            x = block(x, call)
        keys.copy_(call.keys)
        values.copy_(call.values)
        return cap(self.head(self.norm(x)), self.config.logit_cap)

    def prepare(self, ids: Tensor, position: Tensor, keys: Tensor, values: Tensor, last: Tensor | None) -> Call:
        """Rotations and masks, once for all layers."""
        rows = torch.arange(ids.shape[1], dtype=torch.int32) + position
        both = zip(self.cos, self.sin, strict=True)
        tables = [(cos.index_select(0, rows), sin.index_select(0, rows)) for cos, sin in both]
        behind = rows[:, None] - torch.arange(self.capacity, dtype=torch.int32)[None]
        masks = {}
        for window in {layer.window for layer in self.config.layers}:
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            masks[window] = torch.where(seen, 0.0, UNSEEN).to(keys.dtype)[None, None]
        expert, length = last if self.takes_expert else None, last[0] if self.routed and last is not None else None
        return Call(position, position + ids.shape[1], tables, masks, keys, values, expert, length)

    def embed(self, ids: Tensor, call: Call) -> Tensor:
        """(1, S, hidden), virtual tokens put in where there are any."""
        if self.virtual is None:
            return self.embedding(ids, call)
        embeds = self.embedding(ids.clamp(max=self.config.vocab - 1), call)
        return self.virtual(ids, embeds, call.expert, call.length)


def narrow(program: DecoderProgram, dtype: torch.dtype) -> DecoderProgram:
    """The program in another float type, its norms left as they are."""
    program.to(dtype)
    for part in program.modules():
        if isinstance(part, Wide):
            part.float()
    return program.eval()
