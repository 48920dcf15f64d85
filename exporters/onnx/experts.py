"""The branch of a group in the graph: multiplied by the expert input (pinned), or by weights made on the spot (routed).

LoRA's branches are calls of a function (see `functions`); what has no products, SliceFine and embeddings, is nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import onnx
import torch
from onnx import TensorProto

from lime_edge.compiler.maths.route import find_anchors
from lime_edge.compiler.maths.routing import Gate, Keep, RoutingConfig, Selection, Share, plan_routing
from lime_edge.compiler.model.compiled import CompiledModel, GroupBranch
from lime_edge.exporters.onnx.functions import (
    BRANCH_NORM,
    EXPERT_AXIS,
    EXPERT_BRANCH,
    GAPPED_BRANCH,
    HALF,
    LARGE,
    ROUTED_BRANCH,
    make_branch,
    make_branch_norm,
    make_gapped_branch,
    make_routed_branch,
)
from lime_edge.exporters.onnx.graph import LIME, Graph
from lime_edge.exporters.onnx.routing import RoutingNodes

EXPERT = "expert"  # the graph's input
# What the operators compute at once, and what they refuse beyond. Source: runtimes/onnx/operators/operators.h
RANK_MULTIPLE = 8
MOST_RANK, MOST_PARTS, MOST_EXPERTS = 1024, 8, 256
SPARSE_AUTO_TOPK, HARD_TOPK, AUTO_TOPK, SOFT_TOPK = range(4)
Make = Callable[[str, bool], onnx.FunctionProto]


class PinnedExperts:
    """One input (rows, sum_H), of which each group takes its stretch: 1 row, or one for each row of the batch."""

    rows = "/lime/Rows/output"  # (rows, 1, sum_H): a row's residual is the same for all its tokens

    def __init__(self, model: CompiledModel, graph: Graph):
        self.model, self.graph = model, graph

    def declare(self) -> None:
        """Declare the input."""
        self.graph.input(EXPERT, TensorProto.FLOAT, ["expert_rows", self.model.sites.total])
        axis = self.graph.constant("/lime/axis", np.array([1], np.int64))
        given = EXPERT
        if self.graph.half:  # what a switch writes is float32 everywhere
            given = self.graph.node("Cast", [EXPERT], "/lime/Cast", to=TensorProto.FLOAT16)
        self.graph.node("Unsqueeze", [given, axis], "/lime/Rows", [self.rows])

    def add_branch(self, branch: GroupBranch, x: str, y: str, path: str) -> str:
        """y + d * (B A x) of a group with products, (B, S, N)."""
        a, b = pack_branch(self.graph, branch, path)
        attributes = {**find_parts(branch), "offsets": [part.site.offset if part.site else 0 for part in branch.parts]}
        inputs = [x, y, a, b, self.rows]
        if not branch.gaps:
            start = branch.find_runs()[0][0]
            span = {"start": [start], "end": [start + branch.width]}
            return call(self.graph, EXPERT_BRANCH, make_branch, branch, inputs, f"{path}/lime", **attributes, **span)
        places = np.concatenate(
            [np.arange(part.width) + part.site.offset if part.site else np.zeros(part.width) for part in branch.parts]
        ).astype(np.int64)
        inputs.append(self.graph.constant(f"{path}.lime_places", places))
        return call(self.graph, GAPPED_BRANCH, make_gapped_branch, branch, inputs, f"{path}/lime", **attributes)

    def multiply(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        """The multiplier (rows, 1, N) of SliceFine's groups and embeddings, 1 where no site is."""
        if not branch.gaps:
            start = branch.find_runs()[0][0]
            limits = [
                self.graph.constant(f"{path}/lime/{kind}", np.array([value], np.int64))
                for kind, value in (("start", start), ("end", start + branch.width), ("axis", EXPERT_AXIS))
            ]
            return self.graph.node("Slice", [self.rows, *limits], f"{path}/lime/Slice")
        places = np.full(branch.width, self.model.sites.total, np.int64)  # one past the last: the one that is padded
        column = 0
        for part in branch.parts:
            if part.site is not None:
                places[column : column + part.adapted] = np.arange(part.adapted) + part.site.offset
            column += part.width
        inputs = [self._padded, self.graph.constant(f"{path}/lime/places", places)]
        return self.graph.node("Gather", inputs, f"{path}/lime/Gather", axis=EXPERT_AXIS)

    @cached_property
    def _padded(self) -> str:
        """(rows, 1, sum_H + 1), the last a one."""
        pads = self.graph.constant("/lime/pads", np.array([0, 0, 0, 0, 0, 1], np.int64))
        one = self.graph.constant("/lime/one", np.array(1, np.float32))
        return self.graph.node("Pad", [self.rows, pads, one], "/lime/Pad")


