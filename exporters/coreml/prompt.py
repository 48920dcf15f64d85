"""Prompt tuning in an ML program: virtual tokens are ids from the vocabulary's size on.

The runtime feeds ids V, V+1, ... before a sequence's first token, so that they need no program of their own.
"""

from __future__ import annotations

import numpy as np
import torch

from lime_edge.compiler.maths.prompt_tuning import VirtualTokens, route_prompt
from lime_edge.compiler.maths.route import find_anchors
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.exporters.coreml.experts import RoutedExperts
from lime_edge.exporters.coreml.graph import Graph, Var, mb

UNSEEN = np.float16(-30000)


def select_virtual(
    model: CompiledModel,
    graph: Graph,
    embeds: Var,
    ids: Var,
    index: Var,
    length: Var,
    expert: Var | None,
    routed: RoutedExperts | None,
) -> Var:
    """Embeddings (1, S, H), the rows of virtual ids replaced by base + d * delta.

    Args:
        ids, index: (1, S) int32. length: (1,) real rows. expert: d (H,), None in a single-expert model or when
            routed weighs the bank.
    """
    tokens = model.virtual
    assert tokens is not None
    base, delta = graph.half("prompt.base", tokens.base), graph.half("prompt.delta", tokens.delta)
    if routed is not None:
        virtual = _route(model, tokens, graph, embeds, ids, index, length, routed)
    else:
        virtual = base if expert is None else mb.add(x=base, y=mb.mul(x=delta, y=expert))
    vocab, last = np.int32(model.decoder.vocab), np.int32(len(tokens.base) - 1)
    places = mb.minimum(x=mb.maximum(x=mb.sub(x=ids, y=vocab), y=np.int32(0)), y=last)
    rows = mb.gather(x=virtual, indices=places, axis=0)
    is_virtual = mb.expand_dims(x=mb.greater_equal(x=ids, y=vocab), axes=[2])
    return mb.select(cond=is_virtual, a=rows, b=embeds)


def _route(
    model: CompiledModel,
    tokens: VirtualTokens,
    graph: Graph,
    embeds: Var,
    ids: Var,
    index: Var,
    length: Var,
    routed: RoutedExperts,
) -> Var:
    """(V, H): constant where the routing does not read the input. Later calls compute it too, and read none of it."""
    bank = model.bank(next(iter(model.sites)))
    if tokens.conditioning is None:
        weights = route_prompt(tokens, routed.config, len(bank), None)
        prompt = tokens.base + (weights @ bank.half().float()) * tokens.delta
        return mb.cast(x=graph.constant("prompt.static", prompt.numpy()), dtype="fp16")
    summary = _summarize(tokens.conditioning, embeds, ids, index, length, model.decoder.vocab)
    if tokens.input_proj is not None:
        summary = mb.linear(x=summary, weight=graph.half("prompt.input_proj", tokens.input_proj))
    experts, count = bank.shape[0], len(tokens.base)
    ends = {"begin": [0, 0, 0], "end": [1, 1, experts]}
    frozen = mb.add(
        x=graph.half("prompt.original", tokens.original[None, :, :experts]), y=mb.slice_by_index(x=summary, **ends)
    )
    adapted = graph.half("prompt.adapted", tokens.delta[None, :, :experts])
    anchors = find_anchors(count, routed.plan.window, None, torch.device("cpu")).numpy()
    weights = mb.squeeze(x=routed.weigh(frozen, adapted, anchors), axes=[0])
    chosen = mb.linear(x=weights, weight=graph.half("prompt.bank", bank.T))
    return mb.add(
        x=graph.half("prompt.base", tokens.base), y=mb.mul(x=chosen, y=graph.half("prompt.delta", tokens.delta))
    )


def _summarize(conditioning: str, embeds: Var, ids: Var, index: Var, length: Var, vocab: int) -> Var:
    """One vector (1, 1, H) for the call's real tokens. Source: prompt_tuning.summarize."""
    real = mb.logical_and(x=mb.less(x=index, y=length), y=mb.less(x=ids, y=np.int32(vocab)))
    rows = mb.expand_dims(x=mb.cast(x=real, dtype="fp16"), axes=[1])
    if conditioning in ("first", "last"):  # the first real row is the one with one real row up to it
        if conditioning == "last":
            chosen = mb.equal(x=index, y=mb.sub(x=length, y=np.int32(1)))
        else:
            counted = mb.cumsum(x=mb.cast(x=real, dtype="int32"), axis=1)
            chosen = mb.logical_and(x=real, y=mb.equal(x=counted, y=np.int32(1)))
        return mb.matmul(x=mb.expand_dims(x=mb.cast(x=chosen, dtype="fp16"), axes=[1]), y=embeds)
    total = mb.maximum(x=mb.reduce_sum(x=rows, axes=[-1], keep_dims=True), y=np.float16(1))
    mean = mb.matmul(x=mb.real_div(x=rows, y=total), y=embeds)
    if conditioning == "mean":
        return mean
    scores = mb.matmul(x=mean, y=embeds, transpose_y=True)
    hidden = mb.mul(x=mb.sub(x=np.float16(1), y=rows), y=UNSEEN)
    return mb.matmul(x=mb.softmax(x=mb.add(x=scores, y=hidden), axis=-1), y=embeds)
