"""Core ML for encoders and vision models: torch.export on the compiled module, our integers go in as they are.

Text comes as one sequence in an enumerated length, padded by its mask; pixels as one image. A routed call weighs over
everything it is given, so the function `routed` takes any length and batch instead of padding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lime_edge.compiler.formats.encoder import Input, make_sample
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import Stored
from lime_edge.compiler.model.encoder import CompiledEncoder, EncoderModule
from lime_edge.compiler.model.encoder_layers import StoredProduct, StoredTable
from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.coreml.decoder import FILE, MAIN, PROVIDERS, ROUTED, describe_package
from lime_edge.exporters.coreml.graph import INT4, ct, mb, measure_package, read_minimum, save_package, silent
from lime_edge.exporters.padded import BATCH, EXPERT, LONGEST, UNSEEN, Traced, choose_lengths
from lime_edge.targets.entries import CoremlOptions

Progress = Callable[[str, int, int], None]


def write_encoder(
    compiled: CompiledEncoder, directory: Path, options: CoremlOptions, progress: Progress
) -> dict[str, Any]:
    """Write model.mlpackage: `main`, and `routed` where the checkpoint routes, on the same weights.

    Args:
        compiled: its integers are only re-packed, everything else becomes float16.
        directory: exists, empty. options: but for its cache. progress: called with (step, done, total).
    Returns:
        The target's manifest entry.
    Raises:
        LimeEdgeError: options out of range, or a model that coremltools cannot convert.
    """
    begun = time.perf_counter()
    minimum, module = read_minimum(options.minimum_os), compiled.module
    lengths = choose_lengths(compiled, options.prompt_lengths)
    longest = max(lengths, default=LONGEST)
    takes_expert, routed = compiled.single is None, compiled.routing is not None
    progress("write coreml", 0, 1 + routed)
    with tempfile.TemporaryDirectory() as folder, module.replace_products(pack_product), silent():
        parts = [Path(folder) / f"{MAIN}.mlpackage"]
        convert(module, lengths, longest, takes_expert, minimum).save(str(parts[0]))
        progress("write coreml", 1, 1 + routed)
        if routed:
            parts.append(Path(folder) / f"{ROUTED}.mlpackage")
            convert(module, None, longest, False, minimum).save(str(parts[1]))
            progress("write coreml", 2, 2)
        join(parts, Path(folder) / FILE)
        whole = ct.models.MLModel(str(Path(folder) / FILE), skip_model_load=True)
        save_package(whole, directory / FILE, describe_package(compiled, type(compiled.backbone.model).__name__))
    return {
        "file": f"coreml/{FILE}",
        "routed": ROUTED if routed else None,
        "providers": PROVIDERS,
        "minimum": options.minimum_os,
        "compute_units": options.compute_units,
        "coremltools": ct.__version__,
        "expert_input": takes_expert,
        "lengths": list(lengths),
        "compute": "float16",
        "inputs": [asdict(entry) | {"shape": list(entry.shape)} for entry in module.inputs],
        "outputs": list(module.outputs),
        "weight_hash": compiled.weight_hash(),
        "bytes": measure_package(directory / FILE),
        "seconds": round(time.perf_counter() - begun, 1),
    }


# our products, as operations of torch that coremltools is told to translate


@torch.library.custom_op("lime_edge::code_product", mutates_args=())
def code_product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """x W^T + bias with W = codes * scales: (..., K) to (..., N)."""
    return torch.nn.functional.linear(x, _expand(codes, scales), bias)


@torch.library.custom_op("lime_edge::code_rows", mutates_args=())
def code_rows(ids: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Rows of a table of codes: (...) to (..., H)."""
    return torch.nn.functional.embedding(ids, _expand(codes, scales))


