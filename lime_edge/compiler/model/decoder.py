"""Our own decoder in PyTorch: runs a CompiledModel and is the oracle of every exporter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lime_edge.compiler.formats.architecture import Decoder
from lime_edge.compiler.formats.backbone import Source
from lime_edge.compiler.maths.prompt_tuning import route_prompt
from lime_edge.compiler.model.compiled import CompiledModel, Group
from lime_edge.compiler.model.multiplier import Multiplier

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


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
    """RMSNorm: x / rms(x) * weight. Source: arXiv 1910.07467 eq. 4."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight = nn.Buffer(weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate half against half (not interleaved). x: (B, N, S, D); cos, sin: (S, D/2).

    Source: RoFormer (arXiv 2104.09864) eq. 34, in the half-split layout of Llama checkpoints.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """One decoder layer: attention with an explicit cache, then a gated MLP."""

    def __init__(self, model: CompiledModel, index: int):
        super().__init__()
        self.index, self.config = index, model.decoder
        self.attention = model.decoder.layers[index]
        groups, prefix = model.groups(index), model.decoder.prefix(index)
        eps = self.config.norm_eps
        self.qkv, self.o = Projection(model, groups["qkv"]), Projection(model, groups["o"])
        self.gate_up, self.down = Projection(model, groups["gate_up"]), Projection(model, groups["down"])
        self.input_norm = Norm(model.vectors[f"{prefix}input_layernorm.weight"], eps)
        self.post_norm = Norm(model.vectors[f"{prefix}post_attention_layernorm.weight"], eps)
        self.q_norm = self.k_norm = None
        if self.config.qk_norm:
            self.q_norm = Norm(model.vectors[f"{prefix}self_attn.q_norm.weight"], eps)
            self.k_norm = Norm(model.vectors[f"{prefix}self_attn.k_norm.weight"], eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, expert: Tensor | None) -> Tensor:
        """x: (B, S, hidden) -> the same shape."""
        x = x + self.o(self.attend(self.qkv(self.input_norm(x), expert), cos, sin, cache), expert)
        gate, up = self.gate_up(self.post_norm(x), expert).chunk(2, dim=-1)
        return x + self.down(ACTIVATIONS[self.config.activation](gate) * up, expert)

    def attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        """Causal grouped-query attention over the cache. qkv: (B, S, N) -> (B, S, heads * head_dim)."""
        c = self.config
        batch, length = qkv.shape[:2]
        split = qkv.view(batch, length, -1, c.head_dim).transpose(1, 2)
        query, key, value = split.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.attention.rope:
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        past = cache.keys[self.index].shape[2] if self.index < len(cache.keys) else 0
        key, value = cache.append(self.index, key, value)
        mask = causal_mask(length, past, self.attention.window, qkv.device)
        repeats = c.heads // c.kv_heads
        out = F.scaled_dot_product_attention(
            query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), attn_mask=mask
        )
        return out.transpose(1, 2).reshape(batch, length, -1)


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
        self.embedding = Embedding(model)
        self.blocks = nn.ModuleList(Block(model, index) for index in range(len(self.config.layers)))
        self.norm = Norm(model.vectors[f"{self.config.norm}.weight"], self.config.norm_eps)
        self.virtual = Prefix(model) if model.virtual is not None else None
        tied = model.head_name == f"{self.config.embedding}.weight"
        self.head = self.embedding.table if tied else nn.Buffer(model.weight(model.head_name))

    @torch.no_grad()
    def forward(self, input_ids: Tensor, expert: Tensor | None, cache: Cache | None = None) -> Tensor:
        """Logits for every position.

        Args:
            input_ids: (B, S) int64. expert: flat residual d = p - p_ref (sum_H,), same dtype as the
                module; None routes (one sequence, no padding). cache: filled and extended in place;
                None for a call of its own.
        Returns:
            (B, S, vocab).
        """
        cache = Cache() if cache is None else cache
        past, added = cache.length, 0
        x = self.embedding(input_ids, expert)
        if self.virtual is not None and past == 0:
            prompt = self.virtual(x, expert)
            x, added = torch.cat([prompt, x], dim=1), prompt.shape[1]
        cos, sin = (t[past:].to(x) for t in self.config.rope_tables(past + x.shape[1]))
        for block in self.blocks:
            x = block(x, cos, sin, cache, expert)
        return F.linear(self.norm(x[:, added:]), self.head)

    def list_readers(self) -> dict[Source, nn.Module]:
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
        cos, sin = (table.to(self.embedding.table) for table in self.config.rope_tables(ids.shape[1]))
        cache, x = Cache(), self.embedding(ids, residual)
        for block in self.blocks:
            x = block(x, cos, sin, cache, residual)

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
