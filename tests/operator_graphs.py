"""Graphs of one call each: random groups, written by the exporter, run with the operators or without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from lime_edge.bundle.sites import SiteTable
from lime_edge.compiler.maths.route import route
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.maths.variants import find_variant
from lime_edge.compiler.model.compiled import Branch, CompiledModel, Group, GroupBranch
from lime_edge.compiler.model.decoder import Decoder
from lime_edge.exporters.onnx.experts import PinnedExperts, RoutedExperts, fuse_norm
from lime_edge.exporters.onnx.external import WeightFile
from lime_edge.exporters.onnx.graph import IR_VERSION, LIME, OPSETS, Graph
from lime_edge.runtimes.onnx.operators import find_library

TOLERANCE = 1e-5  # of the largest value: float32 keeps 6e-8, and sums of a few hundred products lose two digits
EPSILON = 1e-5
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """A group of linears: K inputs, and each member's width and rank (0: no site).

    half: whether a and b are numbers that float16 holds, and are therefore stored so.
    """

    inputs: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    half: bool = False
    experts: int = 4

    @property
    def width(self) -> int:
        """N, of all members."""
        return sum(self.widths)


def draw_group(shape: Shape, seed: int = 0, variant: str = "lora") -> tuple[CompiledModel, GroupBranch]:
    """A model whose only group is this one; its sites lie between two others, at odd places of the flat vector."""
    random = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        values = torch.randn(*size, generator=random)
        return values.half().float() if shape.half else values

    names = tuple(f"part{index}" for index in range(len(shape.widths)))
    members = list(zip(names, shape.widths, shape.ranks, strict=True))
    branches = {
        name: Branch(draw(rank, shape.inputs) / 8, draw(width, rank) / 4) for name, width, rank in members if rank
    }
    sites = [(name, width) for name, width, rank in members if rank]
    table = SiteTable.from_widths([("before", 5), *sites, ("after", 3)])
    experts = {f"expert{index}": 1 + 0.5 * draw(table.total) for index in range(shape.experts)}
    reference = 1 + 0.5 * draw(table.total)
    model = CompiledModel(
        decoder=cast(Decoder, None),
        weights={},
        vectors={},
        branches=branches,
        sites=table,
        reference=reference,
        experts=experts,
        fingerprint="",
        fold="shared",
        single=None,
        quant="none",
        group=32,
        variant=find_variant(variant),
    )
    branch = model.group_branch(Group(names, shape.widths))
    assert branch is not None
    return model, branch


def draw_inputs(
    shape: Shape, rows: tuple[int, int], total: int = 0, seed: int = 0, experts: int = 1
) -> dict[str, np.ndarray]:
    """x, y and stream of (batch, tokens), and the expert (experts, total) where there is one."""
    random = np.random.default_rng(seed)
    feeds = {
        name: random.standard_normal((*rows, width), np.float32)
        for name, width in (("x", shape.inputs), ("y", shape.width), ("stream", shape.width))
    }
    return feeds | ({"expert": random.standard_normal((experts, total), np.float32)} if total else {})


def start_graph(file: Path, shape: Shape) -> Graph:
    """A graph with x and half of y as inputs: y itself is a sum, so that its memory may be used for the result."""
    graph = Graph(WeightFile(file.with_suffix(".data")))
    for name, width in (("x", shape.inputs), ("y", shape.width)):
        graph.input(name, TensorProto.FLOAT, ["batch", "tokens", width])
    graph.node("Add", ["y", "y"], "twice", ["twice_y"])
    return graph


def write_pinned(
    file: Path, shape: Shape, seed: int = 0, gain: np.ndarray | None = None, keep: bool = False
) -> CompiledModel:
    """The group's branch of `draw_group`, and with a gain (N,) the norm after it. keep: y is an output as well."""
    model, branch = draw_group(shape, seed)
    graph = start_graph(file, shape)
    experts = PinnedExperts(model, graph)
    experts.declare()
    outputs = [experts.add_branch(branch, "x", "twice_y", "group")]
    if gain is not None:
        graph.input("stream", TensorProto.FLOAT, ["batch", "tokens", shape.width])
        fused = fuse_norm(graph, outputs[0], "stream", graph.constant("gain", gain), EPSILON, "group")
        assert fused is not None, "a branch without gaps takes the norm with it"
        outputs = list(fused)
    for name in outputs + ["twice_y"] * keep:
        graph.output(name, TensorProto.FLOAT, ["batch", "tokens", shape.width])
    graph.save(file, "test", {})
    return model


def write_routed(
    file: Path, shape: Shape, config: RoutingConfig, seed: int = 0, variant: str = "lora"
) -> CompiledModel:
    """The group's branch of `draw_group`, routed."""
    model, branch = draw_group(shape, seed, variant)
    graph = start_graph(file, shape)
    graph.input("input_ids", TensorProto.INT64, ["batch", "tokens"])
    experts = RoutedExperts(model, graph, config)
    experts.declare()
    out = experts.add_branch(branch, "x", "twice_y", "group")
    graph.output(out, TensorProto.FLOAT, ["batch", "tokens", shape.width])
    graph.save(file, "test", {})
    return model


