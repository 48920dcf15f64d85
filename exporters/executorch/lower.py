"""From modules to a .pte file: trace, delegate, plan memory, write; and what fell off the delegate."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import XNNPACKPassManager
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from torch import Tensor, nn

from lime_edge.errors import EXIT_MISSING, LimeEdgeError
from lime_edge.exporters.silence import silence

Progress = Callable[[str, int, int], None]
STEPS = 4  # trace, delegate, plan, write
STEP = "executorch"
HOT = ("linear", "addmm", "mul", "add", "sub", "rsqrt", "sigmoid", "gelu", "bmm", "_softmax", "affine")
PROVIDERS = {"xnnpack": "XnnpackBackend", "portable": "portable"}
MISSING = {
    "qnn": "Qualcomm's QNN SDK",
    "qualcomm": "Qualcomm's QNN SDK",
    "openvino": "Intel's OpenVINO and nncf",
    "mediatek": "MediaTek's NeuroPilot SDK",
    "ethos-u": "Arm's Vela and TOSA tools",
    "arm": "Arm's Vela and TOSA tools",
    "cuda": "NVIDIA's CUDA toolkit",
    "mps": "Apple's macOS",
    "mlx": "Apple's MLX",
    "samsung": "Samsung's Exynos SDK",
    "cadence": "Cadence's Xtensa tools",
    "nxp": "NXP's eIQ toolkit",
}


# Each of XNNPACK's 17 passes traces its subgraph anew, which takes most of the time of delegating. Of these, each
# changes nothing unless the subgraph has an operator whose name holds one of the words.
IMAGES = ("convolution", "batch_norm", "pool", "upsample", "prelu", "pad")
PASSES: dict[str, tuple[str, ...]] = {
    "DimOrderOpsRevertPass": ("dim_order",),
    "ConvertToUpsampleBilinear2d": IMAGES,
    "ConvertToSDPAPass": ("softmax", *IMAGES),
    "ConvertToLinearPass": ("addmm", ".mm.", "bmm"),
    "PropagateCustomMetaPass": (),
    "FuseBatchNormPass": IMAGES,
    "ConstPropPass": ("permute", "t_copy", "transpose", "_to_", *IMAGES),
    "DecomposeBatchNorm": IMAGES,
    "FuseActivationPass": ("relu", "hardtanh", "clamp", *IMAGES),
    "DecomposeConcatenate": ("cat",),
    "RemoveGetItemPass": ("max", *IMAGES),
    "InsertPadQDQPass": IMAGES,
    "Conv1dUnsqueezePass": IMAGES,
    "PReLUReshapePass": IMAGES,
    "ChannelsLastTaggedReshapePass": IMAGES,
    "RemoveRedundantCopyPass": ("copy", *IMAGES),
}


class NeededPasses(XNNPACKPassManager):
    """XNNPACK's passes, without those that would find nothing to do in a subgraph."""

    def __init__(self, exported_program: Any, passes: Any = None):
        super().__init__(exported_program, passes)
        chosen: list[Any] = self.passes  # type: ignore[has-type]
        calls = " ".join(str(node.target) for node in exported_program.graph.nodes if node.op == "call_function")
        calls = calls.replace("view_copy", "")
        self.passes = [
            kept
            for kept in chosen
            if kept.__name__ not in PASSES or any(word in calls for word in PASSES[kept.__name__])
        ]


@contextmanager
def skip_idle_passes() -> Iterator[None]:
    """Lower with NeededPasses."""
    before = xnnpack_preprocess.XNNPACKPassManager
    xnnpack_preprocess.XNNPACKPassManager = NeededPasses
    try:
        yield
    finally:
        xnnpack_preprocess.XNNPACKPassManager = before


class DirectPartitioner(XnnpackPartitioner):
    """XNNPACK's partitioner for graphs of which it takes every operator that it lists.

    Without its check of single nodes ExecuTorch decomposes the whole graph once instead of three times. An
    operator that is listed and not taken is an error when memory is planned.
    """

    def ops_to_not_decompose(self, exported_program: Any) -> Any:
        """The listed operators, and no check."""
        return super().ops_to_not_decompose(exported_program)[0], None


