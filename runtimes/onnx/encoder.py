"""ONNX Runtime for encoders and vision models: one call in, one call out; the expert is an input."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.runtimes.onnx.loading import list_placement, load_graph
from lime_edge.runtimes.onnx.operators import find_subtract
from lime_edge.session.engines import Placement, SessionOptions
from lime_edge.targets.entries import OnnxFacts

EXPERT = "expert"


class OnnxEncoderEngine:
    """The loaded graphs; implements lime_edge.session.encoder.EncoderEngine. The routed one loads on first use.

    Raises:
        LimeEdgeError: no execution provider, or a graph that cannot be loaded.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        self._facts = bundle.manifest.facts_of(OnnxFacts)
        self._load = partial(load_graph, bundle, options=options)
        self._pinned = self._load(self._facts.file)
        self._routed: Any = None
        self._routing = False
        self.provider = self._pinned.get_providers()[0]
        self.operators: bool | None = None
        self.subtract = find_subtract()
        self._residual = np.zeros(0, np.float32)

    @property
    def placement(self) -> Placement:
        """Where the pinned graph's nodes run."""
        return list_placement(self._pinned)

    def set_expert(self, residual: np.ndarray) -> None:
        """Use d (sum_H,) float32 from the next call on; it must not change while in use."""
        self._residual, self._routing = residual, False

    def set_routed(self) -> None:
        """Weigh the checkpoint's experts per token from the next call on."""
        if self._routed is None:
            assert self._facts.routed is not None, "the session asks for it only where there is one"
            self._routed = self._load(self._facts.routed)
        self._routing = True

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, float32."""
        session, names = (self._routed if self._routing else self._pinned), self._facts.outputs
        if not self._routing and self._facts.expert_input:
            inputs = inputs | {EXPERT: self._residual}
        return dict(zip(names, session.run(names, inputs), strict=True))