def write_call(
    file: Path, function: onnx.FunctionProto, inputs: Arrays, outputs: int = 1, **attributes: object
) -> None:
    """One call of a function; each input is the graph's, of its array's type, and its sizes may be anything."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    given = [
        helper.make_tensor_value_info(name, kinds[name], [f"{name}_{axis}" for axis in range(array.ndim)])
        for name, array in inputs.items()
    ]
    names = [f"out{index}" for index in range(outputs)]
    node = helper.make_node(function.name, list(inputs), names, domain=LIME, **attributes)
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    opsets = [*OPSETS, helper.make_opsetid(LIME, 1)]
    model = helper.make_model(
        helper.make_graph([node], "call", given, made),
        functions=[function],
        opset_imports=opsets,
        ir_version=IR_VERSION,
    )
    file.write_bytes(model.SerializeToString())


def describe(shape: Shape) -> dict[str, Any]:
    """The attributes of a pinned call whose members lie one after the other from 0 on."""
    offsets = [sum(shape.widths[:index]) for index in range(len(shape.widths))]
    return {"widths": shape.widths, "ranks": shape.ranks, "offsets": offsets, "start": [0], "end": [shape.width]}


def load(file: Path, operators: bool, threads: int = 1, optimized: Path | None = None) -> ort.InferenceSession:
    """A session with the operators registered or without; optimized: where ONNX Runtime writes what it will run."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads
    settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False  # a tensor's end is the end of its memory
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
    if operators:
        settings.register_custom_ops_library(str(find_library()))
    return ort.InferenceSession(file, settings, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, feeds: Arrays) -> list[np.ndarray]:
    """The outputs; y is halved, because the graph doubles it, and what the graph does not take is left out."""
    feeds = {**feeds, "input_ids": np.zeros(feeds["x"].shape[:2], np.int64), "y": feeds["y"] / 2}
    taken = [value.name for value in session.get_inputs() + session.get_overridable_initializers()]
    return cast(list[np.ndarray], session.run(None, {name: feeds[name] for name in taken}))


def find_operators(file: Path) -> set[str]:
    """Types of the nodes in a file, those of our domain with it before them."""
    graph = onnx.load(file, load_external_data=False).graph
    return {f"{node.domain}.{node.op_type}" if node.domain == LIME else node.op_type for node in graph.node}


def compute_pinned(model: CompiledModel, shape: Shape, feeds: Arrays) -> torch.Tensor:
    """y + d * (B A x) in float64, each member by itself: (batch, tokens, N)."""
    x, y, d = (torch.from_numpy(feeds[name]).double() for name in ("x", "y", "expert"))
    columns = []
    for index, piece in enumerate(y.split(shape.widths, dim=-1)):
        site, branch = model.sites.find(f"part{index}"), model.branches.get(f"part{index}")
        if site is not None and branch is not None and branch.a is not None and branch.b is not None:
            delta = x @ branch.a.double().T @ branch.b.double().T
            piece = piece + d[:, None, site.offset : site.offset + site.width] * delta
        columns.append(piece)
    return torch.cat(columns, dim=-1)


def compute_routed(model: CompiledModel, shape: Shape, config: RoutingConfig, feeds: Arrays) -> torch.Tensor:
    """The same with the bank's rows weighed by `route`, each member by itself."""
    x, y = (torch.from_numpy(feeds[name]).double() for name in ("x", "y"))
    columns, kept = [], 1.0 if model.variant.name == "dora" else 0.0
    for index, piece in enumerate(y.split(shape.widths, dim=-1)):
        site, branch = model.sites.find(f"part{index}"), model.branches.get(f"part{index}")
        if site is not None and branch is not None and branch.a is not None and branch.b is not None:
            delta = x @ branch.a.double().T @ branch.b.double().T
            seen, read = slice(site.offset, site.offset + shape.experts), delta[..., : shape.experts]
            frozen = piece[..., : shape.experts] + (kept - model.reference[seen].double()) * read
            piece = piece + route(frozen, read, config) @ model.bank(site).double() * delta
        columns.append(piece)
    return torch.cat(columns, dim=-1)


def assert_equal(found: np.ndarray, wanted: np.ndarray | torch.Tensor, what: str) -> None:
    """Every value within TOLERANCE of the largest; names the worst."""
    wanted = np.asarray(wanted)
    assert found.shape == wanted.shape, f"{what}: shape {found.shape}, expected {wanted.shape}"
    if not wanted.size:
        return
    off = np.abs(found - wanted)
    assert np.isfinite(off).all(), f"{what}: not finite"
    worst, limit = np.unravel_index(off.argmax(), off.shape), TOLERANCE * max(float(np.abs(wanted).max()), 1e-30)
    assert off[worst] <= limit, f"{what}: {found[worst]:.8g}, expected {wanted[worst]:.8g} at {worst} (+- {limit:.3g})"
