"""Other ways to write the residual branch into an ONNX graph, for tools/performance.py to measure.

Only `as exported` is what lime_edge ships. The others answer "what if": their answers may differ (a constant stands
where the expert would be), their cost is what counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from lime_edge.compiler.compiled import CompiledModel, Group, GroupBranch
from lime_edge.compiler.quantize import QuantizedTensor
from lime_edge.exporters.onnx import DecoderWriter
from lime_edge.exporters.onnx_experts import PinnedExperts, RoutedExperts
from lime_edge.exporters.onnx_graph import DTYPES, MICROSOFT, Graph
from lime_edge.exporters.onnx_weights import pack_weight

DTYPES.setdefault(np.dtype(np.int8), TensorProto.INT8)


def round_rows(matrix: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 codes and float32 scales along an axis."""
    scale = np.maximum(np.abs(matrix).max(axis=axis, keepdims=True), 1e-8) / 127
    return np.clip(np.rint(matrix / scale), -127, 127).astype(np.int8), scale.astype(np.float32)


class SeparateInputs(PinnedExperts):
    """One graph input per group instead of one flat input that is cut."""

    def declare(self, branches: list[GroupBranch]) -> None:
        """Declare the inputs, zero by default."""
        for branch in branches:
            for offset, width in branch.find_runs():
                name = self.pieces[offset, width] = f"expert_{offset}"
                self.graph.input(name, TensorProto.FLOAT, [width])
                self.graph.initializers.append(onnx.numpy_helper.from_array(np.zeros(width, np.float32), name))


