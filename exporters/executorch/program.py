"""A CompiledModel as one method for ExecuTorch: static cache, dynamic prompt length, the expert as an input.

Between two attentions everything is one XNNPACK subgraph. What XNNPACK does not take with a dynamic length
(slices, means) is therefore written as products, or done once a layer on q, k and v together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from executorch.extension.llm.custom_ops import custom_ops as _  # noqa: F401  registers update_cache, custom_sdpa
from torch import Tensor, nn

from lime_edge.compiler.formats.architecture import Decoder
from lime_edge.compiler.maths.block import Place, Source, run_block
from lime_edge.compiler.model.compiled import CompiledModel, Group, GroupBranch
from lime_edge.compiler.model.decoder import ACTIVATIONS
from lime_edge.compiler.model.multiplier import Multiplier
from lime_edge.exporters.executorch.norms import HeadNorm, Norm, WideNorm
from lime_edge.exporters.executorch.prompt import VirtualPrompt
from lime_edge.exporters.executorch.weights import PackedTable, Product

NORMS: dict[Place, str] = {
    "before_attention": "input_norm",
    "after_attention": "attention_norm",
    "before_mlp": "post_norm",
    "after_mlp": "mlp_norm",
}
HIDDEN_SCORE = -1e30  # of a key outside the window: finite, so that a tile with no visible key makes no NaN


@dataclass(frozen=True)
class Sizes:
    """What a program is made for, in tokens.

    cache: positions held, virtual tokens included; prompt: most tokens of one call; rows: most positions whose
    logits one call gives.
    """

    cache: int
    prompt: int
    rows: int


@dataclass
class Call:
    """What every layer of one call reads.

    start: tokens in the cache before. tables: cos and sin of every rotation, (1, S, heads + 2 kv_heads, D), neutral
    for values. masks: by window, (S, cache). expert: the residual's pieces by offset; None routes.
    """

    start: int
    tables: list[tuple[Tensor, Tensor]]
    expert: dict[int, Tensor] | None
    masks: dict[int | None, Tensor] = field(default_factory=dict)


def activate(name: str, x: Tensor) -> Tensor:
    """The MLP's activation. XNNPACK computes every gelu with erf, so the one with tanh is written out.

    Source: arXiv 1606.08415, section 2; executorch 1.5.1, backends/xnnpack/operators/op_gelu.py.
    """
    if name == "gelu_pytorch_tanh":
        inner = (2.0 / math.pi) ** 0.5 * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (1.0 + torch.tanh(inner))
    if name == "relu2":
        positive = F.relu(x)
        return positive * positive
    return ACTIVATIONS[name](x)


def list_groups(model: CompiledModel, layer: int) -> dict[str, Group]:
    """The products of a layer: q, k and v in one; gate and up apart, so that nothing must be split afterwards.

    A checkpoint's own product of gate and up stays one, "gate_up": its experts act on the whole.
    """
    groups = model.groups(layer)
    pair, down = groups.pop("gate_up"), groups.pop("down")
    for name, width in zip(pair.names, pair.widths, strict=True):
        groups[name.rsplit(".", 1)[-1].removesuffix("_proj")] = Group((name,), (width,))
    return groups | {"down": down}


def list_branches(model: CompiledModel) -> list[GroupBranch]:
    """The branches of the embedding and of every layer's products."""
    groups = [model.embedding_group]
    for layer in range(len(model.decoder.layers)):
        groups += list_groups(model, layer).values()
    return [branch for branch in map(model.group_branch, groups) if branch is not None]


class Cut(nn.Module):
    """The flat residual (sum_H,), cut once for the whole program."""

    def __init__(self, branches: list[GroupBranch], total: int):
        super().__init__()
        self.sizes: list[int] = []
        self.offsets: list[int | None] = []
        end = 0
        for offset, width in sorted(run for branch in branches for run in branch.find_runs()):
            self._add(None, offset - end)
            self._add(offset, width)
            end = offset + width
        self._add(None, total - end)

    def _add(self, offset: int | None, width: int) -> None:
        if width:
            self.offsets.append(offset)
            self.sizes.append(width)

    def forward(self, expert: Tensor) -> dict[int, Tensor]:
        """Pieces by offset."""
        pieces = expert.split_with_sizes(self.sizes) if len(self.sizes) > 1 else (expert,)
        return {offset: piece for offset, piece in zip(self.offsets, pieces, strict=True) if offset is not None}


