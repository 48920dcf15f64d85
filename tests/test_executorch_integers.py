"""The integers inside a .pte are those inside the ONNX file; and the program computes what they say."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import executorch.backends.xnnpack.serialization as serialization
import numpy as np
import onnx
import pytest
import torch
from conftest import Make
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary
from models import ALL_LINEARS, EMBEDDING, draw_ids
from onnx import numpy_helper
from test_onnx_export import BLEND, compile_again, products_of

import lime_edge
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.exporters.executorch.decoder import choose_sizes
from lime_edge.exporters.executorch.program import DecoderProgram, list_groups
from lime_edge.exporters.onnx.weights import unpack_codes

pytestmark = pytest.mark.check
QUANTS: dict[str, dict[str, Any]] = {
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4", "keep_int8": ("qkv",)},
}


@dataclass(frozen=True)
class Matrix:
    """Canonical weights: codes (N, K) signed, scales (N, K / group) float32."""

    codes: np.ndarray
    scales: np.ndarray


def assert_same(found: Matrix, wanted: Matrix, what: str) -> None:
    assert found.codes.shape == wanted.codes.shape, what
    wrong = np.argwhere(found.codes != wanted.codes)
    assert not len(wrong), f"{what}: {len(wrong)} codes differ, the first at {wrong[0]}"
    columns = wanted.codes.shape[1]
    spread = [np.repeat(m.scales, columns // m.scales.shape[1], axis=1) for m in (found, wanted)]
    assert np.array_equal(spread[0].view(np.uint32), spread[1].view(np.uint32)), f"{what}: scales differ"


# the .pte file


def read_program(file: Path) -> PTEFile:
    return deserialize_pte_binary(file.read_bytes())


def list_products(pte: PTEFile) -> Iterator[Matrix]:
    """Every quantized product of `forward`, in the order in which they run."""
    plan = next(plan for plan in pte.program.execution_plan if plan.name == "forward")
    assert pte.named_data is not None
    for delegate in plan.delegates:
        blob = pte.program.backend_delegate_data[delegate.processed.index].data
        header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
        graph = read_graph(blob[header.flatbuffer_offset :][: header.flatbuffer_size])
        values = {read_id(value): value["xvalue_union"] for value in graph["xvalues"]}

        def read(index: int, graph: Any = graph) -> bytes:
            entry = pte.named_data.pte_data[graph["constant_data"][index]["named_key"]]
            return bytes(pte.named_data.buffers[entry.buffer_index])

        for node in graph["xnodes"]:
            if node["xnode_union_type"] != "XNNFullyConnected":
                continue
            value = values[node["xnode_union"]["filter_id"]]
            if "quant_params" in value:
                yield unpack_filter(value, read)


def read_id(value: Any) -> int:
    union = value["xvalue_union"]
    return union.get("tensor_value", union)["id_out"]


def read_graph(data: bytes) -> Any:
    """The XNNPACK graph as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes((Path(serialization.__path__[0]) / "schema.fbs").read_bytes())
        binary.write_bytes(data)
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        return json.loads((Path(folder) / "graph.json").read_text())


def unpack_filter(value: Any, read: Any) -> Matrix:
    """Codes and scales of a product's filter; int4 is two codes a byte, the even column low, offset by 8."""
    tensor, quantization = value["tensor_value"], value["quant_params"]
    rows, columns = tensor["dims"]
    raw, scales = read(tensor["constant_buffer_idx"]), read(quantization["scale_buffer_idx"])
    if tensor["datatype"] == "xnn_datatype_qbint4":
        bytes_ = np.frombuffer(raw, np.uint8).reshape(rows, -1)
        codes = np.stack([bytes_ & 15, bytes_ >> 4], -1).reshape(rows, columns).astype(np.int8) - np.int8(8)
        bits = np.frombuffer(scales, np.uint16).astype(np.uint32) << 16  # bfloat16
        assert columns // quantization["group_size"] * rows == len(bits)
        return Matrix(codes, bits.view(np.float32).reshape(rows, -1))
    assert tensor["datatype"] == "xnn_datatype_qcint8", tensor["datatype"]
    return Matrix(np.frombuffer(raw, np.int8).reshape(rows, columns), np.frombuffer(scales, np.float32)[:, None])


def read_table(pte: PTEFile) -> Matrix:
    """The embedding's operands in `forward`; int4 is two codes a byte, the even column high, offset by 8."""
    plan = next(plan for plan in pte.program.execution_plan if plan.name == "forward")
    calls = [i.instr_args for i in plan.chains[0].instructions if hasattr(i.instr_args, "op_index")]
    names = [plan.operators[call.op_index].name for call in calls]
    name = next(name for name in names if name.startswith("quantized_decomposed::embedding"))
    arguments = calls[names.index(name)].args
    codes, scales = (read_constant(pte, plan.values[index].val) for index in arguments[:2])
    scales = scales.view(np.float32).reshape(len(codes), -1)
    if name.endswith("4bit"):
        codes = codes.view(np.uint8)
        codes = np.stack([codes >> 4, codes & 15], -1).reshape(len(codes), -1).astype(np.int8) - np.int8(8)
    return Matrix(codes.view(np.int8), scales)


