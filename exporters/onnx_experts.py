"""What multiplies a branch: a slice of the expert input (pinned), or weights made on the spot (routed)."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto

from lime_edge.compiler.compiled import CompiledModel, GroupBranch
from lime_edge.compiler.routing import RoutingConfig, find_anchors
from lime_edge.exporters.onnx_graph import Graph

SMALLEST_SCALE = 1e-6  # guards as in compiler.routing
SMALLEST_SUM = 1e-9


class PinnedExperts:
    """One flat input (sum_H,), cut once for the whole graph."""

    def __init__(self, model: CompiledModel, graph: Graph):
        self.model, self.graph = model, graph
        self.pieces: dict[tuple[int, int], str] = {}

    def declare(self, branches: list[GroupBranch]) -> None:
        """Declare the input and cut it. branches: of every group of the model."""
        graph, total = self.graph, self.model.sites.total
        graph.input("expert", TensorProto.FLOAT, [total])
        neutral = np.full(total, 1.0 if self.model.variant == "slicefine" else 0.0, np.float32)
        graph.initializers.append(onnx.numpy_helper.from_array(neutral, "expert"))
        sizes, names, end = [], [], 0
        for offset, width in sorted(run for branch in branches for run in branch.find_runs()):
            if offset > end:
                sizes.append(offset - end)
                names.append(f"expert_unused_{end}")
            self.pieces[offset, width] = f"expert_{offset}"
            sizes.append(width)
            names.append(f"expert_{offset}")
            end = offset + width
        if end < total:
            sizes.append(total - end)
            names.append(f"expert_unused_{end}")
        if len(names) == 1:
            graph.node("Identity", ["expert"], "/expert/Identity", names)
        else:
            cuts = graph.constant("expert_sizes", np.array(sizes, np.int64))
            graph.node("Split", ["expert", cuts], "/expert/Split", names, axis=0)

    def multiply(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        """The group's multiplier (N,); it reads neither y nor hidden."""
        graph, runs = self.graph, branch.find_runs()
        if not branch.gaps:
            return self.pieces[runs[0]]
        names: list[str] = []
        for index, part in enumerate(branch.parts):
            if part.site is not None:
                names.append(self.pieces[part.site.offset, part.adapted])
            if rest := part.width - part.adapted:
                fill = np.full(rest, 1.0 if branch.a is None else 0.0, np.float32)
                names.append(graph.constant(f"{path}/lime/fill_{index}", fill))
        return names[0] if len(names) == 1 else graph.node("Concat", names, f"{path}/lime/Concat", axis=0)


