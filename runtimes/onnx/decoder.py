"""ONNX Runtime: bound inputs, one cache buffer for past and present, the expert swapped by rebinding."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import EXIT_MISSING, LimeEdgeError, need
from lime_edge.runtimes.onnx.operators import find_library, find_subtract
from lime_edge.session.engines import SessionOptions

try:
    import onnxruntime as ort
except ImportError as error:  # pragma: no cover - exercised in a bare environment
    raise need("onnxruntime", "onnx") from error

DEFAULT_LENGTH = 2048
OPERATORS = "LIME_EDGE_OPERATORS"
REPLACED = {"ExpertBranch", "GappedExpertBranch", "ExpertBranchNorm", "RoutedBranch", "SwiGLU"}  # by onnx_operators


def open_engine(bundle: Bundle, options: SessionOptions) -> OnnxEngine:
    """Load the bundle's ONNX graph.

    Raises:
        LimeEdgeError: no ONNX target, no execution provider, or a graph that cannot be loaded.
    """
    return OnnxEngine(bundle, options)


class OnnxEngine:
    """A loaded graph with its cache buffers; implements lime_edge.session.decoder.Engine.

    A routed bundle has a second graph over the same weight file: it is loaded at the first
    `set_routed`, and shares the cache buffers.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        facts, model = bundle.manifest.targets["onnx"], bundle.manifest.model
        self.capacity = options.max_length or min(model["context"], DEFAULT_LENGTH)
        if not 1 <= self.capacity <= model["context"]:
            raise LimeEdgeError(f"max_length: expected 1..{model['context']}, found {self.capacity}")
        self.length = 0
        self._virtual = int(facts.get("virtual_tokens", 0))  # in the cache before everything else
        self._virtual_ids = np.arange(self._virtual, dtype=np.int64)[None]
        if self.capacity + self._virtual > model["context"]:
            self.capacity = model["context"] - self._virtual
        self._load = partial(load_graph, bundle, options=options)
        self._caches = make_caches(model, self.capacity + self._virtual)
        self._vocab = model["vocab"]
        self._mask = np.ones((1, self.capacity + self._virtual), np.int64)
        self._keep = np.ones(1, np.int64)
        self._token = np.zeros((1, 1), np.int64)
        self._row = np.empty((1, 1, self._vocab), np.float32)
        self._prompt = self._token
        self._bound = {"token": _wrap(self._token), "row": _wrap(self._row)}
        self._residual: np.ndarray | None = None
        self._takes_expert, self._routed_file = bool(facts["expert_input"]), facts.get("routed")
        self._pinned = self._bind(self._load(facts["file"]))
        self._routed: tuple[ort.InferenceSession, ort.IOBinding] | None = None
        self._active = self._pinned
        self.provider = self._pinned[0].get_providers()[0]
        calls = set(facts.get("functions", ())) & REPLACED
        self.subtract = find_subtract()
        self.operators: bool | None = bool(calls) and choose_operators(plan_providers(bundle, options)) is not None

    def _bind(self, session: ort.InferenceSession) -> tuple[ort.InferenceSession, ort.IOBinding]:
        """Bind what never changes: the cache, as past and as present: attention writes in place."""
        binding = session.io_binding()
        for name, buffer in self._caches.items():
            value = _wrap(buffer)
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_ortvalue_input("logits_to_keep", _wrap(self._keep))
        return session, binding

    def set_expert(self, residual: np.ndarray) -> None:
        """Rebind the expert input to another buffer (sum_H,) float32; it must not change while bound."""
        self._active = self._pinned
        if not self._takes_expert:
            return
        self._residual = residual  # held: the binding does not own it
        self._pinned[1].bind_ortvalue_input("expert", _wrap(residual))

    def set_routed(self) -> None:
        """Weigh the frozen bank per token from now on; the first time loads the routed graph."""
        if self._routed is None:
            assert self._routed_file is not None, "the session asks for it only where there is one"
            self._routed = self._bind(self._load(self._routed_file))
        self._active = self._routed

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens; the buffers are overwritten later."""
        self.length = min(self.length, length)

    def feed(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Run S tokens after those in the cache. ids: (S,) int64. Returns (keep or S, V) float32.

        A single row is a buffer that the next call overwrites.
        """
        session, binding = self._active
        total = self.length + ids.size
        binding.bind_ortvalue_input("attention_mask", _wrap(self._mask[:, : total + self._virtual]))
        if self._virtual:
            count = 0 if self.length else self._virtual  # virtual tokens go before the first call's
            binding.bind_ortvalue_input("virtual_ids", _wrap(self._virtual_ids[:, :count]))
        if ids.size == 1:
            self._token[0, 0] = ids[0]
            binding.bind_ortvalue_input("input_ids", self._bound["token"])
        else:
            self._prompt = np.ascontiguousarray(ids[None])  # held: the binding does not own it
            binding.bind_ortvalue_input("input_ids", _wrap(self._prompt))
        rows = min(keep, ids.size) if keep else ids.size
        self._keep[0] = rows
        logits = self._row if rows == 1 else np.empty((1, rows, self._vocab), np.float32)
        binding.bind_ortvalue_output("logits", self._bound["row"] if rows == 1 else _wrap(logits))
        session.run_with_iobinding(binding)
        self.length = total
        return logits[0]