@dataclass(frozen=True)
class Method:
    """One method of a program: its module, example inputs, and their dynamic axes."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    shapes: tuple[Any, ...]


@dataclass(frozen=True)
class Delegation:
    """How much of a method the backend took: operators, subgraphs; hot ones that it should have taken, by name."""

    delegated: int
    undelegated: int
    subgraphs: int
    fallen: dict[str, int] = field(default_factory=dict)


def check_backend(name: str, quant: str) -> str:
    """The provider's name of a backend that is offered here.

    Args:
        quant: of the model; the portable kernels multiply float32 only.
    Raises:
        LimeEdgeError: its SDK is missing, its result could not be checked, or there is no such backend.
    """
    if name == "portable" and quant != "none":
        raise LimeEdgeError(
            f"`backend=portable`: expected `quant=none`, found {quant}", "the portable kernels multiply float32 only"
        )
    if name in PROVIDERS:
        return PROVIDERS[name]
    known = " or ".join(PROVIDERS)
    if name in MISSING:
        raise LimeEdgeError(
            f"`backend={name}` needs {MISSING[name]}, which is not installed",
            f"backends that work here: {known}",
            EXIT_MISSING,
        )
    if name == "coreml":
        raise LimeEdgeError(
            "`backend=coreml`: Core ML through ExecuTorch takes no dynamic prompt length",
            "`target=coreml` writes a Core ML package",
            EXIT_MISSING,
        )
    if name == "vulkan":
        raise LimeEdgeError(
            "`backend=vulkan` needs a device with Vulkan to check the result",
            f"backends that work here: {known}",
            EXIT_MISSING,
        )
    raise LimeEdgeError(f"`backend`: expected {known}, found {name!r}", "xnnpack is what phones run; leave it out")


def lower(
    methods: Mapping[str, Method],
    backend: str,
    constants: Mapping[str, Any],
    file: Path,
    progress: Progress,
    initialised: tuple[str, ...] = (),
) -> dict[str, Delegation]:
    """Write one .pte with these methods; they share weights, and mutable buffers of the same name.

    Args:
        backend: a key of PROVIDERS. constants: method name -> value of constant methods. progress: called with
            (step, done, total). initialised: parts of the names of mutable buffers that start as they are.
    Returns:
        Per method what was delegated.
    Raises:
        LimeEdgeError: ExecuTorch refuses the model.
    """
    shared = len(methods) > 1
    name = f"{STEP} {file.stem}"
    try:
        with silence(), skip_idle_passes():
            progress(name, 0, STEPS)
            programs = {key: trace(method) for key, method in methods.items()}
            progress(name, 1, STEPS)
            partitioners: list[Any] = [DirectPartitioner()] if backend == "xnnpack" else []
            lowered = to_edge_transform_and_lower(
                programs,
                partitioner={key: partitioners for key in programs},
                constant_methods=dict(constants),
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            progress(name, 2, STEPS)
            counts = {key: count_delegation(lowered, key, backend) for key in methods}
            program = lowered.to_executorch(
                ExecutorchBackendConfig(
                    passes=[InitializedMutableBufferPass(list(initialised))] if initialised else [],
                    memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=shared),
                    emit_mutable_buffer_names=shared,
                    do_quant_fusion_and_const_prop=False,
                )
            )
            progress(name, 3, STEPS)
            with file.open("wb") as out:
                program.write_to_file(out)
    except OSError:
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LimeEdgeError(f"ExecuTorch export: the model cannot be lowered to {backend}: {first}") from error
    progress(name, STEPS, STEPS)
    return counts


def trace(method: Method) -> torch.export.ExportedProgram:
    """torch.export of one method."""
    with torch.no_grad():
        return torch.export.export(method.module.eval(), method.inputs, dynamic_shapes=method.shapes, strict=False)


def count_delegation(lowered: EdgeProgramManager, method: str, backend: str) -> Delegation:
    """Count a method's operators in and outside the delegate.

    The arithmetic of float tensors is hot: on this path everything of HOT should have been taken.
    """
    inside, outside, graphs = 0, 0, 0
    fallen: Counter[str] = Counter()
    for node in lowered.exported_program(method).graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if node.target is torch.ops.higher_order.executorch_call_delegate:
            graphs += 1
            held = getattr(lowered.exported_program(method).graph_module, node.args[0].name)
            calls = [n for n in held.original_module.graph.nodes if n.op == "call_function"]
            inside += sum(n.target is not operator.getitem for n in calls)
            continue
        outside += 1
        value, label = node.meta.get("val"), str(getattr(node.target, "__name__", node.target))
        if isinstance(value, Tensor) and value.is_floating_point() and is_hot(label):
            fallen[label.removeprefix("aten.")] += 1
    return Delegation(inside, outside, graphs, dict(fallen) if backend != "portable" else {})


def is_hot(label: str) -> bool:
    """Whether an operator's name ("aten.mul.Tensor") is one that the delegate should have taken."""
    parts = label.split(".")
    return any(part in HOT or part.endswith("_affine") for part in parts)
