"""ONNX for encoders and vision models: torch's exporter traces the compiled module, our integers go in as they are.

Two graphs share one weight file: `model.onnx` takes the expert's residual as an input, `routed.onnx` weighs
the checkpoint's experts itself, so that the pinned graph pays nothing for routing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_edge import __version__
from lime_edge.compiler.formats.encoder import make_sample
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.encoder import CompiledEncoder, EncoderModule
from lime_edge.compiler.model.encoder_layers import StoredProduct, StoredTable
from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.onnx.external import INLINE_BYTES, WeightFile
from lime_edge.exporters.onnx.graph import MICROSOFT, OPSET
from lime_edge.exporters.onnx.weights import pack_weight
from lime_edge.exporters.silence import silence
from lime_edge.targets.entries import OnnxOptions

FILE, ROUTED, EXPERT = "model.onnx", "routed.onnx", "expert"
PREFIX = "module.model."  # where the tracer finds the transformers model
ACCURACY_LEVEL = 4  # MatMulNBits computes with int8 activations in blocks, as in the decoders' graph
Progress = Callable[[str, int, int], None]


def write_encoder(
    compiled: CompiledEncoder, directory: Path, options: OnnxOptions, progress: Progress
) -> dict[str, Any]:
    """Write model.onnx, routed.onnx where the checkpoint routes, and model.onnx.data.

    Args:
        compiled: its integers are only re-packed. directory: exists, empty.
        options: none of them is ONNX's. progress: called with (step, done, total).
    Returns:
        The target's manifest entry.
    Raises:
        LimeEdgeError: torch's exporter does not take the model.
    """
    weights = WeightFile(directory / f"{FILE}.data")
    metadata = {"fingerprint": compiled.fingerprint, "fold": compiled.fold, "quant": compiled.quant}
    takes_expert = compiled.single is None
    routed = compiled.routing is not None
    progress("write onnx", 0, 1 + routed)
    with compiled.module.replace_products(pack_product):
        nodes = write_traced(compiled.module, directory / FILE, weights, takes_expert, metadata)
        progress("write onnx", 1, 1 + routed)
        if routed:
            compiled.module.use_routing(True)
            try:
                write_traced(compiled.module, directory / ROUTED, weights, False, metadata)
            finally:
                compiled.module.use_routing(False)
            progress("write onnx", 2, 2)
    return {
        "file": f"onnx/{FILE}",
        "routed": f"onnx/{ROUTED}" if routed else None,
        "opset": OPSET,
        "onnx": onnx.__version__,
        "expert_input": takes_expert,
        "nodes": nodes,
        "inputs": [asdict(entry) | {"shape": list(entry.shape)} for entry in compiled.module.inputs],
        "outputs": list(compiled.module.outputs),
        "weight_hash": compiled.weight_hash(),
    }


class OnnxProduct(nn.Module):
    """x W'^T + bias as MatMulNBits over the compiler's codes, or as MatMul over a weight stored transposed."""

    bias: Tensor | None

    def __init__(self, product: StoredProduct):
        super().__init__()
        self.register_buffer("bias", product.bias)
        self.attributes: dict[str, Any] = {}
        stored = product.stored
        if not isinstance(stored, QuantizedTensor):
            self.register_buffer("weight", stored.t().contiguous())
            return
        packed = pack_weight(stored)
        self.register_buffer("codes", torch.from_numpy(packed.codes))
        self.register_buffer("scales", torch.from_numpy(packed.scales.reshape(-1)))
        self.attributes = {
            "K": stored.codes.shape[1],
            "N": stored.codes.shape[0],
            "bits": packed.bits,
            "block_size": packed.block,
            "accuracy_level": ACCURACY_LEVEL,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Only to be traced: the quantized form has no kernel in torch."""
        if not self.attributes:
            y = x @ self.get_buffer("weight")
            return y if self.bias is None else y + self.bias
        inputs: list[Tensor | None] = [x, self.get_buffer("codes"), self.get_buffer("scales")]
        inputs += [] if self.bias is None else [None, None, self.bias]
        return torch.onnx.ops.symbolic(
            f"{MICROSOFT}::MatMulNBits",
            inputs,
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.attributes["N"]),
            version=1,
        )


