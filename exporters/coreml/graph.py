"""Writing an ML program: one function after another, constants stored once, the package saved as it was written.

No optimisation pass of coremltools runs on a program written here: what is saved is what was written, operation
by operation, which is what the interpreter of the runtime then proves.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.errors import LimeEdgeError, need
from lime_edge.exporters.silence import silence

try:
    with silence():  # it warns of every package that is newer than its own tests
        import coremltools as ct
        from coremltools.converters.mil.mil import Builder as mb
        from coremltools.converters.mil.mil import Function, Program, get_new_symbol, types
except ImportError as error:  # pragma: no cover - exercised in a bare environment
    raise need((error.name or "coremltools").split(".")[0], "coreml") from error

__all__ = [
    "INT4",
    "Graph",
    "Var",
    "ct",
    "get_new_symbol",
    "mb",
    "measure_package",
    "read_minimum",
    "save_package",
    "scale",
    "silent",
    "spell",
    "types",
]
MINIMUM = {"iOS18": "iOS18", "macOS15": "iOS18"}  # state and blockwise weights: nothing older holds them
INT4 = types.nptype_from_builtin(types.int4)
Var = Any  # coremltools' value in a program


def read_minimum(name: str) -> Any:
    """coremltools' word for the oldest system.

    Raises:
        LimeEdgeError: not one of MINIMUM.
    """
    if name not in MINIMUM:
        raise LimeEdgeError(
            f"`minimum_os`: expected {' or '.join(MINIMUM)}, found {name!r}",
            "newer systems run what is written for iOS18; older ones hold neither a cache as state nor int4 groups",
        )
    return getattr(ct.target, MINIMUM[name])


class Graph:
    """The functions of one program. Constants of the same name are the same bytes, across functions too."""

    def __init__(self, minimum: str):
        self.target = read_minimum(minimum)
        self.program = Program()
        self._made: dict[str, Var] = {}  # of the function being written
        self._path = ""

    def write_function(
        self,
        name: str,
        inputs: Mapping[str, Any],
        shapes: Sequence[ct.TensorType],
        body: Callable[..., Sequence[tuple[str, Var]]],
    ) -> None:
        """Write one function.

        Args:
            inputs: placeholders by name. shapes: coremltools' description of them, in the same order.
            body: called with the inputs; returns (name, value) of every output.
        """
        self._made = {}
        with Function(dict(inputs), self.target) as function:
            outputs = []
            for key, value in body(*[function.inputs[key] for key in inputs]):
                value.op.name, value.name = key, key
                outputs.append(value)
            function.set_outputs(outputs)
        function.set_input_types(tuple(shapes))
        self.program.add_function(name, function)

    def half(self, name: str, values: torch.Tensor | np.ndarray) -> Var:
        """A float16 constant; a name used before gives the same one."""
        array = values.numpy() if isinstance(values, torch.Tensor) else values
        return self.constant(name, array.astype(np.float16))

    def constant(self, name: str, array: np.ndarray) -> Var:
        """A constant as it is; a name used before gives the same one."""
        if name not in self._made:
            self._made[name] = mb.const(val=np.ascontiguousarray(array), name=spell(name))
            if array.size >= 10:
                self._made[name].op.weight_id = name
        return self._made[name]

    def matrix(self, name: str, stored: Sequence[QuantizedTensor | torch.Tensor]) -> Var:
        """Stacked matrices (N, K): the compiler's integers and scales as they are, or float16.

        Source: constexpr_blockwise_shift_scale, coremltools 9.0: output = scale * data, a scale for each block.
        """
        if name in self._made:
            return self._made[name]
        quantized = [tensor for tensor in stored if isinstance(tensor, QuantizedTensor)]
        if not quantized:
            plain = [tensor for tensor in stored if isinstance(tensor, torch.Tensor)]
            return self.half(name, torch.cat(plain))
        assert len({tensor.bits for tensor in quantized}) == 1, f"{name}: one width of codes in one product"
        codes = torch.cat([tensor.codes for tensor in quantized]).numpy()
        scales = torch.cat([tensor.scales for tensor in quantized]).numpy().astype(np.float16)
        data = mb.const(val=codes.astype(INT4 if quantized[0].bits == 4 else np.int8), name=spell(f"{name}.codes"))
        scale = mb.const(val=scales, name=spell(f"{name}.scales"))
        data.op.weight_id, scale.op.weight_id = f"{name}.codes", f"{name}.scales"
        self._made[name] = mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=spell(name))
        return self._made[name]

    def save(self, path: Path, facts: Mapping[str, str]) -> None:
        """Write the package; facts: author, license, short description and what else to keep as metadata."""
        self.program.default_function_name = "main"
        self.program.skip_all_passes = True
        self.program.export_as_multifunction = len(self.program.functions) > 1
        with silent():
            model = ct.convert(
                self.program,
                source="milinternal",
                convert_to="mlprogram",
                minimum_deployment_target=self.target,
                skip_model_load=True,
                pass_pipeline=ct.PassPipeline.EMPTY,
            )
            save_package(model, path, facts)


def save_package(model: Any, path: Path, facts: Mapping[str, str]) -> None:
    """Save a coremltools model with its metadata."""
    model.author, model.license = facts["author"], facts["license"]
    model.short_description, model.version = facts["description"], facts["version"]
    for key, value in facts.items():
        if key not in ("author", "license", "description", "version"):
            model.user_defined_metadata[f"lime_edge.{key}"] = value
    model.save(str(path))
    for file in path.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # coremltools writes one of them for its owner alone


def scale(x: Var, factor: float) -> Var:
    """x * factor, where float16 holds the factor only roughly as the sum of two products."""
    high = np.float16(factor)
    low = np.float16(factor - float(high))
    y = mb.mul(x=x, y=high)
    return y if low == 0 else mb.add(x=y, y=mb.mul(x=x, y=low))


def spell(name: str) -> str:
    """A name that an ML program takes and that no operation of the current function has."""
    plain = "".join(c if c.isalnum() else "_" for c in name)
    return plain if plain[:1].isalpha() else f"_{plain}"


def measure_package(path: Path) -> int:
    """Bytes of all files of a package."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@contextmanager
def silent() -> Iterator[None]:
    """As `silence`, coremltools' progress bars too."""
    with silence(), redirect_stderr(io.StringIO()):
        yield