class RoutedExperts:
    """Zero-parameter routing of every group's sites together: (B, S, G * E) weights, then the bank."""

    def __init__(self, model: CompiledModel, graph: Graph, config: RoutingConfig):
        self.model, self.graph, self.config = model, graph, config
        self.count = len(model.experts)
        self.plan = plan_routing(config, self.count, model.variant.routing_reads)
        self.anchors: list[str] = ["routing_anchors"] if self.plan.window > 1 else []

    def declare(self) -> None:
        """With windows, the token whose routing each token takes."""
        if self.anchors:
            self._find_anchors(self.plan.window)

    @cached_property
    def nodes(self) -> RoutingNodes:
        """Routing outside of functions, for what has no products."""
        return RoutingNodes(self.graph, self.plan)

    def _find_anchors(self, window: int) -> None:
        """min(floor(t / n) n + n - 1, T - 1) for every token t of the call. Source: routing.find_anchors."""
        graph = self.graph
        names = {
            k: graph.constant(f"routing/{k}", np.array(v, np.int64))
            for k, v in (("zero", 0), ("step", 1), ("n", window), ("n_less_one", window - 1))
        }
        shape = graph.node("Shape", ["input_ids"], "/routing/Shape", start=1, end=2)
        tokens = graph.node("Squeeze", [shape], "/routing/Tokens")
        position = graph.node("Range", [names["zero"], tokens, names["step"]], "/routing/Range")
        index = graph.node("Div", [position, names["n"]], "/routing/Div")
        start = graph.node("Mul", [index, names["n"]], "/routing/Mul")
        end = graph.node("Add", [start, names["n_less_one"]], "/routing/End")
        last = graph.node("Sub", [tokens, names["step"]], "/routing/Last")
        graph.node("Min", [end, last], "/routing/Min", self.anchors)

    def add_branch(self, branch: GroupBranch, x: str, y: str, path: str) -> str:
        """y + (weights bank) * (B A x) of a group with products, (B, S, N)."""
        graph, config = self.graph, self.config
        a, b = pack_branch(graph, branch, path)
        bank = graph.constant(f"{path}/route/bank", self.model.group_bank(branch).numpy())
        columns, read, recovery = self._describe_reading(branch, pad_rank)
        described = {"recovery": recovery, "columns": columns, "read": read}
        inputs = [x, y, a, b, bank, *(graph.constant(f"{path}/route/{kind}", one) for kind, one in described.items())]
        frozen_share, adapted_share = self.plan.heated_shares

        def make(name: str, half: bool) -> onnx.FunctionProto:
            return make_routed_branch(name, self.plan, half)

        return call(
            graph,
            ROUTED_BRANCH,
            make,
            branch,
            inputs + self.anchors,
            f"{path}/lime",
            **find_parts(branch),
            experts=self.count,
            selection=number_selection(self.plan.selection),
            top_k=config.top_k,
            n_gram=self.plan.window,
            frozen_share=frozen_share,
            adapted_share=adapted_share,
            threshold=config.auto_topk_threshold,
            heat=config.soft_topk_temperature,
        )

    def multiply(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        """The group's multiplier per token, (B, S, N), as nodes.

        Args:
            y: before the residual (SliceFine: before the bias). hidden: A x (B, S, R), not read by SliceFine.
        """
        graph, path = self.graph, f"{path}/route"
        columns, read, _ = self._describe_reading(branch, np.asarray)
        stack = graph.node("Gather", [y, graph.constant(f"{path}/columns", columns)], f"{path}/Pick", axis=2)
        if branch.b is not None:
            joined = graph.node("Concat", [hidden, stack], f"{path}/Join", axis=2)
            stack = graph.node("MatMul", [joined, graph.constant(f"{path}/read", read)], f"{path}/Stack")
        weights = self.nodes.weigh(stack, "".join(self.anchors), path)
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
        if self.anchors:
            count = self.model.virtual.base.shape[0]
            found = find_anchors(count, self.plan.window, None, torch.device("cpu"))
            anchors = graph.constant(f"{path}/anchors", found.numpy())
        stack = graph.node("Concat", [frozen, adapted], f"{path}/Stack", axis=2)
        return self.nodes.weigh(stack, anchors, path)

    def _describe_reading(
        self,
        branch: GroupBranch,
        pad: Callable[[np.ndarray], np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What routing reads: places in y (G E,), the matrix over [A x, those] (R + G E, 2 G E), recovery (G E,).

        Recovery is what of delta is added to y to get the output that routing reads: -p_ref, for DoRA 1 - p_ref.
        SliceFine reads y alone.
        """
        starts, width = [], 0
        for part in branch.parts:
            if part.site is not None:
                starts.append(width)
            width += part.width
        columns = np.concatenate([np.arange(start, start + self.count) for start in starts])
        if branch.b is None:
            return columns, np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
        kept = self.model.variant.routing_keeps
        offsets = [part.site.offset for part in branch.parts if part.site is not None]
        reference = self.model.reference.numpy()
        recovery = np.concatenate([kept - reference[offset : offset + self.count] for offset in offsets])
        recovery = recovery.astype(np.float32)
        shape = (len(starts), self.count, -1)
        rows = pad(branch.b.numpy())[columns].reshape(shape)
        identity = np.eye(columns.size, dtype=np.float32).reshape(shape)
        frozen = np.concatenate([recovery.reshape(*shape[:2], 1) * rows, identity], axis=2)
        adapted = np.concatenate([rows, np.zeros_like(identity)], axis=2)
        read = np.stack([frozen, adapted], axis=1).reshape(2 * columns.size, -1).T
        return columns, read, recovery


def fuse_norm(graph: Graph, update: str, stream: str, gain: str, epsilon: float, path: str) -> tuple[str, str] | None:
    """Let the branch that has just made `update` also add it to the stream and normalise: (normalised, sum).

    None where `update` is not from a branch, and nothing is changed then.
    """
    last = graph.nodes[-1]
    if last.op_type.removeprefix(LARGE).removeprefix(HALF) != EXPERT_BRANCH or list(last.output) != [update]:
        return None
    outputs = [f"{path}/SkipNorm/output", f"{path}/SkipNorm/sum"]
    last.op_type = last.op_type.replace(EXPERT_BRANCH, BRANCH_NORM)
    last.input.extend([stream, gain])
    last.attribute.append(onnx.helper.make_attribute("epsilon", epsilon))
    last.output[:] = outputs
    if last.op_type not in graph.functions:
        graph.functions[last.op_type] = make_branch_norm(last.op_type, graph.half)
    return outputs[0], outputs[1]


def call(
    graph: Graph, name: str, make: Make, branch: GroupBranch, inputs: list[str], path: str, **attributes: object
) -> str:
    """Append a call of a function, whose body `make` gives where the graph lacks it."""
    assert branch.a is not None
    experts = attributes.get("experts", 1)
    sizes = ((branch.a.shape[0], MOST_RANK), (len(branch.parts), MOST_PARTS), (experts, MOST_EXPERTS))
    if any(isinstance(found, int) and found > most for found, most in sizes):
        name = LARGE + name
    elif graph.half:
        name = HALF + name
    if name not in graph.functions:
        graph.functions[name] = make(name, graph.half)
    return graph.node(name, inputs, path, None, LIME, **attributes)


def pack_branch(graph: Graph, branch: GroupBranch, path: str) -> tuple[str, str]:
    """a (K, R) and b (R, N) of a group, float16 where that says the same, R rounded up with zeros."""
    assert branch.a is not None and branch.b is not None
    matrices = {"a": pad_rank(branch.a.T.numpy()), "b": np.ascontiguousarray(pad_rank(branch.b.numpy()).T)}
    with np.errstate(over="ignore"):
        halves = {name: matrix.astype(np.float16) for name, matrix in matrices.items()}
    if all(np.array_equal(halves[name].astype(np.float32), matrix) for name, matrix in matrices.items()):
        matrices = halves
    return graph.constant(f"{path}.lime_a", matrices["a"]), graph.constant(f"{path}.lime_b", matrices["b"])


def pad_rank(matrix: np.ndarray) -> np.ndarray:
    """Zero columns after the last, up to a multiple of RANK_MULTIPLE."""
    return np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % RANK_MULTIPLE)))


def find_parts(branch: GroupBranch) -> dict[str, list[int]]:
    """Widths and ranks of the group's members; rank 0 where the member is no site."""
    return {"widths": [part.width for part in branch.parts], "ranks": [part.rank for part in branch.parts]}


def number_selection(selection: Selection) -> int:
    """The selection's number in the operators, which find its limits in the other attributes."""
    if isinstance(selection, Gate):
        return AUTO_TOPK if isinstance(selection.threshold, Share) else SOFT_TOPK
    return SPARSE_AUTO_TOPK if isinstance(selection, Keep) and selection.reach is not None else HARD_TOPK