@code_product.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@code_rows.register_fake
def _(ids: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    return scales.new_empty(*ids.shape, codes.shape[1])


def _expand(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)


def _register() -> None:
    """Teach coremltools the two operations: a constexpr of our integers, then its own product or lookup."""
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    def weight(codes: Any, scales: Any, bits: Any) -> Any:
        data = codes.val.astype(INT4 if bits.val == 4 else np.int8)
        return mb.constexpr_blockwise_shift_scale(data=data, scale=scales.val.astype(np.float16))

    def product(context: Any, node: Any) -> None:
        x, codes, scales, bias, bits = _get_inputs(context, node, expected=5)
        half = None if bias is None else bias.val.astype(np.float16)
        y = mb.linear(x=mb.cast(x=x, dtype="fp16"), weight=weight(codes, scales, bits), bias=half)
        context.add(mb.cast(x=y, dtype="fp32", name=node.name), torch_name=node.name)

    def rows(context: Any, node: Any) -> None:
        ids, codes, scales, bits = _get_inputs(context, node, expected=4)
        y = mb.gather(x=weight(codes, scales, bits), indices=ids, axis=0)
        context.add(mb.cast(x=y, dtype="fp32", name=node.name), torch_name=node.name)

    def choose(context: Any, node: Any) -> None:
        cond, a, b = _get_inputs(context, node, expected=3)
        other = mb.const(val=np.float32(np.clip(b.val, UNSEEN, -UNSEEN)))
        context.add(mb.select(cond=cond, a=a, b=other, name=node.name), torch_name=node.name)

    def pass_on(context: Any, node: Any) -> None:
        context.add(_get_inputs(context, node)[0], torch_name=node.name)

    register_torch_op(product, torch_alias=["lime_edge::code_product"], override=True)
    register_torch_op(rows, torch_alias=["lime_edge::code_rows"], override=True)
    register_torch_op(choose, torch_alias=["where.scalarother"], override=True)
    register_torch_op(pass_on, torch_alias=["alias"], override=True)


class CodeProduct(nn.Module):
    """A product over the compiler's integers."""

    def __init__(self, stored: QuantizedTensor, bias: Tensor | None):
        super().__init__()
        self.bits, self.bias = stored.bits, bias
        self.codes, self.scales = nn.Buffer(stored.codes), nn.Buffer(stored.scales)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return torch.ops.lime_edge.code_product(x, self.codes, self.scales, self.bias, self.bits)


class CodeTable(nn.Module):
    """Rows of a table of the compiler's integers."""

    def __init__(self, stored: QuantizedTensor):
        super().__init__()
        self.bits = stored.bits
        self.codes, self.scales = nn.Buffer(stored.codes), nn.Buffer(stored.scales)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) to (..., H)."""
        return torch.ops.lime_edge.code_rows(ids, self.codes, self.scales, self.bits)


def pack_product(product: StoredProduct | StoredTable) -> nn.Module:
    """A layer's product over integers; float32 ones stay."""
    stored: Stored = product.stored
    if not isinstance(stored, QuantizedTensor):
        return product
    return CodeTable(stored) if isinstance(product, StoredTable) else CodeProduct(stored, product.bias)


def convert(
    module: EncoderModule, lengths: tuple[int, ...] | None, longest: int, takes_expert: bool, minimum: Any
) -> Any:
    """One function as a coremltools model.

    Args:
        lengths: enumerated, with a batch of one; None routes, and takes any length and batch.
        longest: tokens of the longest text; not read for pixels.
    Raises:
        LimeEdgeError: torch or coremltools refuses the model.
    """
    _register()
    sample = [t.int() if t.dtype == torch.int64 else t for t in make_sample(module.inputs).values()]
    sample = sample if lengths is None else [tensor[:1] for tensor in sample]
    sizes = {
        "batch": torch.export.Dim("batch", min=1, max=BATCH),
        "sequence": torch.export.Dim("sequence", min=1, max=longest),
    }
    if lengths is not None:
        sizes.pop("batch")
    axes: list[Any] = [{i: sizes[n] for i, n in enumerate(entry.shape) if n in sizes} for entry in module.inputs]
    inputs = [describe_input(entry, lengths, longest) for entry in module.inputs]
    if takes_expert:
        sample, axes = [*sample, torch.zeros(module.sites.total)], [*axes, None]
        inputs.append(ct.TensorType(EXPERT, (module.sites.total,), np.float16))
    traced = Traced(module, takes_expert, routed=lengths is None)
    try:
        with torch.no_grad():
            program = torch.export.export(traced, tuple(sample), dynamic_shapes=(tuple(axes),))
        return ct.convert(
            program.run_decompositions({}),
            inputs=inputs,
            minimum_deployment_target=minimum,
            outputs=[ct.TensorType(name, dtype=np.float16) for name in module.outputs],
            skip_model_load=True,
        )
    except (NotImplementedError, ValueError, RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LimeEdgeError(
            f"Core ML export: {type(module.model).__name__} cannot be converted: {first}",
            "`target=onnx` takes every encoder",
        ) from error


def describe_input(entry: Input, lengths: tuple[int, ...] | None, longest: int) -> Any:
    """An input as coremltools is told of it."""
    dtype = np.int32 if entry.dtype == "int64" else np.float16
    if lengths is None:
        ranges = {"batch": ct.RangeDim(1, BATCH), "sequence": ct.RangeDim(1, longest)}
        shape = [ranges[size] if isinstance(size, str) else size for size in entry.shape]
        return ct.TensorType(entry.name, ct.Shape(shape), dtype)
    if "sequence" not in entry.shape:
        return ct.TensorType(entry.name, (1, *entry.shape[1:]), dtype)
    if len(lengths) == 1:  # coremltools enumerates two shapes at least
        return ct.TensorType(entry.name, (1, *lengths), dtype)
    return ct.TensorType(entry.name, ct.EnumeratedShapes([(1, length) for length in lengths]), dtype)


def join(parts: list[Path], path: Path) -> None:
    """One package of all functions, weights stored once."""
    if len(parts) == 1:
        parts[0].rename(path)
        return
    functions = ct.utils.MultiFunctionDescriptor()
    for part in parts:
        functions.add_function(str(part), src_function_name="main", target_function_name=part.stem)
    functions.default_function_name = MAIN
    ct.utils.save_multifunction(functions, str(path))