class Branch(nn.Module):
    """What a group's branch is multiplied with: pieces of the residual, or routed weights times the bank."""

    def __init__(self, model: CompiledModel, branch: GroupBranch, routed: bool):
        super().__init__()
        self.parts, self.gaps, self.adds = branch.parts, branch.gaps, branch.a is not None
        self.first = min(part.site.offset for part in branch.parts if part.site is not None)
        self.route = Multiplier(model, branch) if routed else None
        rest = [part.width - part.adapted for part in branch.parts]
        self.fills = nn.ParameterList([nn.Parameter(torch.full((n,), float(not self.adds)), False) for n in rest])

    def forward(self, y: Tensor, delta: Tensor, expert: dict[int, Tensor] | None) -> Tensor:
        """(N,) pinned, (1, S, N) routed. y: before the residual (SliceFine: before the bias)."""
        if self.route is not None:
            return self.route(y, delta, None)
        assert expert is not None
        if not self.gaps:
            return expert[self.first]
        pieces: list[Tensor] = []
        for part, fill in zip(self.parts, self.fills, strict=True):
            pieces += [expert[part.site.offset]] if part.site is not None else []
            pieces += [fill] if fill.numel() else []
        return torch.cat(pieces)


class Projection(nn.Module):
    """A group of linears on one input as one product, with what the expert does to it (decoder.Projection)."""

    def __init__(self, model: CompiledModel, group: Group, routed: bool):
        super().__init__()
        branch, bias = (model.group_branch(group) if model.swaps else None), model.group_bias(group)
        scales = branch is not None and branch.a is None  # SliceFine: the bias comes after the multiplier
        self.product = Product([model.weights[f"{name}.weight"] for name in group.names], None if scales else bias)
        self.bias = nn.Buffer(bias) if scales and bias is not None else None
        self.branch = None if branch is None else Branch(model, branch, routed)
        self.a = nn.Buffer(branch.a) if branch is not None and branch.a is not None else None
        self.b = nn.Buffer(branch.b) if branch is not None and branch.b is not None else None

    def forward(self, x: Tensor, expert: dict[int, Tensor] | None) -> Tensor:
        """x: (1, S, D) -> (1, S, N)."""
        y = self.product(x)
        if self.branch is None:
            return y
        if self.a is None or self.b is None:
            y = y * self.branch(y, y, expert)
            return y if self.bias is None else y + self.bias
        delta = F.linear(F.linear(x, self.a), self.b)
        return y + self.branch(y, delta, expert) * delta


class Embedding(nn.Module):
    """The token table with what the expert does to it (decoder.Embedding)."""

    def __init__(self, model: CompiledModel, routed: bool):
        super().__init__()
        branch = model.group_branch(model.embedding_group) if model.swaps else None
        self.table = PackedTable(model.weights[f"{model.decoder.embedding}.weight"])
        self.branch = None if branch is None else Branch(model, branch, routed)
        self.a = nn.Buffer(branch.a) if branch is not None and branch.a is not None else None
        self.b = nn.Buffer(branch.b) if branch is not None and branch.b is not None else None

    def forward(self, ids: Tensor, expert: dict[int, Tensor] | None) -> Tensor:
        """ids: (1, S) int64 -> (1, S, hidden)."""
        y = self.table(ids)
        if self.branch is None:
            return y
        if self.a is None or self.b is None:
            return y * self.branch(y, y, expert)
        delta = F.linear(F.embedding(ids, self.a), self.b)
        return y + self.branch(y, delta, expert) * delta


