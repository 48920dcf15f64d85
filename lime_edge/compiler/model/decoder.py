"""Our own decoder in PyTorch: runs a CompiledModel and is the oracle of every exporter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lime_edge.compiler.formats.architecture import Decoder
from lime_edge.compiler.formats.backbone import Source as Input
from lime_edge.compiler.maths.block import PLACES, BlockPlan, Place, Source, run_block
from lime_edge.compiler.maths.prompt_tuning import route_prompt
from lime_edge.compiler.model.compiled import CompiledModel, Group
from lime_edge.compiler.model.multiplier import Multiplier

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
Tables = tuple[Tensor, Tensor]  # cos and sin of the call's positions, (S, pairs) each


@dataclass
class Cache:
    """Keys and values per layer, each (B, kv_heads, T, head_dim); empty at the start."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.keys[0].shape[2] if self.keys else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values of one layer; return all of that layer."""
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], dim=2)
            self.values[layer] = torch.cat([self.values[layer], value], dim=2)
        return self.keys[layer], self.values[layer]


class Projection(nn.Module):
    """A group of linears on one input, with what the expert does to them.

    LoRA, LoRA-FA, DoRA: y = W'x + b + d * (B A x). SliceFine: y = s * W'x + b, s = d on the first rows.
    """

    def __init__(self, model: CompiledModel, group: Group):
        super().__init__()
        self.weight = nn.Buffer(torch.cat([model.weight(f"{name}.weight") for name in group.names]))
        bias, branch = model.group_bias(group), model.group_branch(group)
        self.bias = None if bias is None else nn.Buffer(bias)
        self.multiplier = Multiplier(model, branch) if branch else None
        self.a = nn.Buffer(branch.a) if branch and branch.a is not None else None
        self.b = nn.Buffer(branch.b) if branch and branch.b is not None else None

    def forward(self, x: Tensor, expert: Tensor | None) -> Tensor:
        """x: (B, S, D); expert: see DecoderModule.forward. Returns (B, S, N)."""
        if self.multiplier is not None and (self.a is None or self.b is None):
            y = F.linear(x, self.weight)
            y = y * self.multiplier(y, y, expert)
            return y if self.bias is None else y + self.bias
        y = F.linear(x, self.weight, self.bias)
        if self.multiplier is None or self.a is None or self.b is None:
            return y
        delta = F.linear(F.linear(x, self.a), self.b)
        return y + self.multiplier(y, delta, expert) * delta


class Embedding(nn.Module):
    """The token table, with what the expert does to it: y = T'[id] + d * (B A[id])."""

    def __init__(self, model: CompiledModel):
        super().__init__()
        branch = model.group_branch(model.embedding_group)
        self.table = nn.Buffer(model.weight(f"{model.decoder.embedding}.weight"))
        self.multiplier = Multiplier(model, branch) if branch else None
        self.a = nn.Buffer(branch.a) if branch and branch.a is not None else None
        self.b = nn.Buffer(branch.b) if branch and branch.b is not None else None

    def forward(self, ids: Tensor, expert: Tensor | None) -> Tensor:
        """ids: (B, S) int64. Returns (B, S, hidden)."""
        y = self.table[ids]
        if self.multiplier is None:
            return y
        if self.a is None or self.b is None:
            return y * self.multiplier(y, y, expert)
        delta = F.linear(self.a[ids], self.b)
        return y + self.multiplier(y, delta, expert) * delta


class Prefix(nn.Module):
    """Prompt tuning's virtual tokens: base + d * delta; routed, d per virtual token from the routing weights."""

    def __init__(self, model: CompiledModel):
        super().__init__()
        assert model.virtual is not None
        self.tokens, self.routing = model.virtual, model.routing
        self.base, self.delta = nn.Buffer(model.virtual.base), nn.Buffer(model.virtual.delta)
        self.bank = nn.Buffer(model.bank(next(iter(model.sites))))

    def forward(self, embeds: Tensor, expert: Tensor | None) -> Tensor:
        """embeds: (B, T, H) of the prompt. Returns (B, V, H)."""
        if expert is None:
            assert self.routing is not None
            weights = route_prompt(self.tokens, self.routing, self.bank.shape[0], embeds)
            expert = weights @ self.bank
        elif expert.dim() == 2:
            expert = expert.unsqueeze(1)
        return (self.base + expert * self.delta).expand(embeds.shape[0], -1, -1)


class Norm(nn.Module):
    """x / rms(x) * weight; of kind "layer" after the mean is subtracted, and with a bias where there is one.

    Source: arXiv 1910.07467 eq. 4, 1607.06450 eq. 4.
    """

    def __init__(self, weight: Tensor, eps: float, kind: str = "rms", bias: Tensor | None = None):
        super().__init__()
        self.weight, self.bias = nn.Buffer(weight), None if bias is None else nn.Buffer(bias)
        self.eps, self.kind = eps, kind

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return y if self.bias is None else y + self.bias


