"""Zero-parameter routing as ONNX nodes, for several sites at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from lime_edge.compiler.maths.routing import SMALLEST_SCALE, SMALLEST_SUM, RoutingPlan, weigh
from lime_edge.exporters.onnx.graph import Graph


class RoutingNodes:
    """Writes routing into a graph or a function's body, whose constants it declares."""

    def __init__(self, graph: Graph, plan: RoutingPlan):
        self.graph, self.plan = graph, plan
        graph.constant("routing/tiny", np.array(SMALLEST_SCALE, np.float32))
        graph.constant("routing/tiny_sum", np.array(SMALLEST_SUM, np.float32))
        graph.constant("routing/last_axis", np.array([-1], np.int64))
        graph.constant("routing/call_axes", np.array([0, 1, 4], np.int64))
        graph.constant("routing/shares", np.array([plan.heated_shares], np.float32))
        graph.constant("routing/split", np.array([0, 0, -1, len(plan.shares), plan.experts], np.int64))
        graph.constant("routing/flat", np.array([0, 0, -1], np.int64))

    def weigh(self, stack: str, anchors: str, path: str) -> str:
        """Weights (B, S, G * E) from what routing reads (B, S, G * K * E), K operands of each of the G sites.

        Args:
            anchors: the token whose routing each token takes, (S,) int64; "" without windows.
        """
        weights = weigh(self.plan, NodeOperations(self.graph, anchors, path), stack)
        return self.graph.node("Reshape", [weights, "routing/flat"], f"{path}/Flat")


@dataclass(frozen=True)
class NodeOperations:
    """`routing.Operations` as nodes below a path: reads are one (B, S, G * K * E), weights (B, S, G, 1, E)."""

    graph: Graph
    anchors: str
    path: str

    def measure(self, reads: str, plan: RoutingPlan) -> str:
        """The maxima per operand and site, over the whole call."""
        graph, path = self.graph, self.path
        if self.anchors:
            reads = graph.node("Gather", [reads, self.anchors], f"{path}/Anchor", axis=1)
        x = graph.node("Reshape", [reads, "routing/split"], f"{path}/Split")
        top = graph.node("ReduceMax", [graph.node("Abs", [x], f"{path}/Abs"), "routing/call_axes"], f"{path}/Max")
        top = graph.node("Max", [top, "routing/tiny"], f"{path}/Guard")
        x = graph.node("Div", [x, top], f"{path}/Relative")
        return graph.node("MatMul", ["routing/shares", x], f"{path}/Logits")

    def soften(self, logits: str) -> str:
        """Softmax."""
        return self.graph.node("Softmax", [logits], f"{self.path}/Softmax", axis=-1)

    def take(self, weights: str) -> str:
        """1 at the largest: what is left of it after renormalising."""
        values, places = self.sort_out(weights, 1)
        return self.place(weights, places, values)

    def sort_out(self, weights: str, most: int) -> tuple[str, str]:
        """The first of equals comes first."""
        count = self.graph.constant(f"{self.path}/k", np.array([most], np.int64))
        names = [f"{self.path}/TopK/values", f"{self.path}/TopK/indices"]
        self.graph.node("TopK", [weights, count], f"{self.path}/TopK", names, axis=-1)
        return names[0], names[1]

    def drop(self, values: str, reach: float) -> str:
        """Times 1 or 0."""
        limit = self.find_share(values, reach)
        kept = self.graph.node("GreaterOrEqual", [values, limit], f"{self.path}/Reaches")
        kept = self.graph.node("Cast", [kept], f"{self.path}/Kept", to=TensorProto.FLOAT)
        return self.graph.node("Mul", [values, kept], f"{self.path}/Keep")

    def place(self, weights: str, places: str, values: str) -> str:
        """Values renormalised at their places."""
        graph, path = self.graph, self.path
        total = graph.node("ReduceSum", [values, "routing/last_axis"], f"{path}/Sum")
        total = graph.node("Max", [total, "routing/tiny_sum"], f"{path}/GuardSum")
        values = graph.node("Div", [values, total], f"{path}/Renormalise")
        zeros = graph.node("Sub", [weights, weights], f"{path}/Zeros")
        return graph.node("ScatterElements", [zeros, places, values], f"{path}/Scatter", axis=-1)

    def find_share(self, weights: str, factor: float) -> str:
        """factor * the largest."""
        top = self.graph.node("ReduceMax", [weights, "routing/last_axis"], f"{self.path}/Largest")
        theta = self.graph.constant(f"{self.path}/theta", np.array(factor, np.float32))
        return self.graph.node("Mul", [top, theta], f"{self.path}/Threshold")

    def find_rank(self, weights: str, place: int) -> str:
        """The last of the largest."""
        values, _ = self.sort_out(weights, place)
        kth = self.graph.constant(f"{self.path}/kth", np.array([place - 1], np.int64))
        return self.graph.node("Gather", [values, kth], f"{self.path}/Kth", axis=-1)

    def gate(self, weights: str, threshold: str, heat: float) -> str:
        """w sigmoid((w - threshold) / heat), renormalised."""
        graph, path = self.graph, self.path
        above = graph.node("Sub", [weights, threshold], f"{path}/Above")
        divisor = graph.constant(f"{path}/heat", np.array(heat, np.float32))
        gate = graph.node("Sigmoid", [graph.node("Div", [above, divisor], f"{path}/Heat")], f"{path}/Sigmoid")
        gated = graph.node("Mul", [weights, gate], f"{path}/Gate")
        return graph.node("LpNormalization", [gated], f"{path}/Renormalise", axis=-1, p=1)
