"""The CUDA operators against float64, call by call: shapes, gaps, rows with experts of their own, long prompts.

    python tools/gpu_kernels.py      # on a machine with an NVIDIA GPU, after build_cuda; exit code 1 on a miss

Each case is a graph of one call, run by ONNX Runtime on the GPU, with the library and without it.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

with contextlib.suppress(ImportError):
    import torch  # noqa: F401 - its CUDA libraries are then found by onnxruntime

import onnxruntime as ort

from lime_edge.exporters.onnx.functions import (
    BRANCH_NORM,
    EXPERT_BRANCH,
    GAPPED_BRANCH,
    HALF,
    SWIGLU,
    make_branch,
    make_branch_norm,
    make_gapped_branch,
    make_swiglu,
)
from lime_edge.exporters.onnx.graph import IR_VERSION, LIME, MICROSOFT, OPSET
from lime_edge.runtimes.onnx.operators import explain_cuda_absence, find_cuda_library
from lime_edge.runtimes.onnx.places import CUDA

TOLERANCE = 4e-3  # of the largest value; float16 resolves 5e-4 of a value, and the nodes round several times
MAKERS = {EXPERT_BRANCH: make_branch, GAPPED_BRANCH: make_gapped_branch, BRANCH_NORM: make_branch_norm}
EPSILON = 1e-5


@dataclass(frozen=True)
class Case:
    """One call: batch, tokens, K, a group's widths and ranks, whether each row has its own expert."""

    name: str
    batch: int
    tokens: int
    inputs: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    rows: bool = False


CASES = [
    Case(EXPERT_BRANCH, 1, 1, 576, (576, 192, 192), (16, 16, 16)),
    Case(EXPERT_BRANCH, 1, 1, 1536, (577,), (5,)),
    Case(EXPERT_BRANCH, 32, 1, 576, (1536, 1536), (16, 16), rows=True),
    Case(EXPERT_BRANCH, 1, 512, 576, (576, 192, 192), (16, 7, 16)),
    Case(EXPERT_BRANCH, 3, 21, 33, (40, 24), (3, 2), rows=True),
    Case(EXPERT_BRANCH, 2, 9, 2048, (3000,), (1024,), rows=True),
    Case(GAPPED_BRANCH, 1, 1, 576, (576, 192, 192), (16, 0, 16)),
    Case(GAPPED_BRANCH, 4, 130, 64, (100, 50, 31), (0, 9, 0), rows=True),
    Case(BRANCH_NORM, 1, 1, 1536, (576,), (16,)),
    Case(BRANCH_NORM, 8, 1, 8192, (2048,), (64,), rows=True),
    Case(BRANCH_NORM, 2, 77, 576, (577,), (9,), rows=True),
]