class BranchWriter(DecoderWriter):
    """The exporter's writer with the branch's nodes replaced by `add_branch`."""

    def _project(self, group: Group, x: str, path: str) -> str:
        branch, names = self.model.group_branch(group), [f"{name}.weight" for name in group.names]
        if branch is None or branch.a is None or branch.b is None or self.experts is None:
            return super()._project(group, x, path)
        y, hidden = self.multiply_inputs(names, branch, x, path)
        return self.add_branch(branch, y, hidden, path)

    def multiply_inputs(self, names: list[str], branch: GroupBranch, x: str, path: str) -> tuple[str, str]:
        """(W'x, A x)."""
        assert branch.a is not None
        y = self._matmul(names, None, x, path)
        a = self.graph.constant(f"{path}.lime_a", branch.a.T.numpy())
        return y, self.graph.node("MatMul", [x, a], f"{path}/lime/A")

    def add_branch(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        """y + d * (B hidden), as the exporter does it."""
        assert branch.b is not None and self.experts is not None
        g = self.graph
        delta = g.node("MatMul", [hidden, g.constant(f"{path}.lime_b", branch.b.T.numpy())], f"{path}/lime/B")
        scaled = g.node("Mul", [delta, self.experts.multiply(branch, y, hidden, path)], f"{path}/lime/Mul")
        return g.node("Add", [y, scaled], f"{path}/lime/Add")

    def multiply_bits(self, x: str, matrix: np.ndarray, path: str) -> str:
        """x times an int8 matrix (N, K) through MatMulNBits."""
        rows, columns = matrix.shape
        block = 32 if columns > 16 else 16
        blocks = -(-columns // block)
        found, scale = round_rows(matrix, 1)
        codes = np.full((rows, blocks * block), 128, np.uint8)
        codes[:, :columns] = found.astype(np.int16) + 128
        inputs = [x, self.graph.constant(f"{path}.codes", codes.reshape(rows, blocks, block)),
                  self.graph.constant(f"{path}.scales", np.repeat(scale, blocks, 1).reshape(-1))]  # fmt: skip
        return self.graph.node("MatMulNBits", inputs, path, domain=MICROSOFT, K=columns, N=rows, bits=8,
                               block_size=block, accuracy_level=4)  # fmt: skip


class ScaleAndAddOnly(BranchWriter):
    """y + d * y: what the multiply, the add and the cut cost without the products."""

    def multiply_inputs(self, names: list[str], branch: GroupBranch, x: str, path: str) -> tuple[str, str]:
        y = self._matmul(names, None, x, path)
        return y, y

    def add_branch(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        assert self.experts is not None
        scaled = self.graph.node("Mul", [y, self.experts.multiply(branch, y, hidden, path)], f"{path}/lime/Mul")
        return self.graph.node("Add", [y, scaled], f"{path}/lime/Add")


class OneProduct(BranchWriter):
    """B_e = diag(d) B made when switching: one product and one add (here: B itself)."""

    def add_branch(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        assert branch.b is not None
        g = self.graph
        delta = g.node("MatMul", [hidden, g.constant(f"{path}.lime_b", branch.b.T.numpy())], f"{path}/lime/B")
        return g.node("Add", [y, delta], f"{path}/lime/Add")


class EightBitBranch(BranchWriter):
    """A and B as int8 MatMulNBits."""

    def multiply_inputs(self, names: list[str], branch: GroupBranch, x: str, path: str) -> tuple[str, str]:
        assert branch.a is not None
        return self._matmul(names, None, x, path), self.multiply_bits(x, branch.a.numpy(), f"{path}/lime/A")

    def add_branch(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        assert branch.b is not None and self.experts is not None
        delta = self.multiply_bits(hidden, branch.b.numpy(), f"{path}/lime/B")
        scaled = self.graph.node("Mul", [delta, self.experts.multiply(branch, y, hidden, path)], f"{path}/lime/Mul")
        return self.graph.node("Add", [y, scaled], f"{path}/lime/Add")


class ExpertAsScale(BranchWriter):
    """B as int8 in DynamicQuantizeMatMul, whose per-column scale is the expert: the multiply is gone."""

    def add_branch(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        assert branch.b is not None and self.experts is not None
        g = self.graph
        codes = g.constant(f"{path}.lime_b8", round_rows(branch.b.T.numpy(), 0)[0])
        inputs = [hidden, codes, self.experts.multiply(branch, y, hidden, path)]
        delta = g.node("DynamicQuantizeMatMul", inputs, f"{path}/lime/B", domain=MICROSOFT)
        return g.node("Add", [y, delta], f"{path}/lime/Add")


class AppendedRows(BranchWriter):
    """A's rows appended to an int8 projection; other projections as exported."""

    def multiply_inputs(self, names: list[str], branch: GroupBranch, x: str, path: str) -> tuple[str, str]:
        stored = [self.model.weights[name] for name in names]
        if not all(isinstance(tensor, QuantizedTensor) and tensor.bits == 8 for tensor in stored):
            return super().multiply_inputs(names, branch, x, path)
        assert branch.a is not None
        g, a = self.graph, branch.a.numpy()
        packed = [pack_weight(tensor) for tensor in stored if isinstance(tensor, QuantizedTensor)]
        block, width = packed[0].block, sum(p.codes.shape[0] for p in packed)
        found, scale = round_rows(a.reshape(len(a), -1, block), 2)
        codes = np.concatenate([*(p.codes for p in packed), (found.astype(np.int16) + 128).astype(np.uint8)])
        scales = np.concatenate([*(p.scales.reshape(-1) for p in packed), scale.reshape(-1)])
        inputs = [x, g.constant(f"{path}.codes", codes), g.constant(f"{path}.scales", scales)]
        out = g.node("MatMulNBits", inputs, f"{path}/MatMulNBits", domain=MICROSOFT, K=a.shape[1], N=len(codes), bits=8,
                     block_size=block, accuracy_level=4)  # fmt: skip
        cuts = g.constant(f"{path}.cuts", np.array([width, len(a)], np.int64))
        g.node("Split", [out, cuts], f"{path}/lime/Cut", [f"{path}/y", f"{path}/z"], axis=-1)
        return f"{path}/y", f"{path}/z"


class FlatActivations(AppendedRows):
    """Activations (S, D), so that one Gemm adds the product to y; A appended, B_e made when switching."""

    def _reshape(self, x: str, shape: list[int], path: str) -> str:
        return self.graph.node("Reshape", [x, self.graph.constant(f"{path}/shape", np.array(shape, np.int64))], path)

    def _embed(self) -> str:
        return self._reshape(super()._embed(), [-1, self.config.hidden], "/flat/in")

    def _norm(self, name: str, path: str, stream: str, update: str) -> tuple[str, str]:
        x, stream = super()._norm(name, path, stream, update)
        last = name == "model.norm.weight"
        return self._reshape(x, [1, -1, self.config.hidden], "/flat/out") if last else x, stream

    def _attend(self, index: int, qkv: str, group: Group, path: str) -> str:
        y = super()._attend(index, self._reshape(qkv, [1, -1, group.width], f"{path}/deep"), group, path)
        return self._reshape(y, [-1, self.config.heads * self.config.head_dim], f"{path}/flat")

    def add_branch(self, branch: GroupBranch, y: str, hidden: str, path: str) -> str:
        assert branch.b is not None
        b = self.graph.constant(f"{path}.lime_b", branch.b.T.numpy())
        return self.graph.node("Gemm", [hidden, b, y], f"{path}/lime/B")


Experts = Callable[[CompiledModel, Graph], PinnedExperts | RoutedExperts | None]


@dataclass(frozen=True)
class Variant:
    """A way to write the graph. predicted: what it was expected to do to the cost of the branch, written beforehand."""

    writer: type[DecoderWriter]
    experts: Experts
    predicted: str


def route(model: CompiledModel, graph: Graph) -> RoutedExperts:
    """The routed experts of a model that routes."""
    assert model.routing is not None
    return RoutedExperts(model, graph, model.routing)


VARIANTS = {
    "branchless": Variant(DecoderWriter, lambda model, graph: None, "the floor"),
    "as exported": Variant(DecoderWriter, PinnedExperts, "four small nodes a group and one cut"),
    "scale and add only": Variant(ScaleAndAddOnly, PinnedExperts, "half of it, were all nodes alike"),
    "B_e at the switch": Variant(OneProduct, PinnedExperts, "a quarter less: one node of four is gone"),
    "int8 A and B": Variant(EightBitBranch, PinnedExperts, "less: a quarter of the bytes"),
    "expert as int8 scale": Variant(ExpertAsScale, PinnedExperts, "a quarter less: one node of four is gone"),
    "one input a group": Variant(DecoderWriter, SeparateInputs, "less by the cut of the flat input"),
    "A appended to q/k/v": Variant(AppendedRows, PinnedExperts, "a tenth less: the product rides along on all threads"),
    "A appended, B_e, 2-D": Variant(FlatActivations, lambda model, graph: PinnedExperts(model, graph),
                                    "half: two nodes a group, no cut"),
    "routed": Variant(DecoderWriter, route, "23 nodes a group"),
}  # fmt: skip


def write_variant(model: CompiledModel, variant: Variant, path: Path) -> int:
    """Write a variant's graph and weights; returns its number of nodes."""
    graph = Graph(path.with_suffix(".onnx.data"))
    graph.data_path.touch()
    variant.writer(model, graph, variant.experts(model, graph)).write(lambda *_: None)
    graph.save(path, "variants", {})
    return len(graph.nodes)