class Block(nn.Module):
    """One decoder layer over its own cache, put together as the plan says."""

    def __init__(self, model: CompiledModel, index: int, cache: int, routed: bool):
        super().__init__()
        c = self.config = model.decoder
        self.plan, self.rotation, self.window = c.block, c.rotation_of(index), c.layers[index].window
        prefix, groups = c.prefix(index), list_groups(model, index)
        for kind, group in groups.items():
            self.add_module(kind, Projection(model, group, routed))
        for place, name in NORMS.items():
            if (norm_name := self.plan.norms.find(place)) is not None:
                self.add_module(name, Norm(model, prefix + norm_name))
        norm, self.head_norm, self.wide_norm = self.plan.head_norm, None, None
        if norm is not None and norm.width == "all":
            assert not norm.rotated, "no family turns all heads before it normalises them"
            self.wide_norm = WideNorm(model, index)
        elif norm is not None:
            self.head_norm = HeadNorm(model, index)
        self.turn = nn.Buffer(make_turn(c, self.rotation or 0))
        self.register_buffer("k_cache", torch.zeros(1, cache, c.kv_heads, c.head_dim))
        self.register_buffer("v_cache", torch.zeros(1, cache, c.kv_heads, c.head_dim))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """x: (1, S, hidden) -> the same shape."""
        return run_block(self.plan, Step(self, call), x)

    def feed(self, x: Tensor, call: Call) -> Tensor:
        """The MLP."""
        name = self.plan.activation
        if "gate_up" in self.plan.fused:
            gate, up = self.multiply("gate_up", x, call).split(self.config.intermediate, dim=-1)
            gated = activate(name, gate) * up
        elif self.plan.gated:
            gated = activate(name, self.multiply("gate", x, call)) * self.multiply("up", x, call)
        else:
            gated = activate(name, self.multiply("up", x, call))
        return self.multiply("down", gated, call)

    def multiply(self, kind: str, x: Tensor, call: Call) -> Tensor:
        """One of the layer's products, with what the expert does to it."""
        out: Tensor = self.get_submodule(kind)(x, call.expert)
        return out

    def attend(self, qkv: Tensor, call: Call) -> Tensor:
        """Causal grouped-query attention over the cache. qkv: (1, S, N) -> (1, S, heads * D)."""
        c = self.config
        if self.wide_norm is not None:
            qkv = self.wide_norm(qkv)
        x = qkv.view(1, -1, c.heads + 2 * c.kv_heads, c.head_dim)  # with -1 XNNPACK takes it, with a length not
        rotated = self.plan.head_norm is not None and self.plan.head_norm.rotated
        if self.head_norm is not None and not rotated:
            x = self.head_norm(x)
        if self.rotation is not None:
            cos, sin = call.tables[self.rotation]
            x = x * cos + F.linear(x, self.turn) * sin
        if self.head_norm is not None and rotated:
            x = self.head_norm(x)
        query, key, value = x.split_with_sizes([c.heads, c.kv_heads, c.kv_heads], dim=2)
        ops, scale = torch.ops.llama, c.head_dim**-0.5
        k_cache, v_cache = self.get_buffer("k_cache"), self.get_buffer("v_cache")
        ops.update_cache(key, k_cache, call.start)
        ops.update_cache(value, v_cache, call.start)
        if self.plan.cap is not None:
            return attend_capped(query * scale, k_cache, v_cache, call.masks[self.window], self.plan.cap)
        mask = None if self.window is None else call.masks[self.window]
        out = ops.custom_sdpa(query, k_cache, v_cache, call.start, mask, 0.0, mask is None, scale)
        return out.view(1, qkv.shape[1], c.heads * c.head_dim)


def make_turn(c: Decoder, rotation: int) -> Tensor:
    """(D, D): F.linear(x, turn) is what sin multiplies: of a pair (a, b) minus b, then a; 0 where nothing turns."""
    turn = torch.zeros(c.head_dim, c.head_dim)
    pairs = c.rotations[rotation].width // 2
    first = torch.arange(pairs) * (2 if c.block.interleaved else 1)
    second = first + (1 if c.block.interleaved else pairs)
    turn[first[:, None], second], turn[second[:, None], first] = -torch.eye(pairs), torch.eye(pairs)
    return turn


def attend_capped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, limit: float) -> Tensor:
    """Attention whose scores are capped, which the fused operator cannot.

    Args:
        query: (1, S, heads, D), scaled. keys, values: (1, cache, kv_heads, D). mask: (S, cache), added to scores.
    Returns:
        (1, S, heads * D).
    """
    heads, width = query.shape[2:]
    shared = heads // keys.shape[2]
    keys, values = (x.repeat_interleave(shared, dim=2).permute(0, 2, 1, 3) for x in (keys, values))
    scores = torch.tanh(query.permute(0, 2, 1, 3) @ keys.transpose(2, 3) / limit) * limit
    out = torch.softmax(scores + mask, dim=-1) @ values
    return out.permute(0, 2, 1, 3).reshape(1, query.shape[1], heads * width)


