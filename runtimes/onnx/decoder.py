"""ONNX Runtime for language models: bound inputs, one cache for past and present, the expert swapped by rebinding."""

from __future__ import annotations

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.runtimes.onnx.caches import Caches, Prefix
from lime_edge.runtimes.onnx.calls import BoundGraph, Shared
from lime_edge.runtimes.onnx.loading import Graphs, choose_operators, list_placement, plan_providers
from lime_edge.runtimes.onnx.operators import find_subtract
from lime_edge.runtimes.onnx.places import CUDA, choose_place
from lime_edge.runtimes.onnx.rows import OnnxRows
from lime_edge.session.engines import Placement, SessionOptions
from lime_edge.session.features import open_features
from lime_edge.targets.entries import OnnxFacts

DEFAULT_LENGTH = 2048
# Functions that operators replace; the same names as in operators.c and cuda/operators.c
REPLACED = {"ExpertRowsBranch", "GappedExpertRowsBranch", "ExpertRowsBranchNorm", "RoutedBranch", "SwiGLU"}
REPLACED_ON_GPU = {"HalfExpertRowsBranch", "HalfGappedExpertRowsBranch", "HalfExpertRowsBranchNorm", "HalfSwiGLU"}


class OnnxEngine:
    """A bundle's graphs with a cache for one sequence; implements lime_edge.session.engines.Engine.

    `open_rows` gives several sequences caches of their own over the same graphs.

    Raises:
        LimeEdgeError: no execution provider, or a graph that cannot be loaded.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        self._manifest = manifest = bundle.manifest
        facts, context = manifest.facts_of(OnnxFacts), manifest.backbone.context
        self.capacity = options.max_length or min(context, DEFAULT_LENGTH)
        if not 1 <= self.capacity <= context:
            raise LimeEdgeError(f"max_length: expected 1..{context}, found {self.capacity}")
        self.length = 0
        self._virtual = facts.virtual_tokens
        self._total = manifest.sites.total
        self.capacity = min(self.capacity, context - self._virtual)
        self._graphs = Graphs(bundle, options)
        self._half = facts.compute == "float16"
        self.features = open_features(bundle)
        self.provider = self._graphs.pinned.get_providers()[0]
        self._place = choose_place(self.provider)
        self._shared = self._share(1, self.capacity)
        self._pinned = BoundGraph(self._graphs.pinned, self._shared)
        self._routed: BoundGraph | None = None
        self._active = self._pinned
        calls = set(facts.functions) & (REPLACED_ON_GPU if self.provider == CUDA else REPLACED)
        self.subtract = find_subtract()
        self.operators: bool | None = bool(calls) and choose_operators(plan_providers(bundle, options)) is not None

    @property
    def placement(self) -> Placement:
        """Where the pinned graph's nodes run."""
        return list_placement(self._graphs.pinned)

    def _share(self, rows: int, capacity: int) -> Shared:
        dtype = np.float16 if self._half else np.float32
        caches = Caches(self._manifest, rows, capacity + self._virtual, self._place, dtype)
        logits = self._place.zeros((rows, 1, self._manifest.backbone.vocab), np.float32)
        return Shared(self._place, caches, logits, self._virtual, starts=self._half, images=self.features)

    def set_expert(self, residual: np.ndarray) -> None:
        """Rebind the expert input to another buffer (sum_H,) float32; it must not change while bound."""
        self._active = self._pinned
        if self._graphs.takes_expert:
            self._pinned.bind_expert(residual[None])

    def set_routed(self) -> None:
        """Weigh the frozen bank per token from now on; the first time loads the routed graph."""
        if self._routed is None:
            self._routed = BoundGraph(self._graphs.routed, self._shared)
        self._active = self._routed

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens; the buffers are overwritten later."""
        self.length = min(self.length, length)

    def feed(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Run S tokens after those in the cache. ids: (S,) int64. Returns (keep or S, V) float32.

        A single row is a buffer that the next call overwrites.
        """
        wanted = min(keep, ids.size) if keep else ids.size
        logits = self._active.run(ids[None], np.array([self.length]), wanted)
        self.length += ids.size
        return logits[0]

    def save(self, length: int) -> Prefix:
        """A copy of the cache's first `length` tokens."""
        assert 0 < length <= self.length
        return Prefix(length, self._shared.caches.save(0, length + self._virtual))

    def load(self, prefix: Prefix) -> None:
        """Let the cache hold what `save` gave, and nothing else."""
        self._shared.caches.restore(0, prefix.arrays)
        self.length = prefix.tokens

    def open_rows(self, count: int, capacity: int | None = None) -> OnnxRows:
        """Caches for `count` sequences that are decoded together, each with an expert of its own.

        Args:
            capacity: tokens that each holds, None for as many as the engine's own.
        Raises:
            LimeEdgeError: no row, or a capacity outside 1 to the model's context.
        """
        most = self._manifest.backbone.context - self._virtual
        capacity = self.capacity if capacity is None else capacity
        with Faults("rows") as faults:
            if count < 1:
                faults.add("rows", "at least 1", count)
            if not 1 <= capacity <= most:
                faults.add("tokens of a row", f"1..{most}", capacity)
        return OnnxRows(self._graphs, self._share(count, capacity), self._total)
