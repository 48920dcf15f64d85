"""What a target's exporter may be told, one class a target. No heavy imports: the command line builds these."""

from __future__ import annotations

from dataclasses import dataclass, field

from lime_edge.errors import LimeEdgeError


@dataclass(frozen=True)
class OnnxOptions:
    """How to write ONNX graphs.

    activations: "float32", or "float16" for GPUs, whose attention kernel takes nothing wider; integers, vectors and
    logits are the same in both.
    """

    activations: str = "float32"

    def __post_init__(self) -> None:
        if self.activations not in ("float32", "float16"):
            raise LimeEdgeError(
                f"activations: expected float32 or float16, found {self.activations!r}",
                "float16 is for GPUs; processors compute in float32",
            )


@dataclass(frozen=True)
class ExecutorchOptions:
    """How to write a .pte.

    max_length: tokens of the static cache; the model's context where that is less. backend: what the graph is
    delegated to. stock_runner: also offer `set_expert`, for runners that pass tokens and position only.
    """

    max_length: int = 1024
    backend: str = "xnnpack"
    stock_runner: bool = False


@dataclass(frozen=True)
class CoremlOptions:
    """How to write a .mlpackage.

    max_length: tokens of the static cache, at least 1. prompt_lengths: enumerated input lengths besides 1 (decode).
    compute_units: "all", "cpu_and_ne", "cpu_and_gpu" or "cpu_only". minimum: oldest system, "iOS18" or "macOS15";
    newer ones run the same package.
    """

    max_length: int = 1024
    prompt_lengths: tuple[int, ...] = (32, 128)
    compute_units: str = "all"
    minimum: str = "iOS18"


@dataclass(frozen=True)
class TargetOptions:
    """Every target's options; an exporter reads its own."""

    executorch: ExecutorchOptions = field(default_factory=ExecutorchOptions)
    coreml: CoremlOptions = field(default_factory=CoremlOptions)
    onnx: OnnxOptions = field(default_factory=OnnxOptions)
