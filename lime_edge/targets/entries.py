"""Every target: what its exporter may be told, and its entry. A new one is added here and in its two folders."""

from __future__ import annotations

from dataclasses import dataclass

from lime_edge.errors import LimeEdgeError
from lime_edge.targets.target import Target, option

STATIC = "Targets with a static cache"
CACHE = "tokens the cache holds (Core ML: x32)"
ACTIVATIONS = ("float32", "float16")


def read_lengths(text: str) -> tuple[int, ...]:
    """ "32,128" to (32, 128).

    Raises:
        LimeEdgeError: not positive integers.
    """
    try:
        lengths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        lengths = ()
    if not lengths or lengths[0] < 1:
        raise LimeEdgeError(f"`prompt_lengths`: expected positive integers, found {text!r}", "for example 32,128")
    return lengths


@dataclass(frozen=True)
class OnnxOptions:
    """How to write ONNX graphs.

    activations: "float32", or "float16" for GPUs, whose attention kernel takes nothing wider; integers, vectors and
    logits are the same in both.
    """

    activations: str = option(
        "float32", "float32, or float16 for GPUs; the device's own by default", words=ACTIVATIONS, of_device=True
    )

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise LimeEdgeError(
                f"`activations`: expected {' or '.join(ACTIVATIONS)}, found {self.activations!r}",
                "float16 is for GPUs; processors compute in float32",
            )


@dataclass(frozen=True)
class ExecutorchOptions:
    """How to write a .pte.

    max_seq_len: tokens of the static cache; the model's context where that is less. backend: what the graph is
    delegated to. stock_runner: also offer `set_expert`, for runners that pass tokens and position only.
    """

    max_seq_len: int = option(1024, CACHE, least=1)
    backend: str = option("xnnpack", "xnnpack, or portable (no delegate)")
    stock_runner: bool = option(False, "add set_expert, for runners that pass tokens only")


@dataclass(frozen=True)
class CoremlOptions:
    """How to write a .mlpackage.

    max_seq_len: tokens of the static cache, at least 1. prompt_lengths: enumerated input lengths besides 1 (decode).
    compute_units: "all", "cpu_and_ne", "cpu_and_gpu" or "cpu_only". minimum_os: oldest system, "iOS18" or "macOS15";
    newer ones run the same package.
    """

    max_seq_len: int = option(1024, CACHE, least=1)
    prompt_lengths: tuple[int, ...] = option((32, 128), "enumerated prompt lengths", read=read_lengths)
    compute_units: str = option("all", "all, cpu_and_ne, cpu_and_gpu or cpu_only")
    minimum_os: str = option("iOS18", "oldest system, iOS18 or macOS15")


TARGETS = {
    target.name: target
    for target in (
        Target("onnx", "ONNX", "onnx", OnnxOptions),
        Target("executorch", "ExecuTorch", "executorch", ExecutorchOptions, panel=STATIC),
        Target("coreml", "Core ML", "coreml", CoremlOptions, panel=STATIC),
    )
}