class OnnxTable(nn.Module):
    """Rows of a table: int4 through GatherBlockQuantized, int8 as codes times the row's scale, or float."""

    def __init__(self, table: StoredTable):
        super().__init__()
        stored = table.stored
        self.bits = stored.bits if isinstance(stored, QuantizedTensor) else 0
        if not isinstance(stored, QuantizedTensor):
            self.register_buffer("weight", stored)
            return
        self.width, self.block = stored.codes.shape[1], stored.group
        self.register_buffer("codes", stored.codes)
        self.register_buffer("scales", stored.scales)
        if self.bits == 4:
            packed = pack_weight(stored)
            self.codes = torch.from_numpy(packed.codes.reshape(packed.codes.shape[0], -1))
            self.scales = torch.from_numpy(packed.scales)

    def forward(self, ids: Tensor) -> Tensor:
        """Only to be traced."""
        if not self.bits:
            return F.embedding(ids, self.get_buffer("weight"))
        if self.bits == 8:
            rows = F.embedding(ids, self.get_buffer("codes")).float()
            return rows * F.embedding(ids, self.get_buffer("scales"))
        attributes: dict[str, Any] = {"block_size": self.block, "gather_axis": 0, "quantize_axis": 1, "bits": 4}
        return torch.onnx.ops.symbolic(
            f"{MICROSOFT}::GatherBlockQuantized",
            [self.codes, ids, self.scales],
            attributes,
            dtype=torch.float32,
            shape=(*ids.shape, self.width),
            version=1,
        )


def pack_product(product: StoredProduct | StoredTable) -> nn.Module:
    """A layer's product as this target computes it."""
    return OnnxProduct(product) if isinstance(product, StoredProduct) else OnnxTable(product)


def write_traced(
    module: EncoderModule, path: Path, weights: WeightFile, takes_expert: bool, metadata: dict[str, str]
) -> int:
    """Trace the module into one graph file; returns its number of nodes."""
    model = _trace(module, takes_expert)
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = value.name = str(value.name).removeprefix(PREFIX).replace(".product.", ".")
        array = _clear(value).const_value
        assert array is not None
        if array.nbytes > INLINE_BYTES:
            stored = array.numpy()
            place = weights.add(stored)
            value.const_value = ir.ExternalTensor(
                place.location,
                place.offset,
                place.length,
                array.dtype,
                name=name,
                shape=ir.Shape(stored.shape),
                base_dir=path.parent,
            )
    nodes = 0
    for node in model.graph.all_nodes():  # the exporter notes the source lines of this machine
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            _clear(value)
        nodes += 1
    for value in (*graph.inputs, *graph.outputs):
        _clear(value)
    graph.metadata_props.clear()
    graph.name, graph.doc_string, model.doc_string = "lime_edge", None, None
    model.producer_name, model.producer_version = "lime_edge", __version__
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return nodes


def _clear(value: ir.Value) -> ir.Value:
    value.metadata_props.clear()
    value.doc_string = None
    return value


def _trace(module: EncoderModule, takes_expert: bool) -> ir.Model:
    """torch's exporter on the module: dynamic axes as the inputs name them, the expert as a last input."""
    sample = make_sample(module.inputs)
    named = [{i: n for i, n in enumerate(entry.shape) if isinstance(n, str)} for entry in module.inputs]
    axes = {name: torch.export.Dim(name) for places in named for name in places.values()}
    shapes: list[Any] = [{i: axes[name] for i, name in places.items()} for places in named]
    names = [entry.name for entry in module.inputs]
    tensors = list(sample.values())
    if takes_expert:
        tensors, shapes, names = [*tensors, torch.zeros(module.sites.total)], [*shapes, None], [*names, EXPERT]
    try:
        with silence(), torch.no_grad():
            program = torch.onnx.export(
                _Traced(module, takes_expert),
                tuple(tensors),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                input_names=names,
                output_names=list(module.outputs),
                dynamic_shapes=(tuple(shapes),),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        first = next((line for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise LimeEdgeError(f"ONNX export: torch's exporter refused {type(module.model).__name__}: {first}") from error
    assert program is not None
    return program.model


class _Traced(nn.Module):
    """The module as a function of exactly the graph's inputs."""

    def __init__(self, module: EncoderModule, takes_expert: bool):
        super().__init__()
        self.module, self.takes_expert = module, takes_expert

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The module's outputs; a graph without an expert input gets zeros, which nothing reads."""
        if self.takes_expert:
            return self.module(*tensors)
        return self.module(*tensors, torch.zeros(self.module.sites.total))
