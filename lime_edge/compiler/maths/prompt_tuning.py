"""LiME on prompt tuning: V virtual tokens in front of the prompt's embeddings.

Static prompts do not depend on the input: per expert (and routed too) they are a table computed
once. Input-conditioned prompts route on the prompt's own embeddings: a small program before the
model. Pinned, both kinds are the same table, since only the routing reads the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lime_edge.compiler.maths.layers import compose
from lime_edge.compiler.maths.route import route
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.errors import LimeEdgeError

CONDITIONING = ("mean", "first", "last", "attention")


@dataclass(frozen=True)
class VirtualTokens:
    """V virtual tokens before the prompt, base + d * delta.

    base, delta: (V, H) float32, p_ref folded into base. original: base without it, which routing reads.
    conditioning: how routing reads the input (None: it does not); input_proj: (H, H) or None.
    """

    base: Tensor
    delta: Tensor
    original: Tensor
    conditioning: str | None
    input_proj: Tensor | None


def fold_prompt(
    base: Tensor, delta: Tensor, p_ref: Tensor, conditioning: str | None, input_proj: Tensor | None
) -> VirtualTokens:
    """Fold p_ref into the virtual tokens: base' = base + p_ref * delta, so base' + d * delta for every expert.

    Args:
        base, delta: `prompt_base` and `prompt_delta`, (V, H). p_ref: (H,).
        conditioning, input_proj: see `VirtualTokens`.
    Source: docs/folding.md, "Prompt tuning".
    """
    folded = (base.double() + p_ref.double() * delta.double()).float()
    return VirtualTokens(folded, delta, base, conditioning, input_proj)


def compute_prompt(tensors: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """The virtual tokens under given expert weights.

    Args:
        tensors: `prompt_base` (V, H), `prompt_delta` (V, H), `LiMEs` (E, H), maybe `LiME_shared` (H,)
            and `gamma` (1,).
        weights: (E,) fixed, or (V, E) or (B, V, E) routed.
    Returns:
        (V, H) or (B, V, H).
    Source: y = h + delta * p of the conformance README with h = prompt_base, delta = prompt_delta;
        fixtures prompt_tuning-*.
    """
    return compose(tensors["prompt_base"], tensors["prompt_delta"], weights, tensors)


def route_static(tensors: Mapping[str, Tensor], routing: RoutingConfig) -> Tensor:
    """The routed weights (V, E) of a static prompt: the same for every input.

    Source: fixture prompt_tuning-static-*.
    """
    experts = tensors["LiMEs"].shape[0]
    base, delta = tensors["prompt_base"][None, :, :experts], tensors["prompt_delta"][None, :, :experts]
    return route(base, delta, routing).squeeze(0)


def route_conditioned(
    tensors: Mapping[str, Tensor],
    routing: RoutingConfig,
    conditioning: str,
    embeds: Tensor,
    attention_mask: Tensor | None,
) -> Tensor:
    """The routed weights (B, V, E) of an input-conditioned prompt.

    The scales of the logits run over the whole call, so over the batch too.

    Args:
        tensors: as `compute_prompt`, maybe `input_proj.weight` (H, H).
        routing: what `Variant.read_routing` gives.
        conditioning: one of CONDITIONING.
        embeds: (B, T, H), the prompt's embeddings.
        attention_mask: (B, T), 1 for real tokens, or None.
    Source: fixtures prompt_tuning-{mean,first,last,attention}-*.
    """
    experts = tensors["LiMEs"].shape[0]
    summary = summarize_prompt(embeds, attention_mask, conditioning)
    if "input_proj.weight" in tensors:
        summary = summary @ tensors["input_proj.weight"].T
    base = tensors["prompt_base"].unsqueeze(0) + summary.unsqueeze(1)
    delta = tensors["prompt_delta"].unsqueeze(0).expand_as(base)
    return route(base[..., :experts], delta[..., :experts], routing)


def route_prompt(tokens: VirtualTokens, routing: RoutingConfig, experts: int, embeds: Tensor | None) -> Tensor:
    """The routed weights of compiled virtual tokens: (V, E) static, (B, V, E) input-conditioned.

    Args:
        experts: E. embeds: (B, T, H), the prompt's embeddings, no padding; None does for a static prompt.
    """
    tensors = {"prompt_base": tokens.original, "prompt_delta": tokens.delta}
    tensors["LiMEs"] = tokens.original.new_empty(experts, 0)  # only its length is read
    if tokens.conditioning is None:
        return route_static(tensors, routing)
    assert embeds is not None, "the prompt reads its input"
    if tokens.input_proj is not None:
        tensors["input_proj.weight"] = tokens.input_proj
    return route_conditioned(tensors, routing, tokens.conditioning, embeds, None)


def summarize_prompt(embeds: Tensor, attention_mask: Tensor | None, conditioning: str) -> Tensor:
    """One vector (B, H) for a prompt's embeddings (B, T, H).

    "mean" runs over real tokens; "first" is position 0; "last" is position (number of real tokens)
    - 1, the last real one when padding is on the right; "attention" weighs the real tokens by
    softmax of their product with the mean over all positions, padded ones too.

    Raises:
        LimeEdgeError: another word.
    Source: fixtures prompt_tuning-{mean,first,last,attention}-*; Kowsher/LiME at 82f981f.
    """
    if conditioning not in CONDITIONING:
        raise LimeEdgeError(
            f"input_conditioning_mode: expected one of {', '.join(CONDITIONING)}, found {conditioning!r}"
        )
    if conditioning == "first":
        return embeds[:, 0]
    mask = torch.ones_like(embeds[..., 0]) if attention_mask is None else attention_mask.to(embeds.dtype)
    if conditioning == "mean":
        return (embeds * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1.0)
    if conditioning == "last":
        last = (mask.sum(dim=1) - 1).clamp_min(0).long()
        return embeds.gather(1, last[:, None, None].expand(-1, 1, embeds.shape[-1])).squeeze(1)
    scores = (embeds @ embeds.mean(dim=1, keepdim=True).transpose(1, 2)).squeeze(-1)
    attention = torch.softmax(scores.masked_fill(mask == 0, float("-inf")), dim=-1)
    return (attention.unsqueeze(1) @ embeds).squeeze(1)


def prepend_prompt(
    prompt: Tensor,
    embeds: Tensor,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Put virtual tokens, (V, H) or (B, V, H), before embeddings (B, T, H); extend the mask by ones.

    Returns:
        embeddings (B, V + T, H), and the mask (B, V + T) or None.
    Source: fixtures prompt_tuning-*, output_embeds and output_mask.
    """
    prompt = prompt.expand(embeds.shape[0], -1, -1)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask.new_ones(prompt.shape[:2]), attention_mask], dim=1)
    return torch.cat([prompt, embeds], dim=1), attention_mask
