"""Prompt tuning in the graph: virtual tokens looked up by id, before the token embeddings."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from lime_edge.compiler.maths.prompt_tuning import VirtualTokens, route_prompt
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.exporters.onnx.experts import PinnedExperts, RoutedExperts
from lime_edge.exporters.onnx.graph import Graph

PATH = "/prompt"


def prepend_virtual(model: CompiledModel, graph: Graph, embeds: str, routed: RoutedExperts | None) -> str:
    """Put the virtual tokens before the embeddings (1, T, H) of the call: (1, P + T, H).

    The input `virtual_ids` (1, P) holds 0..V-1 in the first call of a sequence and nothing later, so one
    graph serves prompt and decode.

    Args:
        routed: weigh the bank; None takes the expert input (or nothing, in a single-expert model).
    """
    tokens = model.virtual
    assert tokens is not None
    graph.input("virtual_ids", TensorProto.INT64, ["batch_size", "virtual_length"])
    if routed is not None:
        prompt = _routed_prompt(model, tokens, graph, embeds, routed)
        ids = graph.node("Squeeze", ["virtual_ids", graph.constant("axis_0", np.array([0], np.int64))], f"{PATH}/Ids")
        virtual = graph.node("Gather", [prompt, ids], f"{PATH}/Gather", axis=1)
    else:
        base = graph.constant(f"{PATH}/base", tokens.base.numpy())
        virtual = graph.node("Gather", [base, "virtual_ids"], f"{PATH}/Base")
        if model.single is None:
            delta = graph.constant(f"{PATH}/delta", tokens.delta.numpy())
            moved = graph.node("Gather", [delta, "virtual_ids"], f"{PATH}/Delta")
            moved = graph.node("Mul", [moved, PinnedExperts.rows], f"{PATH}/Mul")
            virtual = graph.node("Add", [virtual, moved], f"{PATH}/Add")
    return graph.node("Concat", [virtual, embeds], f"{PATH}/Concat", axis=1)


def _routed_prompt(
    model: CompiledModel, tokens: VirtualTokens, graph: Graph, embeds: str, routed: RoutedExperts
) -> str:
    """(1, V, H): constant where the routing does not read the input."""
    bank = model.bank(next(iter(model.sites)))
    base = graph.constant(f"{PATH}/base", tokens.base.numpy()[None])
    delta = graph.constant(f"{PATH}/delta", tokens.delta.numpy()[None])
    if tokens.conditioning is None:
        prompt = tokens.base + (route_prompt(tokens, routed.config, len(bank), None) @ bank) * tokens.delta
        return graph.constant(f"{PATH}/static", prompt.numpy()[None])
    summary = _summarize(tokens.conditioning, graph, embeds)
    if tokens.input_proj is not None:
        weight = graph.constant(f"{PATH}/input_proj", tokens.input_proj.T.numpy())
        summary = graph.node("MatMul", [summary, weight], f"{PATH}/Project")
    experts = bank.shape[0]
    original = graph.constant(f"{PATH}/original", tokens.original.numpy()[None])
    frozen = graph.node("Add", [original, summary], f"{PATH}/Conditioned")
    ends = [graph.constant(f"{PATH}/{k}", np.array([v], np.int64)) for k, v in (("zero", 0), ("experts", experts))]
    axis = graph.constant(f"{PATH}/axis", np.array([2], np.int64))
    frozen = graph.node("Slice", [frozen, *ends, axis], f"{PATH}/Frozen")
    adapted = graph.constant(f"{PATH}/adapted", tokens.delta[None, :, :experts].numpy())
    weights = routed.weigh(frozen, adapted, PATH)
    chosen = graph.node("MatMul", [weights, graph.constant(f"{PATH}/bank", bank.numpy())], f"{PATH}/Bank")
    moved = graph.node("Mul", [chosen, delta], f"{PATH}/Mul")
    return graph.node("Add", [base, moved], f"{PATH}/Add")


def _summarize(conditioning: str, graph: Graph, embeds: str) -> str:
    """One vector (1, 1, H) for the call's embeddings. Source: prompt_tuning.summarize, without padding."""
    one = graph.constant(f"{PATH}/one", np.array([1], np.int64))
    if conditioning in ("first", "last"):
        index = graph.constant(f"{PATH}/index", np.array([0 if conditioning == "first" else -1], np.int64))
        return graph.node("Gather", [embeds, index], f"{PATH}/Summary", axis=1)
    mean = graph.node("ReduceMean", [embeds, one], f"{PATH}/Mean", keepdims=1)
    if conditioning == "mean":
        return mean
    turned = graph.node("Transpose", [mean], f"{PATH}/Turn", perm=[0, 2, 1])
    scores = graph.node("MatMul", [embeds, turned], f"{PATH}/Scores")
    shares = graph.node("Softmax", [scores], f"{PATH}/Shares", axis=1)
    shares = graph.node("Transpose", [shares], f"{PATH}/Rows", perm=[0, 2, 1])
    return graph.node("MatMul", [shares, embeds], f"{PATH}/Attention")