@dataclass(frozen=True)
class Step:
    """One block in one call: the operations of its plan (`maths.block.Operations`)."""

    block: Block
    call: Call

    def read(self, place: Place, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The stream normalised, where there is a norm, and the stream."""
        known = self.block.plan.norms.find(place) is not None
        return (self.normalise(place, stream) if known else stream), stream

    def normalise(self, place: Place, x: Tensor) -> Tensor:
        """Through the norm of that place."""
        out: Tensor = self.block.get_submodule(NORMS[place])(x)
        return out

    def attend(self, x: Tensor) -> Tensor:
        """Attention, and the products before and after it."""
        block, call = self.block, self.call
        return block.multiply("o", block.attend(block.multiply("qkv", x, call), call), call)

    def feed(self, x: Tensor) -> Tensor:
        """The MLP."""
        return self.block.feed(x, self.call)

    def add(self, stream: Tensor, x: Tensor, source: Source) -> Tensor:
        """The residual sum."""
        return stream + x


class DecoderProgram(nn.Module):
    """The method `forward` of a language model.

    Args:
        model: compiled. sizes: of the static cache and of one call. routed: weigh the checkpoint's experts per
            token and site instead of taking a residual.
    """

    def __init__(self, model: CompiledModel, sizes: Sizes, routed: bool = False):
        super().__init__()
        c = self.config = model.decoder
        self.sizes, self.takes_expert = sizes, model.swaps and not routed
        self.cut = Cut(list_branches(model), model.sites.total) if self.takes_expert else None
        self.embedding = Embedding(model, routed)
        self.virtual = VirtualPrompt(model, routed) if model.virtual is not None else None
        self.blocks = nn.ModuleList(Block(model, i, sizes.cache, routed) for i in range(len(c.layers)))
        self.norm = Norm(model, c.norm)
        self.head = Product([model.weights[model.head_name]])
        for which in range(len(c.rotations)):
            for name, table in zip(name_tables(which), widen(c, c.rope_tables(sizes.cache, which)), strict=True):
                self.register_buffer(name, table)
        turned = torch.zeros(c.heads + 2 * c.kv_heads, 1)
        turned[: c.heads + c.kv_heads] = 1.0
        self.turned, self.kept = nn.Buffer(turned), nn.Buffer(1.0 - turned)

    def forward(self, ids: Tensor, pos: Tensor, rows: Tensor, expert: Tensor | None = None) -> Tensor:
        """Logits of the positions `rows` of this call.

        Args:
            ids: (1, S) int64; ids from `vocab` on are the virtual tokens. pos: (1,) int64, tokens in the cache.
            rows: (K,) int64, in 0..S-1. expert: the residual d (sum_H,) float32; None routes, or there is none.
        Returns:
            (1, K, vocab) float32.
        """
        return self.decode(ids, pos, rows, expert, None)

    def decode(self, ids: Tensor, pos: Tensor, rows: Tensor, expert: Tensor | None, seen: Tensor | None) -> Tensor:
        """The same; seen: (1, S, hidden), what stands where ids are `vocab` and above, in a model that sees."""
        start, length = cast(int, pos[0].item()), ids.shape[1]
        torch._check(start >= 0)
        torch._check(start < self.sizes.cache)
        torch._check(start + length <= self.sizes.cache)
        pieces = self.cut(expert) if self.cut is not None and expert is not None else None
        if seen is None:
            x = self.embed(ids, expert, pieces)
        else:
            known = self.embedding(ids.clamp(max=self.config.vocab - 1), pieces)
            x = torch.where((ids < self.config.vocab).unsqueeze(-1), known, seen)
        call = self.prepare(start, length, pieces)
        for block in self.blocks:
            x = block(x, call)
        logits, limit = self.head(self.norm(x.index_select(1, rows))), self.config.logit_cap
        return logits if limit is None else torch.tanh(logits / limit) * limit

    def embed(self, ids: Tensor, expert: Tensor | None, pieces: dict[int, Tensor] | None) -> Tensor:
        """(1, S, hidden), virtual tokens put in where there are any."""
        if self.virtual is None:
            return self.embedding(ids, pieces)
        real = (ids < self.config.vocab).unsqueeze(-1)
        return self.virtual(ids, self.embedding(ids.clamp(max=self.config.vocab - 1), pieces), real, expert)

    def prepare(self, start: int, length: int, pieces: dict[int, Tensor] | None) -> Call:
        """Rotations and masks, once for all layers."""
        positions = torch.arange(length) + start
        tables = []
        for which in range(len(self.config.rotations)):
            pair = (self.get_buffer(name) for name in name_tables(which))
            cos, sin = (table.index_select(0, positions).unsqueeze(1) for table in pair)
            tables.append(((cos * self.turned + self.kept).unsqueeze(0), (sin * self.turned).unsqueeze(0)))
        call = Call(start, tables, pieces)
        masked = {layer.window for layer in self.config.layers if layer.window is not None or self.config.block.cap}
        for window in masked:
            distance = positions[:, None] - torch.arange(self.sizes.cache)[None, :]
            seen = distance >= 0
            if window is not None:
                seen = seen & (distance < window)
            call.masks[window] = torch.where(seen, 0.0, HIDDEN_SCORE)
        return call


class SeeingProgram(DecoderProgram):
    """The method `forward` of a model that sees: one more input, rows of pictures."""

    def forward(  # type: ignore[override]
        self, ids: Tensor, pos: Tensor, rows: Tensor, seen: Tensor, expert: Tensor | None = None
    ) -> Tensor:
        """As DecoderProgram; ids from `vocab` on stand for rows of `seen`, (1, S, hidden) float32, at their place."""
        return self.decode(ids, pos, rows, expert, seen)


def name_tables(rotation: int) -> tuple[str, str]:
    """The buffers of a rotation's cos and sin."""
    return (f"cos_{rotation}", f"sin_{rotation}") if rotation else ("cos", "sin")


def widen(c: Decoder, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin for every element of a head, (L, D): both of a pair alike, neutral where nothing turns."""
    if c.block.interleaved:
        cos, sin = (table.repeat_interleave(2, dim=-1) for table in tables)
    else:
        cos, sin = (torch.cat([table, table], -1) for table in tables)
    rest = c.head_dim - cos.shape[-1]
    return F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))
