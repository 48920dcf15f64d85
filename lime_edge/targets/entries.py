"""Every target: what its exporter may be told, what lime.json says of its artifact, and its entry.

A new one is added here and in its two folders (docs/add-a-target.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lime_edge.errors import LimeEdgeError
from lime_edge.targets.facts import Limits, TargetFacts
from lime_edge.targets.target import Target, option
from lime_edge.targets.values import FilePath, Text, Tokens

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


def check_activations(activations: str) -> None:
    """Refuse another word.

    Raises:
        LimeEdgeError: not one of ACTIVATIONS.
    """
    if activations not in ACTIVATIONS:
        raise LimeEdgeError(
            f"`activations`: expected {' or '.join(ACTIVATIONS)}, found {activations!r}",
            "float16 is for GPUs; processors compute in float32",
        )


@dataclass(frozen=True)
class OnnxOptions:
    """How to write ONNX graphs.

    activations: "float32", or "float16" for GPUs, whose attention kernel takes nothing wider; integers, vectors and
    logits are the same in both.
    """

    activations: str = option(
        "float32",
        "float32, or float16 for GPUs; by default the device's own, for Core AI float16",
        words=ACTIVATIONS,
        of_device=True,
    )

    def __post_init__(self) -> None:
        check_activations(self.activations)


class OnnxFacts(TargetFacts, frozen=True, tag_field="target", tag="onnx", kw_only=True):
    """ONNX Runtime's artifact."""

    opset: Annotated[int, Meta(ge=1, le=1000)]
    functions: Annotated[
        tuple[Text, ...], Meta(max_length=64, description="of the domain lime_edge that the graph calls")
    ] = ()


@dataclass(frozen=True)
class ExecutorchOptions:
    """How to write a .pte.

    max_seq_len: tokens of the static cache; the model's context where that is less. backend: what the graph is
    delegated to. stock_runner: also offer `set_expert`, for runners that pass tokens and position only.
    """

    max_seq_len: int = option(1024, CACHE, least=1)
    backend: str = option("xnnpack", "xnnpack, or portable (no delegate)")
    stock_runner: bool = option(False, "add set_expert, for runners that pass tokens only")


class ExecutorchFacts(TargetFacts, frozen=True, tag_field="target", tag="executorch", kw_only=True):
    """ExecuTorch's artifact."""

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "decoder": ("layers", "max_length", "prompt_length", "rows"),
        "encoder": ("inputs", "outputs", "limits"),
    }
    routed: Annotated[Literal["routed"] | None, Meta(description="the method that routes, of the same file")] = None

    backend: Text
    max_length: Annotated[Tokens | None, Meta(description="tokens of the cache, virtual ones not counted")] = None
    prompt_length: Annotated[Tokens | None, Meta(description="most tokens of one call")] = None
    rows: Annotated[Tokens | None, Meta(description="most positions whose logits one call gives")] = None
    stock: Annotated[FilePath | None, Meta(description="the program for stock runners")] = None
    limits: Limits | None = None

    def list_paths(self) -> list[str]:
        """The program, and the one for stock runners where there is one."""
        return super().list_paths() + ([self.stock] if self.stock else [])


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


class CoremlFacts(TargetFacts, frozen=True, tag_field="target", tag="coreml", kw_only=True):
    """Core ML's artifact."""

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "decoder": ("layers", "max_length", "lengths"),
        "encoder": ("inputs", "outputs"),
    }
    routed: Annotated[Literal["routed"] | None, Meta(description="the function that routes, of the same file")] = None

    minimum: Annotated[Literal["iOS18", "macOS15"], Meta(description="oldest system")]
    compute_units: Literal["all", "cpu_and_ne", "cpu_and_gpu", "cpu_only"]
    max_length: Annotated[Tokens | None, Meta(description="rows of the cache")] = None
    lengths: Annotated[tuple[Tokens, ...], Meta(max_length=64, description="token counts that a call may have")] = ()


@dataclass(frozen=True)
class CoreaiOptions:
    """How to write a .aimodel.

    max_seq_len: tokens of the static cache, the model's context where that is less; iPhones are reported to answer
    wrongly from 2,048 on. prompt_lengths: lengths of calls besides 1 (decode), a function for each. activations:
    "float16", or "float32": twice as large, and what proves the numbers where the engine computes exactly.
    """

    max_seq_len: int = option(1024, CACHE, least=1)
    prompt_lengths: tuple[int, ...] = option((32, 128), "enumerated prompt lengths", read=read_lengths)
    activations: str = option("float16", "float16, or float32 to prove the numbers", words=ACTIVATIONS)

    def __post_init__(self) -> None:
        check_activations(self.activations)


class CoreaiFacts(TargetFacts, frozen=True, tag_field="target", tag="coreai", kw_only=True):
    """Core AI's artifact."""

    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "decoder": ("layers", "max_length", "lengths"),
        "encoder": ("inputs", "outputs"),
    }
    routed: Annotated[Literal["routed"] | None, Meta(description="the functions that route, of the same file")] = None

    minimum: Annotated[Literal["iOS27"], Meta(description="oldest system; macOS 27 is the same")]
    compute_unit: Annotated[Literal["gpu", "cpu", "neural_engine"], Meta(description="to prefer")]
    max_length: Annotated[Tokens | None, Meta(description="rows of the cache")] = None
    lengths: Annotated[
        tuple[Tokens, ...], Meta(max_length=64, description="tokens of a call: each has a function, main_32")
    ] = ()


TARGETS = {
    target.name: target
    for target in (
        Target(
            "ONNX",
            "onnx",
            OnnxOptions,
            OnnxFacts,
            companions={"genai": "ONNX Runtime GenAI"},
            packages=("onnxruntime", "onnxruntime-gpu"),
        ),
        Target("ExecuTorch", "executorch", ExecutorchOptions, ExecutorchFacts, STATIC, packages=("executorch",)),
        Target("Core ML", "coreml", CoremlOptions, CoremlFacts, STATIC, packages=("coremltools",)),
        Target("Core AI", "coreai", CoreaiOptions, CoreaiFacts, STATIC, packages=("coreai-core",)),
    )
}
DEFAULT = next(iter(TARGETS))  # where nobody says another


def list_packages() -> list[str]:
    """The packages of all engines."""
    return [package for target in TARGETS.values() for package in target.packages]
