"""From a target's name to its entry, and from there, by name, to what writes and what runs it.

Nothing else imports an exporter or a runtime. Each of a target's two folders has a module `entry`:

    exporters/FOLDER/entry.py   WRITERS: kind of model -> write(compiled, directory, options, progress), which gives the
                                target's facts for the manifest; check_options(kind, options, quant, group); where it
                                has companions, COMPANIONS: name -> check(kind, options), write(compiled, stage,
                                manifest), which gives the manifest's `Companion`; weigh_matrix(rows, columns, bits,
                                group, table): bytes it stores of a quantized matrix
    runtimes/FOLDER/entry.py    ENGINES: kind of model -> engine(bundle, session options)
    runtimes/FOLDER/health.py   examine(): what is known without the engine; maybe explain_operators()
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lime_edge.errors import LimeEdgeError
from lime_edge.targets.entries import TARGETS
from lime_edge.targets.target import Target

EXPORTERS, RUNTIMES = "lime_edge.exporters", "lime_edge.runtimes"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exporter:
    """What writes one kind of model for one target, with what it was told, and the companions that are wanted there."""

    target: Target
    options: Any
    writer: Callable[[Any, Path, Any, Progress], dict[str, Any]]
    companions: Mapping[str, Callable[[Any, Path, Any], Any]]
    weigh_matrix: Callable[[int, int, int, int, bool], int] | None = None

    def write(self, compiled: Any, directory: Path, progress: Progress) -> dict[str, Any]:
        """Write the artifact.

        Args:
            compiled: its integers are only re-packed. directory: exists, empty.
            progress: called with (step, done, total).
        Returns:
            The target's facts for the manifest.
        Raises:
            LimeEdgeError: a model that the target cannot hold.
        """
        return self.writer(compiled, directory, self.options, progress)

    def write_companions(self, compiled: Any, stage: Path, manifest: Any) -> dict[str, Any]:
        """Write what other engines want beside the artifact.

        Args:
            stage: the bundle, its artifacts and tokenizer in it. manifest: without experts and files.
        Returns:
            The manifest's `Companion` by name.
        Raises:
            LimeEdgeError: a model that the other engine does not run.
        """
        return {name: write(compiled, stage, manifest) for name, write in self.companions.items()}


def find_target(name: str) -> Target:
    """A target's entry.

    Raises:
        LimeEdgeError: no such target.
    """
    if name not in TARGETS:
        raise LimeEdgeError(
            f"target: expected {', '.join(TARGETS)}, found {name!r}", "`target` may name several; onnx runs everywhere"
        )
    return TARGETS[name]


def load_exporters(
    names: Sequence[str],
    options: Mapping[str, Any],
    quant: str,
    group: int,
    kind: str,
    companions: Sequence[str] = (),
) -> dict[str, Exporter]:
    """The exporters of the wanted targets, each once, after they have looked at what they are told.

    Called before anything is read or compiled: a wrong option is said in the first second. Needs the packages of a
    workstation.

    Args:
        options: by target; its defaults where there is nothing. kind: of model, its name.
        companions: names of what is wanted beside the artifacts.
    Raises:
        LimeEdgeError: no such target or companion, missing packages, a kind of model or options that a target does not
            take.
    """
    targets = [find_target(name) for name in dict.fromkeys(names)]
    offered = [companion for target in targets for companion in target.companions]
    for companion in companions:
        if companion not in offered:
            known = ", ".join(offered) or f"none with target {', '.join(names)}"
            raise LimeEdgeError(f"`companion`: expected {known}, found {companion!r}", "leave it out")
    return {one.name: _load_exporter(one, options.get(one.name), quant, group, kind, companions) for one in targets}


def _load_exporter(
    target: Target, options: Any, quant: str, group: int, kind: str, companions: Sequence[str]
) -> Exporter:
    entry = importlib.import_module(f"{EXPORTERS}.{target.folder}.entry")
    if kind not in entry.WRITERS:
        known = " and ".join(f"{name}s" for name in entry.WRITERS)
        raise LimeEdgeError(f"{target.title} holds {known}, and this model is a {kind} model", "take another target")
    told = target.options() if options is None else options
    entry.check_options(kind, told, quant, group)
    writers = {}
    for name in target.companions:
        if name in companions:
            check, writers[name] = entry.COMPANIONS[name]
            check(kind, told)
    return Exporter(target, told, entry.WRITERS[kind], writers, getattr(entry, "weigh_matrix", None))


def load_runtime(target: Target, module: str) -> ModuleType:
    """`entry` or `health` of a target's runtime.

    Raises:
        LimeEdgeError: the engine's package is missing (`entry` only).
    """
    return importlib.import_module(f"{RUNTIMES}.{target.folder}.{module}")
