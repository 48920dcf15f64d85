"""From torch modules to a .aimodel: trace, convert, save."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lime_edge.errors import LimeEdgeError, need
from lime_edge.exporters.silence import silence

try:
    with silence():  # it warns of torch's own build for processors
        from coreai.runtime import AIModelAssetMetadata
        from coreai_torch import TorchConverter, get_decomp_table
except ImportError as error:  # pragma: no cover - exercised in a bare environment
    raise need((error.name or "coreai_torch").split(".")[0], "coreai") from error

FILE = "model.aimodel"
MAIN, ROUTED = "main", "routed"
PROVIDERS = ("CoreAI", "CoreAI-interpreter")
OLDEST = "iOS27"  # and macOS 27: the first that have Core AI
NOTES = (  # what others have reported of it; nobody has run our files on a device
    "apple/coreai-models#279: int8 weights in blocks gave silently wrong numbers on the Neural Engine: prefer the GPU",
    "apple/coreai-models#205: int4 weights run on the GPU only",
    "apple/coreai-models#124: wrong answers on iPhones with caches of 2,048 tokens and more: stay at 1,024",
)


@dataclass(frozen=True)
class Function:
    """One function to write.

    module: traced; its arguments are the inputs, in order. inputs: example tensors by name. outputs: names.
    states: names of the inputs that are written in place. axes: by input, {axis: (name, largest)} of those that vary;
    the others are fixed.
    """

    module: nn.Module
    inputs: Mapping[str, torch.Tensor]
    outputs: Sequence[str]
    states: Sequence[str] = ()
    axes: Mapping[str, Mapping[int, tuple[str, int]]] = field(default_factory=dict)


def write_program(functions: Mapping[str, Function], path: Path, metadata: Mapping[str, str]) -> None:
    """Write the functions as one .aimodel; equal constants are stored once.

    Args:
        functions: by name. path: .aimodel, does not exist. metadata: for people, in the file.
    Raises:
        LimeEdgeError: torch or coreai-torch refuses a module.
    """
    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    converter.register_torch_lowering("lime_edge::put_rows.default")(lower_put_rows)
    with silence(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        for name, function in functions.items():
            try:
                trace(converter, name, function)
            except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
                raise refuse(function, error) from error
        try:
            program = converter.to_coreai()
        except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
            raise refuse(next(iter(functions.values())), error) from error
        program.save_asset(path, describe(metadata))


def trace(converter: Any, name: str, function: Function) -> None:
    """Hand one function to the converter."""
    sizes = {size: torch.export.Dim(size[0], min=1, max=size[1]) for size in list_sizes(function)}
    shapes = [
        {axis: sizes[size] for axis, size in function.axes[entry].items()} if function.axes.get(entry) else None
        for entry in function.inputs
    ]
    whole = (tuple(shapes),) if takes_any(function.module) else tuple(shapes)
    program = torch.export.export(function.module, tuple(function.inputs.values()), dynamic_shapes=whole)
    converter.add_exported_program(
        program.run_decompositions(get_decomp_table()),
        input_names=[entry for entry in function.inputs if entry not in function.states],
        state_names=list(function.states),
        output_names=list(function.outputs),
        entrypoint_name=name,
    )


def list_sizes(function: Function) -> set[tuple[str, int]]:
    """Every axis that varies."""
    return {size for varying in function.axes.values() for size in varying.values()}


def takes_any(module: nn.Module) -> bool:
    """Whether its forward is `*tensors`, which torch.export takes as one argument."""
    return bool(module.forward.__code__.co_flags & 0x04)


def lower_put_rows(values: dict[str, Any], node: Any, location: Any) -> Any:
    """program.put_rows as coreai.slice_update."""
    from coreai._compiler.dialects import coreai  # cannot be imported before coreai_torch

    cache, rows, start, stop = (values[argument.name] for argument in node.args[:4])
    layer, (_, batch, heads, _, width) = node.args[4], cache.type.shape
    begin = coreai.concat(0, [[layer, 0, 0], start, [0]], loc=location)
    end = coreai.concat(0, [[layer + 1, batch, heads], stop, [width]], loc=location)
    return coreai.slice_update(cache, begin, end, [1] * 5, rows, loc=location)


def refuse(function: Function, error: Exception) -> LimeEdgeError:
    """What the converter said."""
    module = type(getattr(function.module, "model", function.module)).__name__
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return LimeEdgeError(f"Core AI export: {module} cannot be converted: {first}", "`target=onnx` takes every model")


def describe(metadata: Mapping[str, str]) -> Any:
    """The file's own metadata: Core AI's fields, the rest with a prefix."""
    found = AIModelAssetMetadata()
    found.author, found.license = "lime_edge", "that of the backbone and of the adapter"
    found.model_description = metadata["description"]
    for name, value in metadata.items():
        found.set_custom(f"lime_edge.{name}", value)
    return found


def describe_versions() -> dict[str, str]:
    """The packages that wrote the file."""
    return {name: version(name) for name in ("coreai-core", "coreai-torch")}


def measure(path: Path) -> int:
    """Bytes of the file, which is a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
