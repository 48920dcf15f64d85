"""Core ML: on a Mac through coremltools, elsewhere through the interpreter of the saved program (slow, and exact).

Prompts are cut into the lengths the package enumerates; what is left over is padded, and the padding is neither
stored nor seen.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.residual import Subtract
from lime_edge.errors import EXIT_MISSING, LimeEdgeError, need
from lime_edge.runtimes.coreml.interpreter import Interpreter, Values
from lime_edge.runtimes.coreml.program import read_package
from lime_edge.runtimes.padded import IDS, PaddedDecoder, plan_calls
from lime_edge.session.engines import SessionOptions, choose_capacity
from lime_edge.targets.entries import CoremlFacts

COREML, INTERPRETER, ROUNDED = "CoreML", "interpreter", "interpreter-fp16"  # "CoreML:cpu_only" names the units too
UNITS = {"all": "ALL", "cpu_and_ne": "CPU_AND_NE", "cpu_and_gpu": "CPU_AND_GPU", "cpu_only": "CPU_ONLY"}


class Model(Protocol):
    """One loaded package: runs its functions on one state."""

    def run(self, function: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""


class SwitchedPackage:
    """A loaded package whose expert can be switched: what language models and encoders share."""

    operators: bool | None = None  # it knows none
    subtract: Subtract | None = None  # numpy's

    def __init__(self, bundle: Bundle, options: SessionOptions):
        facts = bundle.manifest.facts_of(CoremlFacts)
        self._takes_expert, self._routed = bool(facts.expert_input), facts.routed
        self._residual = np.zeros(bundle.manifest.sites.total, np.float16)
        self._function = "main"
        self.provider = choose_provider(options.providers)
        self._model = load_package(bundle, self.provider)

    def set_expert(self, residual: np.ndarray) -> None:
        """Use d (sum_H,) float32, rounded to float16, from the next call on."""
        self._function = "main"
        self._residual = residual.astype(np.float16)

    def set_routed(self) -> None:
        """Weigh the frozen bank per token from now on."""
        assert self._routed is not None, "the session asks for it only where there is one"
        self._function = self._routed


class CoremlEngine(PaddedDecoder, SwitchedPackage):
    """A loaded package with its cache as state; implements lime_edge.session.decoder.Engine.

    Raises:
        LimeEdgeError: no Core ML where it is asked for, or a package that cannot be loaded.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        facts, model = bundle.manifest.facts_of(CoremlFacts), bundle.manifest.backbone
        self._virtual = facts.virtual_tokens  # in the cache before everything else
        assert facts.max_length, "the manifest is checked: a language model's facts have it"
        most = min(facts.max_length, model.context) - self._virtual
        self.capacity = choose_capacity(options, most)
        self.length = 0
        self._vocab, self._lengths = model.vocab, sorted(facts.lengths)
        super().__init__(bundle, options)

    def _cut(self, count: int, fed: int) -> list[int]:
        """Lengths of the calls for a prompt; routing must see all of it in one.

        Raises:
            LimeEdgeError: a routed prompt that no enumerated length holds.
        """
        if self._function != self._routed:
            return plan_calls(count, self._lengths)
        fitting = [length for length in self._lengths if length >= count]
        if not fitting:
            longest = max(0, self._lengths[-1] - self._virtual)
            raise LimeEdgeError(
                f"routed: this package takes prompts of up to {longest} tokens in one call, "
                f"found {count - self._virtual}",
                "export it with longer `prompt_lengths`",
            )
        return [fitting[0]]

    def _call(self, ids: np.ndarray, count: int, position: int) -> np.ndarray:
        facts = {"position": position, "length": count}
        inputs = {IDS: ids}
        inputs |= {name: np.array([value], np.int32) for name, value in facts.items()}
        if self._takes_expert and self._function == "main":
            inputs["expert"] = self._residual
        return self._model.run(self._function, inputs)["logits"][0]


def choose_provider(wanted: tuple[str, ...]) -> str:
    """Core ML on a Mac with coremltools, else the interpreter; or the first of those asked for that is there.

    Raises:
        LimeEdgeError: what is asked for is not there.
    """
    here = sys.platform == "darwin" and importlib.util.find_spec("coremltools") is not None
    known = ([COREML, *[f"{COREML}:{units}" for units in UNITS]] if here else []) + [INTERPRETER, ROUNDED]
    if not wanted:
        return known[0]
    for name in wanted:
        if name in known:
            return name
    if sys.platform == "darwin" and not here and any(name.startswith(COREML) for name in wanted):
        raise need("coremltools", "coreml")
    raise LimeEdgeError(
        f"none of the providers {', '.join(wanted)} is available", f"this machine has {', '.join(known)}", EXIT_MISSING
    )


def load_package(bundle: Bundle, provider: str) -> Model:
    """The bundle's package on one provider.

    Raises:
        LimeEdgeError: a damaged package, or one that Core ML refuses.
    """
    facts = bundle.manifest.facts_of(CoremlFacts)
    if provider.startswith(COREML):  # pragma: no cover - needs a Mac
        units = provider.partition(":")[2] or facts.compute_units
        return MacModel(bundle.path / facts.file, units, bool(facts.routed))
    return InterpretedModel(bundle, provider == INTERPRETER)


class InterpretedModel:
    """The interpreter over all functions of a package; they share state and weights."""

    def __init__(self, bundle: Bundle, exact: bool):
        self._package, self._exact = read_package(bundle.path / bundle.manifest.facts_of(CoremlFacts).file), exact
        self._shared: Values = {}
        self._ready: dict[str, Interpreter] = {}
        self.state = self._load("main").make_state()

    def _load(self, function: str) -> Interpreter:
        if function not in self._ready:
            self._ready[function] = Interpreter(self._package, function, self._exact, self._shared)
        return self._ready[function]

    def run(self, function: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, float32."""
        return self._load(function).run(inputs, self.state)


class MacModel:  # pragma: no cover - needs a Mac
    """coremltools' predict, with MLState where there is a cache; nobody has run it yet.

    A function is loaded when it is first needed. Each has a state of its own: what one wrote is copied when the
    other takes over.
    """

    def __init__(self, path: Path, units: str, multifunction: bool):
        import coremltools

        self._load_model, self._path = coremltools.models.MLModel, str(path)
        self._units = getattr(coremltools.ComputeUnit, UNITS[units])
        self._multifunction, self._names = multifunction, list(read_package(path).functions["main"].states)
        self._models: dict[str, Any] = {}
        self._states: dict[str, Any] = {}
        self._active = ""
        self._load("main")

    def _load(self, function: str) -> None:
        name = function if self._multifunction else None
        try:
            model = self._load_model(self._path, compute_units=self._units, function_name=name)
        except Exception as error:  # coremltools' exceptions share no public base
            raise LimeEdgeError(
                f"{self._path}: Core ML cannot load it: {str(error).splitlines()[0]}",
                "lime-edge inspect BUNDLE --verify compares the hashes",
            ) from None
        self._models[function], self._states[function] = model, model.make_state() if self._names else None

    def run(self, function: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        if function not in self._models:
            self._load(function)
        if self._active and self._active != function:
            for name in self._names:
                self._states[function].write_state(name, self._states[self._active].read_state(name))
        self._active = function
        return self._models[function].predict(inputs, self._states[function])