def make_caches(model: dict[str, Any], capacity: int) -> dict[str, np.ndarray]:
    """One buffer per layer and kind, "LAYER.key" and "LAYER.value": (1, kv_heads, capacity, head_dim) float32."""
    shape = (1, model["kv_heads"], capacity, model["head_dim"])
    names = [f"{layer}.{kind}" for layer in range(model["layers"]) for kind in ("key", "value")]
    return {name: np.zeros(shape, np.float32) for name in names}  # untouched pages cost nothing


def _wrap(array: np.ndarray) -> ort.OrtValue:
    """An OrtValue over the array's own memory; the caller keeps the array alive while it is bound."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def choose_providers(wanted: tuple[str, ...]) -> list[str]:
    """The wanted execution providers that this build has, in order.

    Raises:
        LimeEdgeError: none of them is there.
    """
    available = ort.get_available_providers()
    chosen = [name for name in wanted if name in available]
    if not chosen:
        raise LimeEdgeError(
            f"none of the execution providers {', '.join(wanted)} is available",
            f"this onnxruntime has {', '.join(available)}",
            EXIT_MISSING,
        )
    return chosen


def plan_providers(bundle: Bundle, options: SessionOptions) -> list[str]:
    """The execution providers that the bundle's graphs are loaded with."""
    return choose_providers(options.providers or tuple(bundle.manifest.targets["onnx"]["providers"]))


def choose_operators(providers: list[str]) -> Path | None:
    """The library with operators for the graph's functions, or None where their own nodes are to run.

    Those are the processor's: beside an accelerator, which runs the nodes itself, they would only make it wait.
    The environment variable LIME_EDGE_OPERATORS=0 leaves them out.
    """
    if providers != ["CPUExecutionProvider"] or os.environ.get(OPERATORS, "").lower() in ("0", "false", "off", "no"):
        return None
    return find_library()


def load_graph(bundle: Bundle, name: str, options: SessionOptions) -> ort.InferenceSession:
    """Load one of the bundle's graphs with the threads and execution providers that are meant.

    Args:
        name: path inside the bundle.
    Raises:
        LimeEdgeError: no execution provider, or ONNX Runtime refuses the file.
    """
    facts, settings = bundle.manifest.targets["onnx"], ort.SessionOptions()
    settings.log_severity_level = 3
    if threads := options.threads or facts.get("threads"):
        settings.intra_op_num_threads = threads
    providers = plan_providers(bundle, options)
    if library := choose_operators(providers):
        settings.register_custom_ops_library(str(library))
    file = bundle.path / name
    try:
        return ort.InferenceSession(str(file), settings, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no public base
        first = str(error).splitlines()[0]
        hint = "lime-edge inspect BUNDLE --verify compares the hashes"
        raise LimeEdgeError(f"{file}: ONNX Runtime cannot load it: {first}", hint) from None