class HeadNorm(nn.Module):
    """The norm on queries or on keys, (B, heads, S, D)."""

    def __init__(self, weight: Tensor, heads: int, plan: BlockPlan, eps: float):
        super().__init__()
        assert plan.head_norm is not None
        self.width, self.plan, self.eps = plan.head_norm.width, plan, eps
        self.weight = nn.Buffer(weight if self.width == "head" else weight.view(heads, 1, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every head, or all heads of a token at once."""
        over = (1, 3) if self.width == "all" else (3,)
        if self.plan.norm == "layer":
            x = x - x.mean(over, keepdim=True)
        return x * torch.rsqrt(x.square().mean(over, keepdim=True) + self.eps) * self.weight


def make_norm(model: CompiledModel, name: str) -> Norm:
    """A norm of the residual stream, of the kind that the model's are."""
    bias = model.vectors.get(f"{name}.bias")
    return Norm(model.vectors[f"{name}.weight"], model.decoder.norm_eps, model.decoder.block.norm, bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first elements of every head, as many as the tables say: half against half, or each against its
    neighbour. x: (B, N, S, D); cos, sin: (S, pairs).

    Source: RoFormer (arXiv 2104.09864) eq. 34; half-split in the layout of Llama checkpoints.
    """
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class Block(nn.Module):
    """One decoder layer: attention with an explicit cache, and an MLP, put together as the plan says."""

    def __init__(self, model: CompiledModel, index: int):
        super().__init__()
        self.index, self.config, self.plan = index, model.decoder, model.decoder.block
        self.attention, self.rotation = model.decoder.layers[index], model.decoder.rotation_of(index)
        groups, prefix = model.groups(index), model.decoder.prefix(index)
        self.qkv, self.o = Projection(model, groups["qkv"]), Projection(model, groups["o"])
        self.gate_up, self.down = Projection(model, groups["gate_up"]), Projection(model, groups["down"])
        names = {place: self.plan.norms.find(place) for place in PLACES}
        self.norms = nn.ModuleDict({place: make_norm(model, prefix + name) for place, name in names.items() if name})
        self.q_norm = self.k_norm = None
        if (norm := self.plan.head_norm) is not None:
            query, key = (model.vectors[f"{prefix}self_attn.{name}.weight"] for name in (norm.query, norm.key))
            self.q_norm = HeadNorm(query, self.config.heads, self.plan, self.config.norm_eps)
            self.k_norm = HeadNorm(key, self.config.kv_heads, self.plan, self.config.norm_eps)

    def forward(self, x: Tensor, tables: Sequence[Tables], cache: Cache, expert: Tensor | None) -> Tensor:
        """x: (B, S, hidden) -> the same shape. tables: of every rotation that the model has."""
        return run_block(self.plan, Step(self, tables, cache, expert), x)

    def attend(self, qkv: Tensor, tables: Sequence[Tables], cache: Cache) -> Tensor:
        """Causal grouped-query attention over the cache. qkv: (B, S, N) -> (B, S, heads * head_dim)."""
        c, norm = self.config, self.plan.head_norm
        batch, length = qkv.shape[:2]
        split = qkv.view(batch, length, -1, c.head_dim).transpose(1, 2)
        query, key, value = split.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None and norm is not None and not norm.rotated:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotation is not None:
            query, key = (rotate(x, *tables[self.rotation], self.plan.interleaved) for x in (query, key))
        if self.q_norm is not None and self.k_norm is not None and norm is not None and norm.rotated:
            query, key = self.q_norm(query), self.k_norm(key)
        past = cache.keys[self.index].shape[2] if self.index < len(cache.keys) else 0
        key, value = cache.append(self.index, key, value)
        mask = causal_mask(length, past, self.attention.window, qkv.device)
        repeats = c.heads // c.kv_heads
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        if self.plan.cap is None:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            scores = cap(query @ key.transpose(2, 3) * c.head_dim**-0.5, self.plan.cap)
            out = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value
        return out.transpose(1, 2).reshape(batch, length, -1)

    def feed(self, x: Tensor, expert: Tensor | None) -> Tensor:
        """The MLP. x: (B, S, hidden) -> the same shape."""
        both, act = self.gate_up(x, expert), ACTIVATIONS[self.plan.activation]
        if not self.plan.gated:
            return self.down(act(both), expert)
        gate, up = both.chunk(2, dim=-1)
        return self.down(act(gate) * up, expert)


@dataclass(frozen=True)
class Step:
    """One block in one call: the operations of its plan (`maths.block.Operations`)."""

    block: Block
    tables: Sequence[Tables]
    cache: Cache
    expert: Tensor | None

    def read(self, place: Place, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The stream normalised, where there is a norm, and the stream."""
        return (self.normalise(place, stream) if place in self.block.norms else stream), stream

    def normalise(self, place: Place, x: Tensor) -> Tensor:
        """Through the norm of that place."""
        return self.block.norms[place](x)

    def attend(self, x: Tensor) -> Tensor:
        """Attention, and the products before and after it."""
        block = self.block
        return block.o(block.attend(block.qkv(x, self.expert), self.tables, self.cache), self.expert)

    def feed(self, x: Tensor) -> Tensor:
        """The MLP."""
        return self.block.feed(x, self.expert)

    def add(self, stream: Tensor, x: Tensor, source: Source) -> Tensor:
        """The residual sum."""
        return stream + x


def cap(x: Tensor, limit: float | None) -> Tensor:
    """limit * tanh(x / limit), or x where there is no limit. Source: Gemma 2 (arXiv 2408.00118), section 2."""
    return x if limit is None else limit * torch.tanh(x / limit)


def replace_rows(x: Tensor, ids: Tensor, tokens: tuple[int, ...], features: Tensor) -> Tensor:
    """Features in the place of image tokens, in order. x: (B, S, hidden); ids: (B, S); features: (N, hidden).

    Source: transformers 5.23, LlavaOnevisionModel.forward (masked_scatter).
    """
    chosen = torch.isin(ids, torch.tensor(tokens))
    assert int(chosen.sum()) == len(features), "a row for each image token"
    return x.masked_scatter(chosen.unsqueeze(-1), features.to(x))


def causal_mask(length: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """(S, T) True where query i may see key j: j <= i, and i - j < window where there is one."""
    query = torch.arange(past, past + length, device=device)[:, None]
    key = torch.arange(past + length, device=device)[None, :]
    seen = key <= query
    return seen if window is None else seen & (query - key < window)


class DecoderModule(nn.Module):
    """A CompiledModel that runs.

    Args:
        model: the compiled model; quantized weights are dequantized here.
    """

    at_once = 16  # sequences of one calibration call

    def __init__(self, model: CompiledModel):
        super().__init__()
        self.config: Decoder = model.decoder
        self.image_tokens = model.image_tokens
        self.embedding = Embedding(model)
        self.blocks = nn.ModuleList(Block(model, index) for index in range(len(self.config.layers)))
        self.norm = make_norm(model, self.config.norm)
        self.virtual = Prefix(model) if model.virtual is not None else None
        tied = model.head_name == f"{self.config.embedding}.weight"
        self.head = self.embedding.table if tied else nn.Buffer(model.weight(model.head_name))

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, expert: Tensor | None, cache: Cache | None = None, features: Tensor | None = None
    ) -> Tensor:
        """Logits for every position.

        Args:
            input_ids: (B, S) int64. expert: flat residual d = p - p_ref (sum_H,), same dtype as the
                module; None routes (one sequence, no padding). cache: filled and extended in place;
                None for a call of its own. features: (N, hidden), one row for each image token of the call, in order;
                None where they are embedded like other tokens.
        Returns:
            (B, S, vocab).
        """
        cache = Cache() if cache is None else cache
        past, added = cache.length, 0
        x = self.embedding(input_ids, expert)
        if features is not None:
            x = replace_rows(x, input_ids, self.image_tokens, features)
        if self.virtual is not None and past == 0:
            prompt = self.virtual(x, expert)
            x, added = torch.cat([prompt, x], dim=1), prompt.shape[1]
        tables = self.make_tables(past, past + x.shape[1])
        for block in self.blocks:
            x = block(x, tables, cache, expert)
        return cap(F.linear(self.norm(x[:, added:]), self.head), self.config.logit_cap)

    def make_tables(self, start: int, end: int) -> list[Tables]:
        """cos and sin of positions start..end-1, for every rotation."""
        found = (self.config.rope_tables(end, which) for which in range(len(self.config.rotations)))
        return [(cos[start:].to(self.embedding.table), sin[start:].to(self.embedding.table)) for cos, sin in found]

    def list_readers(self) -> dict[Input, nn.Module]:
        """For every input that is multiplied, the product that reads it."""
        places = ("qkv", "o", "gate_up", "down")
        return {(index, place): getattr(block, place) for index, block in enumerate(self.blocks) for place in places}

    @torch.no_grad()
    def read(self, ids: Tensor, real: Tensor, residual: Tensor) -> None:
        """Run over text without the head, for who watches the layers.

        Causal attention keeps padding from the positions before it, so no mask is needed.

        Args:
            ids: (B, S) int64, padded on the right. real: (B, S) bool, not read. residual: (sum_H,) float32.
        """
        tables, cache, x = self.make_tables(0, ids.shape[1]), Cache(), self.embedding(ids, residual)
        for block in self.blocks:
            x = block(x, tables, cache, residual)

    @torch.no_grad()
    def greedy(self, input_ids: Tensor, expert: Tensor | None, count: int, eos: tuple[int, ...] = ()) -> list[int]:
        """Greedy tokens with the cache: the prompt in one call, then one token a call."""
        cache = Cache()
        logits = self(input_ids, expert, cache)
        tokens: list[int] = []
        for _ in range(count):
            token = int(logits[0, -1].argmax())
            if token in eos:
                break
            tokens.append(token)
            logits = self(torch.tensor([[token]]), expert, cache)
        return tokens
