"""ONNX Runtime: bound inputs, one cache buffer for past and present, the expert swapped by rebinding."""

from __future__ import annotations

from typing import Any

import numpy as np

from lime_edge.bundle import Bundle
from lime_edge.errors import EXIT_MISSING, LimeEdgeError, need
from lime_edge.session import SessionOptions

try:
    import onnxruntime as ort
except ImportError as error:  # pragma: no cover - exercised in a bare environment
    raise need("onnxruntime", "onnx") from error

DEFAULT_LENGTH = 2048


def open_engine(bundle: Bundle, options: SessionOptions) -> OnnxEngine:
    """Load the bundle's ONNX graph.

    Raises:
        LimeEdgeError: no ONNX target, no execution provider, or a graph that cannot be loaded.
    """
    return OnnxEngine(bundle, options)


class OnnxEngine:
    """A loaded graph with its cache buffers; implements lime_edge.session.Engine."""

    def __init__(self, bundle: Bundle, options: SessionOptions):
        facts, model = bundle.manifest.targets["onnx"], bundle.manifest.model
        self.capacity = options.max_length or min(model["context"], DEFAULT_LENGTH)
        if not 1 <= self.capacity <= model["context"]:
            raise LimeEdgeError(f"max_length: expected 1..{model['context']}, found {self.capacity}")
        self.length = 0
        providers = choose_providers(options.providers or tuple(facts["providers"]))
        self._session = _load(bundle, facts, providers, options.threads or facts.get("threads"))
        self.provider = self._session.get_providers()[0]
        self._binding = self._session.io_binding()
        self._takes_expert = bool(facts["expert_input"])
        self._vocab = model["vocab"]
        self._caches = self._bind_cache(model)
        self._mask = np.ones((1, self.capacity), np.int64)
        self._keep = np.ones(1, np.int64)
        self._token = np.zeros((1, 1), np.int64)
        self._row = np.empty((1, 1, self._vocab), np.float32)
        self._prompt = self._token
        self._residual: np.ndarray | None = None
        self._bound = {"token": _wrap(self._token), "row": _wrap(self._row)}
        self._binding.bind_ortvalue_input("logits_to_keep", _wrap(self._keep))

    def _bind_cache(self, model: dict[str, Any]) -> list[np.ndarray]:
        """One buffer per layer and kind, bound as past and as present: attention writes in place."""
        shape = (1, model["kv_heads"], self.capacity, model["head_dim"])
        buffers = []
        for layer in range(model["layers"]):
            for kind in ("key", "value"):
                buffer = np.zeros(shape, np.float32)  # untouched pages cost nothing
                value = _wrap(buffer)
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", value)
                self._binding.bind_ortvalue_output(f"present.{layer}.{kind}", value)
                buffers.append(buffer)
        return buffers

    def set_expert(self, residual: np.ndarray) -> None:
        """Rebind the expert input to another buffer (sum_H,) float32; it must not change while bound."""
        if not self._takes_expert or residual is self._residual:
            return
        self._residual = residual
        self._binding.bind_ortvalue_input("expert", _wrap(residual))

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens; the buffers are overwritten later."""
        self.length = min(self.length, length)

    def feed(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Run S tokens after those in the cache. ids: (S,) int64. Returns (keep or S, V) float32.

        With keep=1 the result is a buffer that the next call overwrites.
        """
        total = self.length + ids.size
        mask = _wrap(self._mask[:, :total])
        self._binding.bind_ortvalue_input("attention_mask", mask)
        if ids.size == 1:
            self._token[0, 0] = ids[0]
            self._binding.bind_ortvalue_input("input_ids", self._bound["token"])
        else:
            self._prompt = np.ascontiguousarray(ids[None])  # held: the binding does not own it
            self._binding.bind_ortvalue_input("input_ids", _wrap(self._prompt))
        rows = min(keep, ids.size) if keep else ids.size
        self._keep[0] = rows
        logits = self._row if rows == 1 else np.empty((1, rows, self._vocab), np.float32)
        self._binding.bind_ortvalue_output("logits", self._bound["row"] if rows == 1 else _wrap(logits))
        self._session.run_with_iobinding(self._binding)
        self.length = total
        return logits[0]


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
        raise LimeEdgeError(f"none of the execution providers {', '.join(wanted)} is available",
                            f"this onnxruntime has {', '.join(available)}", EXIT_MISSING)  # fmt: skip
    return chosen


def _load(bundle: Bundle, facts: dict[str, Any], providers: list[str], threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    file = bundle.path / facts["file"]
    try:
        return ort.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no public base
        first = str(error).splitlines()[0]
        raise LimeEdgeError(f"{file}: ONNX Runtime cannot load it: {first}", "lime-edge verify compares the hashes") from None
