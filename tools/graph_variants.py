"""The exporter's graphs, and the same with one idea at a time undone, for tools/performance.py to measure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lime_edge.compiler.model.compiled import Branch, CompiledModel
from lime_edge.exporters.onnx.decoder import DecoderWriter
from lime_edge.exporters.onnx.experts import PinnedExperts, RoutedExperts
from lime_edge.exporters.onnx.external import WeightFile
from lime_edge.exporters.onnx.functions import BRANCH_NORM, EXPERT_BRANCH, LARGE, ROUTED_BRANCH, SWIGLU
from lime_edge.exporters.onnx.graph import Graph

NONE, PINNED, ROUTED = "none", "pinned", "routed"
FUNCTIONS = (EXPERT_BRANCH, BRANCH_NORM, ROUTED_BRANCH, SWIGLU)


class NormApart(DecoderWriter):
    """The branch and the norm after it as two nodes."""

    joins_norms = False


@dataclass(frozen=True)
class Variant:
    """A graph to measure. base: the branchless one that its ratio is to; predicted: written before it was measured.

    plain: functions that no operator may replace. halves: A and B as float16.
    """

    experts: str
    base: str
    predicted: str
    writer: type[DecoderWriter] = DecoderWriter
    plain: tuple[str, ...] = ()
    halves: bool = True


VARIANTS = {
    "branchless": Variant(NONE, "branchless", "the floor"),
    "pinned": Variant(PINNED, "branchless", "one small node for q/k/v, none for o"),
    "routed": Variant(ROUTED, "branchless", "two nodes a layer"),
    "pinned, norm apart": Variant(PINNED, "branchless", "30 nodes more: 0.01", NormApart),
    "pinned, float32 A and B": Variant(PINNED, "branchless", "1.9 MB more to read: 0.02", halves=False),
    "plain nodes: branchless": Variant(NONE, "plain nodes: branchless", "a stock runtime's floor", plain=FUNCTIONS),
    "plain nodes: pinned": Variant(PINNED, "plain nodes: branchless", "four nodes a group and a cut", plain=FUNCTIONS),
    "plain nodes: routed": Variant(ROUTED, "plain nodes: branchless", "23 nodes a group", plain=FUNCTIONS),
}


def write_variant(model: CompiledModel, variant: Variant, path: Path) -> int:
    """Write a variant's graph and weights; returns its number of nodes, a function's call counted as one."""
    graph = Graph(WeightFile(path.with_suffix(".onnx.data")))
    if not variant.halves:
        model = replace(model, branches={name: _spoil(branch) for name, branch in model.branches.items()})
    variant.writer(model, graph, _make_experts(model, graph, variant.experts)).write(lambda *_: None)
    for node in graph.nodes:
        if node.op_type in variant.plain:
            node.op_type = LARGE + node.op_type
    for function in graph.functions.values():
        if function.name in variant.plain:
            function.name = LARGE + function.name
    graph.save(path, "variants", {})
    return len(graph.nodes)


def _make_experts(model: CompiledModel, graph: Graph, experts: str) -> PinnedExperts | RoutedExperts | None:
    if experts == ROUTED:
        assert model.routing is not None
        return RoutedExperts(model, graph, model.routing)
    return PinnedExperts(model, graph) if experts == PINNED else None


def _spoil(branch: Branch) -> Branch:
    """The same but for what float16 cannot say, so that the exporter stores float32."""
    spoiled: list[torch.Tensor | None] = [None if m is None else m * (1 + 2.0**-13) for m in (branch.a, branch.b)]
    return replace(branch, a=spoiled[0], b=spoiled[1])
