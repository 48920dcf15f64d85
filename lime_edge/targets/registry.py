"""Targets: the one dict that maps a target to its exporter and its runtime."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from lime_edge.errors import LimeEdgeError
from lime_edge.targets.options import TargetOptions

TARGETS = {
    "onnx": "onnx",  # key -> folder in lime_edge.exporters and lime_edge.runtimes
    "executorch": "executorch",
    "coreml": "coreml",
}


def check_target(target: str) -> str:
    """The module name of a target.

    Raises:
        LimeEdgeError: no such target.
    """
    if target not in TARGETS:
        raise LimeEdgeError(
            f"target: expected {', '.join(TARGETS)}, found {target!r}", "--target may be repeated; onnx runs everywhere"
        )
    return TARGETS[target]


def load_exporter(target: str, kind: str = "decoder") -> ModuleType:
    """lime_edge.exporters.<target>: needs the packages of a workstation.

    Args:
        kind: "decoder" for language models, "encoder" for encoders.
    Raises:
        LimeEdgeError: no such target, or its packages are missing.
    """
    return importlib.import_module(f"lime_edge.exporters.{check_target(target)}.{kind}")


def load_exporters(
    targets: Sequence[str], options: TargetOptions, quant: str, group: int, kind: str = "decoder"
) -> dict[str, ModuleType]:
    """The exporters of the wanted targets, each once, after they have looked at what they are told.

    Called before anything is read or compiled: a wrong option is said in the first second.

    Raises:
        LimeEdgeError: no such target, missing packages, or options that a target does not take.
    """
    exporters = {target: load_exporter(target, kind) for target in dict.fromkeys(targets)}
    for exporter in exporters.values():
        exporter.check_options(options, quant, group)
    return exporters