class RoutedExperts:
    """Zero-parameter routing of every group's sites together: (B, S, G * E) weights, then the bank."""

    def __init__(self, model: CompiledModel, graph: Graph, config: RoutingConfig):
        self.model, self.graph, self.config = model, graph, config
        self.count = len(model.experts)

    def declare(self, branches: list[GroupBranch]) -> None:
        """Constants, and with windows the token whose routing each token takes."""
        graph = self.graph
        graph.constant("routing/tiny", np.array(SMALLEST_SCALE, np.float32))
        graph.constant("routing/tiny_sum", np.array(SMALLEST_SUM, np.float32))
        graph.constant("routing/last_axis", np.array([-1], np.int64))
        graph.constant("routing/call_axes", np.array([0, 1, 4], np.int64))
        share = self.config.gamma_routing
        shares = [1.0] if self.model.variant == "slicefine" else [1.0 - share, share]
        scales = np.array([shares], np.float32) / np.float32(max(self.config.temperature, SMALLEST_SCALE))
        graph.constant("routing/shares", scales)
        graph.constant("routing/split", np.array([0, 0, -1, len(shares), self.count], np.int64))
        graph.constant("routing/flat", np.array([0, 0, -1], np.int64))
        if self.config.n_gram > 1:
            self._find_anchors(self.config.n_gram)

    def _find_anchors(self, window: int) -> None:
        """min(floor(t / n) n + n - 1, T - 1) for every token t of the call. Source: routing.find_anchors."""
        graph = self.graph
        names = {k: graph.constant(f"routing/{k}", np.array(v, np.int64))
                 for k, v in (("zero", 0), ("step", 1), ("n", window), ("n_less_one", window - 1))}  # fmt: skip
        shape = graph.node("Shape", ["input_ids"], "/routing/Shape", start=1, end=2)
        tokens = graph.node("Squeeze", [shape], "/routing/Tokens")
        position = graph.node("Range", [names["zero"], tokens, names["step"]], "/routing/Range")
        index = graph.node("Div", [position, names["n"]], "/routing/Div")
        start = graph.node("Mul", [index, names["n"]], "/routing/Mul")
        end = graph.node("Add", [start, names["n_less_one"]], "/routing/End")
        last = graph.node("Sub", [tokens, names["step"]], "/routing/Last")
        graph.node("Min", [end, last], "/routing/Min", ["routing_anchors"])

    def multiply(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        """The group's multiplier per token, (B, S, N).

        Args:
            y: before the residual (SliceFine: before the bias). hidden: A x (B, S, R), not read by SliceFine.
        """
        graph, path = self.graph, f"{path}/route"
        anchors = "routing_anchors" if self.config.n_gram > 1 else ""
        weights = self._weigh(self._stack(branch, y, hidden, path), anchors, path)
        bank = graph.constant(f"{path}/bank", self.model.group_bank(branch).numpy())
        chosen = graph.node("MatMul", [weights, bank], f"{path}/Bank")
        if branch.a is not None:
            return chosen
        fixed = [(np.arange(part.width) >= part.adapted).astype(np.float32) for part in branch.parts]
        ones = graph.constant(f"{path}/ones", np.concatenate(fixed))
        return graph.node("Add", [chosen, ones], f"{path}/Fixed")

    def weigh(self, frozen: str, adapted: str, path: str) -> str:
        """Weights (1, V, E) of virtual tokens from their first E columns, (1, V, E) each."""
        graph, path = self.graph, f"{path}/route"
        assert self.model.virtual is not None
        anchors = ""
        if self.config.n_gram > 1:
            count = self.model.virtual.base.shape[0]
            found = find_anchors(count, self.config.n_gram, None, torch.device("cpu"))
            anchors = graph.constant(f"{path}/anchors", found.numpy())
        stack = graph.node("Concat", [frozen, adapted], f"{path}/Stack", axis=2)
        return self._weigh(stack, anchors, path)

    def _stack(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        """What routing reads, (B, S, G * K * E): per site the frozen output's first E columns, then delta's.

        One product: frozen is recovered from y by what of delta it lacks, -p_ref (for DoRA 1 - p_ref), and both
        come from the few numbers of `hidden`. SliceFine routes on y alone (K = 1).
        """
        graph, starts, width = self.graph, [], 0
        for part in branch.parts:
            if part.site is not None:
                starts.append(width)
            width += part.width
        columns = np.concatenate([np.arange(start, start + self.count) for start in starts])
        picked = graph.node("Gather", [y, graph.constant(f"{path}/columns", columns)], f"{path}/Pick", axis=2)
        if branch.b is None:
            return picked
        rows = branch.b.numpy()[columns].reshape(len(starts), self.count, -1)
        lacking = self._recovery(branch).reshape(len(starts), self.count, 1) * rows
        identity = np.eye(columns.size, dtype=np.float32).reshape(len(starts), self.count, -1)
        frozen = np.concatenate([lacking, identity], axis=2)
        adapted = np.concatenate([rows, np.zeros_like(identity)], axis=2)
        read = np.stack([frozen, adapted], axis=1).reshape(2 * columns.size, -1).T
        joined = graph.node("Concat", [hidden, picked], f"{path}/Join", axis=2)
        return graph.node("MatMul", [joined, graph.constant(f"{path}/read", read)], f"{path}/Stack")

    def _recovery(self, branch: GroupBranch) -> np.ndarray:
        """What of delta is added to get the output that routing reads: -p_ref, for DoRA 1 - p_ref."""
        kept = 1.0 if self.model.variant == "dora" else 0.0
        starts = [part.site.offset for part in branch.parts if part.site is not None]
        rows = [kept - self.model.reference[start : start + self.count].numpy() for start in starts]
        return np.concatenate(rows).astype(np.float32)

    def _weigh(self, stack: str, anchors: str, path: str) -> str:
        """Weights (B, S, G * E) from what routing reads (B, S, G * K * E).

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
