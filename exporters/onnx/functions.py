"""Functions of the model that ONNX Runtime may replace by one operator each: the branch, routing, the gate.

A graph calls them by name; the model holds their bodies. A runtime that registers operators of these names (see
runtimes/onnx/operators) runs those, every other one runs the bodies: same file, same answers. A function whose meaning
changes takes another name: operators of another time then find nothing to replace.
"""

from __future__ import annotations

import numpy as np
import onnx

from lime_edge.compiler.maths.routing import RoutingPlan
from lime_edge.exporters.onnx.graph import MICROSOFT, FunctionBody
from lime_edge.exporters.onnx.routing import RoutingNodes

EXPERT_BRANCH, GAPPED_BRANCH, BRANCH_NORM = "ExpertRowsBranch", "GappedExpertRowsBranch", "ExpertRowsBranchNorm"
ROUTED_BRANCH, SWIGLU = "RoutedBranch", "SwiGLU"
EXPERT_AXIS = 2  # of the expert (rows, 1, sum_H): 1 row, or one for each row of the batch
LARGE, HALF = "Large", "Half"  # before the name where a body is meant that no operator replaces: its sizes, float16
BRANCH_INPUTS = ["x", "y", "a", "b"]
BRANCH_ATTRIBUTES = ["widths", "ranks", "offsets"]
SPAN = ["start", "end"]  # where a group without gaps lies in the flat residual
ROUTING_ATTRIBUTES = [
    "widths",
    "ranks",
    "experts",
    "selection",
    "top_k",
    "n_gram",
    "frozen_share",
    "adapted_share",
    "threshold",
    "heat",
]


def make_branch(name: str, half: bool = False) -> onnx.FunctionProto:
    """out = y + expert[..., start:end] * (x a b).

    x (B, S, K), y and out (B, S, N), a (K, R), b (R, N), expert (1 or B, 1, sum_H).
    """
    body = FunctionBody(half)
    _add_branch(body, _take_stretch(body), "out")
    return body.make_function(name, [*BRANCH_INPUTS, "expert"], ["out"], BRANCH_ATTRIBUTES + SPAN)


def make_gapped_branch(name: str, half: bool = False) -> onnx.FunctionProto:
    """As `make_branch`, the expert's places (N,) int64 given one by one; any place will do where b has zeros."""
    body = FunctionBody(half)
    _add_branch(body, body.node("Gather", ["expert", "places"], "residual", axis=EXPERT_AXIS), "out")
    return body.make_function(name, [*BRANCH_INPUTS, "expert", "places"], ["out"], BRANCH_ATTRIBUTES)


def make_branch_norm(name: str, half: bool = False) -> onnx.FunctionProto:
    """The branch, then sum = stream + it and out = RMSNorm(sum) * gain, all (B, S, N)."""
    body = FunctionBody(half)
    _add_branch(body, _take_stretch(body), "update")
    outputs = ["out", "", "", "sum"]
    body.node("SkipSimplifiedLayerNormalization", ["stream", "update", "gain"], "norm", outputs, domain=MICROSOFT)
    body.refer("epsilon", onnx.AttributeProto.FLOAT, "epsilon")
    return body.make_function(
        name, [*BRANCH_INPUTS, "expert", "stream", "gain"], ["out", "sum"], [*BRANCH_ATTRIBUTES, *SPAN, "epsilon"]
    )


def make_routed_branch(name: str, plan: RoutingPlan, half: bool = False) -> onnx.FunctionProto:
    """The branch with weights made on the spot: out (B, S, N) = y + (weights bank) * (x a b).

    What routing reads is one product: frozen is recovered from y by what of delta it lacks, and both come from
    the few numbers of x a. The operator takes `recovery` (G E,) for that, the body `columns` (G E,) int64, the
    places in y of each site's first E outputs, and `read` (R + G E, 2 G E); `anchors` (S,) int64 with windows.
    """
    body = FunctionBody(half)
    routing = RoutingNodes(body, plan)
    hidden = body.node("MatMul", ["x", _widen(body, "a")], "hidden")
    picked = body.node("Gather", ["y", "columns"], "picked", axis=2)
    stack = body.node("MatMul", [body.node("Concat", [hidden, picked], "joined", axis=2), "read"], "stack")
    weights = routing.weigh(stack, "anchors" if plan.window > 1 else "", "route")
    chosen = body.node("MatMul", [weights, "bank"], "chosen")
    delta = body.node("MatMul", [hidden, _widen(body, "b")], "delta")
    body.node("Add", ["y", body.node("Mul", [delta, chosen], "scaled")], "add", ["out"])
    inputs = [*BRANCH_INPUTS, "bank", "recovery", "columns", "read", *(["anchors"] if plan.window > 1 else [])]
    return body.make_function(name, inputs, ["out"], ROUTING_ATTRIBUTES)


def make_swiglu(half: bool = False) -> onnx.FunctionProto:
    """out (..., N) = silu(x[..., :N]) * x[..., N:], x (..., 2 N)."""
    body = FunctionBody(half)
    body.node("Split", ["x"], "split", ["left", "right"], axis=-1, num_outputs=2)
    active = body.node("QuickGelu", ["left"], "silu", domain=MICROSOFT, alpha=1.0)
    body.node("Mul", [active, "right"], "mul", ["out"])
    return body.make_function(HALF + SWIGLU if half else SWIGLU, ["x"], ["out"], [])


def _add_branch(body: FunctionBody, residual: str, out: str) -> None:
    hidden = body.node("MatMul", ["x", _widen(body, "a")], "hidden")
    delta = body.node("MatMul", [hidden, _widen(body, "b")], "delta")
    body.node("Add", ["y", body.node("Mul", [delta, residual], "scaled")], "add", [out])


def _take_stretch(body: FunctionBody) -> str:
    """expert[..., start:end]"""
    limits = [body.attribute("first", "start"), body.attribute("stop", "end")]
    axis = body.constant("axis", np.array([EXPERT_AXIS], np.int64))
    return body.node("Slice", ["expert", *limits, axis], "residual")


def _widen(body: FunctionBody, name: str) -> str:
    """float32 of a weight that may be stored as float16; ONNX Runtime does this once, when it loads the graph."""
    if body.half:
        return name
    return body.node("Cast", [name], f"wide_{name}", to=onnx.TensorProto.FLOAT)