def read_constant(pte: PTEFile, tensor: Any) -> np.ndarray:
    return np.frombuffer(pte.program.constant_buffer[tensor.data_buffer_idx].storage, np.uint8)[
        : int(np.prod(tensor.sizes)) * (4 if tensor.scalar_type.name == "FLOAT" else 1)
    ].reshape(tensor.sizes[0], -1)


# the ONNX file


def read_onnx(file: Path, compiled: CompiledModel) -> dict[str, Matrix]:
    """Every weight of the ONNX graph by its name in the checkpoint."""
    proto = onnx.load(file)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    products, found = products_of(compiled), {}
    for node in (node for node in proto.graph.node if node.op_type == "MatMulNBits"):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        codes = unpack_codes(tensors[node.input[1]], attributes["bits"], attributes["K"])
        scales = tensors[node.input[2]].reshape(len(codes), -1)
        if attributes["bits"] == 8:  # one scale a row, repeated for every block
            assert (scales == scales[:, :1]).all()
            scales = scales[:, :1]
        start = 0
        for name in products[node.name]:
            stop = start + compiled.weights[name].codes.shape[0]  # type: ignore[union-attr]
            found[name] = Matrix(codes[start:stop], scales[start:stop])
            start = stop
        assert start == len(codes)
    table = compiled.weights[f"{EMBEDDING}.weight"]
    kind = "scales" if table.bits == 4 else "row_scales"  # type: ignore[union-attr]
    codes = unpack_codes(tensors[f"{EMBEDDING}.weight.codes"], table.bits, compiled.decoder.hidden)  # type: ignore[union-attr]
    scales = tensors[f"{EMBEDDING}.weight.{kind}"].reshape(len(codes), -1)
    return found | {"table": Matrix(codes, scales)}


def stack(matrices: list[Matrix]) -> Matrix:
    return Matrix(np.concatenate([m.codes for m in matrices]), np.concatenate([m.scales for m in matrices]))


def make(quant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> tuple[Path, CompiledModel]:
    """A bundle for both targets. int8 is the one that test_session.py exports too."""
    options = QUANTS[quant]
    if quant == "int8":
        model = tiny_model()
        return tiny_bundle(targets=("onnx", "executorch"), **options), compile_again(
            model, tiny_adapter(model), **options
        )
    model = tiny_model("qwen2", num_hidden_layers=1)
    adapter = tiny_adapter(model, targets=ALL_LINEARS)
    return (
        tiny_bundle(model, adapter, targets=("onnx", "executorch"), **options),
        compile_again(model, adapter, **options),
    )


@pytest.mark.parametrize("quant", QUANTS)
def test_both_files_hold_the_same_integers(quant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """Bit for bit: signed codes, and scales per row and group."""
    bundle, compiled = make(quant, tiny_model, tiny_adapter, tiny_bundle)
    wanted, pte = read_onnx(bundle / "onnx/model.onnx", compiled), read_program(bundle / "executorch/model.pte")
    assert_same(read_table(pte), wanted["table"], f"{quant}: embedding")
    names = [
        [f"{name}.weight" for name in list_groups(compiled, layer)[kind].names]
        for layer in range(len(compiled.decoder.layers))
        for kind in ("qkv", "o", "gate", "up", "down")
    ] + [[compiled.head_name]]
    found = list(list_products(pte))
    assert len(found) == len(names)
    for matrix, members in zip(found, names, strict=True):
        assert_same(matrix, stack([wanted[name] for name in members]), f"{quant}: {', '.join(members)}")
    kinds = {matrix.scales.shape[1] > 1 for matrix in found}
    assert kinds == {"int8": {False}, "int4": {False, True}}[quant]


@pytest.mark.parametrize("quant", QUANTS)
def test_the_program_computes_what_its_integers_say(
    quant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """Against the same decoder in torch, activations rounded to int8 there too; pinned, blended, none."""
    bundle, compiled = make(quant, tiny_model, tiny_adapter, tiny_bundle)
    session = lime_edge.open_decoder(bundle, target="executorch", threads=1)
    ids, rows = draw_ids(20, seed=7), torch.arange(20)
    for selection in (None, "expert1", BLEND):
        d = torch.from_numpy(session._bank.residual(selection).copy())
        with torch.no_grad():
            wanted = DecoderProgram(compiled, choose_sizes(compiled, 64)).eval()(ids, torch.zeros(1).long(), rows, d)
        session.use(selection)
        found = session.logits(ids[0].tolist())
        # a value on the edge of two codes may round the other way: most logits are equal to 1e-4, all are near
        error = np.abs(found - wanted[0].numpy())
        assert np.median(error) < 1e-3 and error.max() < 0.05 * np.abs(found).max(), (quant, selection, error.max())
        session.logits(ids[0, :9].tolist())
        parts = np.stack([session.extend([int(token)])[-1].copy() for token in ids[0, 9:]])
        assert np.median(np.abs(parts - found[9:])) < 1e-3, (quant, selection, "token by token")
