"""Zero-parameter routing as ONNX nodes, for several sites at once."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.exporters.onnx.graph import Graph

SMALLEST_SCALE = 1e-6  # guards as in compiler.routing
SMALLEST_SUM = 1e-9


class RoutingNodes:
    """Writes routing into a graph or a function's body, whose constants it declares.

    Args:
        count: E, experts. reads: K, what routing reads per expert: 2, the frozen output and delta; SliceFine 1.
    """

    def __init__(self, graph: Graph, config: RoutingConfig, count: int, reads: int):
        self.graph, self.config, self.count = graph, config, count
        graph.constant("routing/tiny", np.array(SMALLEST_SCALE, np.float32))
        graph.constant("routing/tiny_sum", np.array(SMALLEST_SUM, np.float32))
        graph.constant("routing/last_axis", np.array([-1], np.int64))
        graph.constant("routing/call_axes", np.array([0, 1, 4], np.int64))
        graph.constant("routing/shares", np.array([find_shares(config, reads)], np.float32))
        graph.constant("routing/split", np.array([0, 0, -1, reads, count], np.int64))
        graph.constant("routing/flat", np.array([0, 0, -1], np.int64))

    def weigh(self, stack: str, anchors: str, path: str) -> str:
        """Weights (B, S, G * E) from what routing reads (B, S, G * K * E).

        Args:
            anchors: the token whose routing each token takes, (S,) int64; "" without windows.

        l / T = sum_k share_k x_k / max|x_k| / T, the maxima per site over the whole call; then softmax and
        selection. Source: routing.measure_logits, routing.route.
        """
        graph = self.graph
        if anchors:
            stack = graph.node("Gather", [stack, anchors], f"{path}/Anchor", axis=1)
        x = graph.node("Reshape", [stack, "routing/split"], f"{path}/Split")
        top = graph.node("ReduceMax", [graph.node("Abs", [x], f"{path}/Abs"), "routing/call_axes"], f"{path}/Max")
        top = graph.node("Max", [top, "routing/tiny"], f"{path}/Guard")
        x = graph.node("Div", [x, top], f"{path}/Relative")
        logits = graph.node("MatMul", ["routing/shares", x], f"{path}/Logits")
        probs = graph.node("Softmax", [logits], f"{path}/Softmax", axis=-1)
        return graph.node("Reshape", [self._select(probs, path), "routing/flat"], f"{path}/Flat")

    def _select(self, probs: str, path: str) -> str:
        """The configured selection over the last axis. Source: routing.select."""
        config, graph = self.config, self.graph
        if config.sparse_mode and config.auto_topk:
            values, indices = self._top(probs, min(2 * config.top_k, self.count), path)
            limit = self._threshold(values, path)
            kept = graph.node("GreaterOrEqual", [values, limit], f"{path}/Reaches")
            kept = graph.node("Cast", [kept], f"{path}/Kept", to=TensorProto.FLOAT)
            return self._scatter(probs, indices, graph.node("Mul", [values, kept], f"{path}/Keep"), path)
        if config.sparse_mode or not (config.auto_topk or config.soft_topk):
            values, indices = self._top(probs, config.top_k, path)
            return self._scatter(probs, indices, values, path)
        if config.auto_topk:
            return self._gate(probs, self._threshold(probs, path), path)
        values, _ = self._top(probs, config.top_k, path)
        kth = graph.constant(f"{path}/kth", np.array([config.top_k - 1], np.int64))
        return self._gate(probs, graph.node("Gather", [values, kth], f"{path}/Kth", axis=-1), path)

    def _threshold(self, values: str, path: str) -> str:
        """theta * the largest."""
        top = self.graph.node("ReduceMax", [values, "routing/last_axis"], f"{path}/Largest")
        theta = self.graph.constant(f"{path}/theta", np.array(self.config.auto_topk_threshold, np.float32))
        return self.graph.node("Mul", [top, theta], f"{path}/Threshold")

    def _top(self, probs: str, k: int, path: str) -> tuple[str, str]:
        count = self.graph.constant(f"{path}/k", np.array([k], np.int64))
        names = [f"{path}/TopK/values", f"{path}/TopK/indices"]
        self.graph.node("TopK", [probs, count], f"{path}/TopK", names, axis=-1)
        return names[0], names[1]

    def _scatter(self, probs: str, indices: str, values: str, path: str) -> str:
        """Values renormalised, at their places; zeros elsewhere."""
        graph = self.graph
        total = graph.node("ReduceSum", [values, "routing/last_axis"], f"{path}/Sum")
        total = graph.node("Max", [total, "routing/tiny_sum"], f"{path}/GuardSum")
        values = graph.node("Div", [values, total], f"{path}/Renormalise")
        zeros = graph.node("Sub", [probs, probs], f"{path}/Zeros")
        return graph.node("ScatterElements", [zeros, indices, values], f"{path}/Scatter", axis=-1)

    def _gate(self, probs: str, threshold: str, path: str) -> str:
        """w sigmoid((w - threshold) / temperature), renormalised."""
        graph = self.graph
        above = graph.node("Sub", [probs, threshold], f"{path}/Above")
        heat = graph.constant(f"{path}/heat", np.array(self.config.soft_topk_temperature, np.float32))
        gate = graph.node("Sigmoid", [graph.node("Div", [above, heat], f"{path}/Heat")], f"{path}/Sigmoid")
        gated = graph.node("Mul", [probs, gate], f"{path}/Gate")
        return graph.node("LpNormalization", [gated], f"{path}/Renormalise", axis=-1, p=1)


def find_shares(config: RoutingConfig, reads: int) -> list[float]:
    """Factors of the frozen output and of delta in the logits, the temperature included."""
    shares = [1.0] if reads == 1 else [1.0 - config.gamma_routing, config.gamma_routing]
    return [share / max(config.temperature, SMALLEST_SCALE) for share in shares]
