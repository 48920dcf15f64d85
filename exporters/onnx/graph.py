"""Writing an ONNX file by hand: nodes, initializers, and weights in one external file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import onnx
from onnx import TensorProto, helper

from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.onnx.external import INLINE_BYTES, WeightFile

MICROSOFT = "com.microsoft"
LIME = "lime_edge"
LOGITS_TO_KEEP = "logits_to_keep"  # the input that says how many of the last positions get logits
LOGITS_START = "logits_start"  # the same as a position from the end, -1: the last; a GPU graph slices with it as it is
OPSET = 21
IR_VERSION = 10

OPSETS = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]

DTYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
}


@dataclass
class Graph:
    """A graph under construction; `save` writes it.

    Args:
        weights: takes its large constants, those of other graphs too.
        half: real numbers inside of the graph are float16: every float32 constant becomes one.
    """

    weights: WeightFile
    half: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    functions: dict[str, onnx.FunctionProto] = field(default_factory=dict)

    @property
    def real(self) -> int:
        """The type of the graph's real numbers."""
        return TensorProto.FLOAT16 if self.half else TensorProto.FLOAT

    def _store(self, array: np.ndarray) -> np.ndarray:
        """The array as the graph holds it.

        Raises:
            LimeEdgeError: a value beyond float16 in a float16 graph.
        """
        if not self.half or array.dtype != np.float32:
            return np.ascontiguousarray(array)
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, np.float16)
        if not np.isfinite(stored).all():
            raise LimeEdgeError("a constant of the graph is beyond float16's range", "export with float32 activations")
        return stored

    def node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        outputs: list[str] | None = None,
        domain: str = "",
        **attributes: object,
    ) -> str:
        """Append a node; its first output is named after it unless `outputs` says otherwise."""
        outputs = outputs or [f"{name}/output"]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add an initializer; large ones go to the external file."""
        array = self._store(array)
        if array.nbytes <= INLINE_BYTES:
            self.initializers.append(onnx.numpy_helper.from_array(array, name))
            return name
        place = self.weights.add(array)
        tensor = TensorProto(name=name, data_type=DTYPES[array.dtype], dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in asdict(place).items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def input(self, name: str, kind: int, shape: list[int | str]) -> str:
        """Declare a graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: list[int | str]) -> str:
        """Declare a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def used_functions(self) -> list[str]:
        """Names of the functions that nodes call."""
        called = {node.op_type for node in self.nodes if node.domain == LIME}
        return [name for name in self.functions if name in called]

    def save(self, path: Path, producer: str, metadata: dict[str, str]) -> None:
        """Write the graph; the external file is complete by then."""
        graph = helper.make_graph(self.nodes, "lime_edge", self.inputs, self.outputs, self.initializers)
        functions = self.used_functions()
        opsets = [*OPSETS, helper.make_opsetid(LIME, 1)] if functions else OPSETS
        model = helper.make_model(
            graph,
            ir_version=IR_VERSION,
            producer_name="lime_edge",
            producer_version=producer,
            opset_imports=opsets,
            functions=[self.functions[name] for name in functions],
        )
        helper.set_model_props(model, metadata)
        path.write_bytes(model.SerializeToString())


class FunctionBody(Graph):
    """The nodes of a function in the model: constants are nodes, because a function holds no tensors."""

    def __init__(self, half: bool = False) -> None:
        super().__init__(cast(WeightFile, None), half)  # nothing of it is written to a file

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add a Constant node."""
        tensor = onnx.numpy_helper.from_array(self._store(array))
        return self.node("Constant", [], name, [name], value=tensor)

    def attribute(self, name: str, of: str) -> str:
        """A Constant node of the integers that a call of the function gives as its attribute `of`. (n,) int64"""
        self.node("Constant", [], name, [name])
        self.refer("value_ints", onnx.AttributeProto.INTS, of)
        return name

    def refer(self, name: str, kind: int, of: str) -> None:
        """Give the last node the attribute `name`, whose value a call of the function gives as its attribute `of`."""
        self.nodes[-1].attribute.append(onnx.AttributeProto(name=name, type=kind, ref_attr_name=of))

    def make_function(
        self, name: str, inputs: list[str], outputs: list[str], attributes: list[str]
    ) -> onnx.FunctionProto:
        """The function of these nodes, in the domain `lime_edge`."""
        return helper.make_function(LIME, name, inputs, outputs, self.nodes, OPSETS, attributes)
