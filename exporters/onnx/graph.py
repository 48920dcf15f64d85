"""Writing an ONNX file by hand: nodes, initializers, and weights in one external file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from lime_edge.errors import LimeEdgeError

MICROSOFT = "com.microsoft"
LIME = "lime_edge"
LOGITS_TO_KEEP = "logits_to_keep"  # the input that says how many of the last positions get logits
LOGITS_START = "logits_start"  # the same as a position from the end, -1: the last; a GPU graph slices with it as it is
OPSET = 21
IR_VERSION = 10
ALIGNMENT = 4096  # page: ONNX Runtime maps the file
INLINE_BYTES = 1024  # smaller tensors stay in the graph file

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
    """A graph under construction; `save` writes model.onnx and model.onnx.data.

    Args:
        data_path: the external file, in the directory of the model.
        half: real numbers inside of the graph are float16: every float32 constant becomes one.
    """

    data_path: Path
    half: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    functions: dict[str, onnx.FunctionProto] = field(default_factory=dict)
    shared: dict[str, TensorProto] = field(default_factory=dict)
    _end: int = 0

    def share_data(self) -> Graph:
        """An empty graph whose constants of the same names are those of this one's external file."""
        external = {t.name: t for t in self.initializers if t.data_location == TensorProto.EXTERNAL}
        return Graph(self.data_path, self.half, shared=external, _end=self._end)

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
        if name in self.shared:
            self.initializers.append(self.shared[name])
            return name
        offset = self._append(array)
        self.initializers.append(_external(name, array.dtype, array.shape, self.data_path.name, offset, array.nbytes))
        return name

    def view(self, name: str, of: str, shape: tuple[int, ...]) -> str:
        """A second initializer over the same bytes of the external file, with another shape."""
        source = next(t for t in self.initializers if t.name == of)
        entries = {entry.key: entry.value for entry in source.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(source.data_type)
        offset, length = int(entries["offset"]), int(entries["length"])
        self.initializers.append(_external(name, np.dtype(dtype), shape, self.data_path.name, offset, length))
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

    def _append(self, array: np.ndarray) -> int:
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        with self.data_path.open("ab") as file:
            file.write(b"\0" * (offset - self._end))
            file.write(array.tobytes())
        self._end = offset + array.nbytes
        return offset


class FunctionBody(Graph):
    """The nodes of a function in the model: constants are nodes, because a function holds no tensors."""

    def __init__(self, half: bool = False) -> None:
        super().__init__(Path(), half)

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


def _external(
    name: str, dtype: np.dtype, shape: tuple[int, ...], location: str, offset: int, length: int
) -> TensorProto:
    tensor = TensorProto(name=name, data_type=DTYPES[dtype], dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