def draw(case: Case) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Inputs in float16 and attributes of a call."""
    random = np.random.default_rng(7)
    rank, width = -(-sum(case.ranks) // 8) * 8, sum(case.widths)
    offsets, total = [], 5
    for one, own in zip(case.widths, case.ranks, strict=True):
        offsets.append(total if own else 0)
        total += one if own else 0
    a, b = np.zeros((case.inputs, rank)), np.zeros((rank, width))
    row = column = 0
    for one, own in zip(case.widths, case.ranks, strict=True):
        a[:, row : row + own] = random.normal(size=(case.inputs, own)) / case.inputs**0.5
        b[row : row + own, column : column + one] = random.normal(size=(own, one))
        row, column = row + own, column + one
    feeds = {
        "x": random.normal(size=(case.batch, case.tokens, case.inputs)),
        "y": random.normal(size=(case.batch, case.tokens, width)),
        "a": a,
        "b": b,
        "expert": random.normal(size=(case.batch if case.rows else 1, 1, total + 3)),
    }
    attributes: dict[str, object] = {"widths": list(case.widths), "ranks": list(case.ranks), "offsets": offsets}
    if case.name == GAPPED_BRANCH:
        places = [
            np.arange(one) + offset if own else np.zeros(one)
            for one, own, offset in zip(case.widths, case.ranks, offsets, strict=True)
        ]
        feeds["places"] = np.concatenate(places).astype(np.int64)
    else:
        attributes |= {"start": [5], "end": [5 + width]}
    if case.name == BRANCH_NORM:
        feeds |= {"stream": random.normal(size=feeds["y"].shape), "gain": random.normal(size=width)}
        attributes["epsilon"] = EPSILON
    half = {name: array if name == "places" else array.astype(np.float16) for name, array in feeds.items()}
    return half, attributes


def expect(case: Case, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The call in float64, each member by itself."""
    x, y, a, b, expert = (feeds[name].astype(np.float64) for name in ("x", "y", "a", "b", "expert"))
    delta, d = x @ a @ b, np.zeros((expert.shape[0], 1, y.shape[2]))
    column, place = 0, 5
    for one, own in zip(case.widths, case.ranks, strict=True):
        if own:
            d[:, :, column : column + one] = expert[:, :, place : place + one]
            place += one
        column += one
    out = y + delta * d
    if case.name != BRANCH_NORM:
        return [out]
    total = out + feeds["stream"]
    norm = total / np.sqrt((total**2).mean(-1, keepdims=True) + EPSILON) * feeds["gain"]
    return [norm, total]


def run(call: onnx.NodeProto, function: onnx.FunctionProto, feeds: dict[str, np.ndarray], library: bool) -> list:
    """A graph of one call on the GPU."""
    types = {np.dtype(np.float16): TensorProto.FLOAT16, np.dtype(np.int64): TensorProto.INT64}
    fixed = {"a", "b", "gain", "places"}
    graph = helper.make_graph(
        [call],
        "call",
        [helper.make_tensor_value_info(n, types[v.dtype], v.shape) for n, v in feeds.items() if n not in fixed],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in call.output],
        [onnx.numpy_helper.from_array(v, n) for n, v in feeds.items() if n in fixed],
    )
    opsets = [helper.make_opsetid(*one) for one in (("", OPSET), (MICROSOFT, 1), (LIME, 1))]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=IR_VERSION)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if library:
        settings.register_custom_ops_library(str(find_cuda_library()))
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=[CUDA])
    return session.run(None, {name: array for name, array in feeds.items() if name not in fixed})


def compare(what: str, found: list, wanted: list[np.ndarray]) -> bool:
    """Print the worst error; True where it is within TOLERANCE."""
    errors = [
        float(np.abs(f.astype(np.float64) - w).max() / np.abs(w).max()) for f, w in zip(found, wanted, strict=True)
    ]
    print(f"{what}: worst error {max(errors):.1e} of the largest value", flush=True)
    return max(errors) <= TOLERANCE


def main() -> None:
    """Every case, with the library and without."""
    if absence := explain_cuda_absence():
        sys.exit(f"no CUDA operators: {absence}")
    good = True
    for case in CASES:
        feeds, attributes = draw(case)
        outputs = ["out", "sum"] if case.name == BRANCH_NORM else ["out"]
        call = helper.make_node(HALF + case.name, list(feeds), outputs, domain=LIME, **attributes)
        function = MAKERS[case.name](HALF + case.name, True)
        for library in (True, False):
            label = f"{case} {'operator' if library else 'nodes'}"
            good &= compare(label, run(call, function, feeds, library), expect(case, feeds))
    x = np.random.default_rng(3).normal(size=(3, 5, 2 * 77)).astype(np.float16)
    left, right = x[..., :77].astype(np.float64), x[..., 77:].astype(np.float64)
    call = helper.make_node(HALF + SWIGLU, ["x"], ["out"], domain=LIME)
    wanted = [left / (1 + np.exp(-left)) * right]
    good &= compare("SwiGLU", run(call, make_swiglu(True), {"x": x}, True), wanted)
    print(f"library: {Path(str(find_cuda_library())).name}; {'all within' if good else 'MISSED'} {TOLERANCE}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
