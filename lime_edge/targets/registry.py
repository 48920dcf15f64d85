"""Targets: the one dict that maps a target to its exporter and its runtime."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session, SessionOptions
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


def open_session(bundle: Bundle, target: str | None = None, options: SessionOptions | None = None) -> Session:
    """Load a language model's artifact for one target.

    Args:
        target: None takes the bundle's first.
    Raises:
        LimeEdgeError: the bundle was not exported for it, or its engine is missing.
    """
    if bundle.manifest.model.get("kind") == "encoder":
        raise LimeEdgeError(
            f"{bundle.path} holds an encoder: it answers no prompts", "call lime_edge.open(BUNDLE).run(**inputs)"
        )
    target, runtime = load_runtime(bundle, target)
    bank = bundle.open_bank()
    return Session(bundle, runtime.open_engine(bundle, options or SessionOptions()), bank, target)


def load_runtime(bundle: Bundle, target: str | None, kind: str = "decoder") -> tuple[str, ModuleType]:
    """The target that is meant and its lime_edge.runtimes module.

    Args:
        target: None takes the bundle's first. kind: "decoder" for language models, "encoder" for encoders.
    Raises:
        LimeEdgeError: no such target, or the bundle was not exported for it.
    """
    present = tuple(bundle.manifest.targets)
    target = target or present[0]
    module = check_target(target)
    if target not in present:
        raise LimeEdgeError(f"{bundle.path}: holds no {target} artifact", f"it holds {', '.join(present)}")
    return target, importlib.import_module(f"lime_edge.runtimes.{module}.{kind}")
