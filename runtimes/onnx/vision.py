"""ONNX Runtime for vision-language models: the decoder's engine, and the program that sees beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.runtimes.onnx.decoder import OnnxEngine
from lime_edge.runtimes.onnx.loading import load_graph
from lime_edge.session.engines import SessionOptions
from lime_edge.targets.entries import OnnxFacts

PIXELS, FEATURES, EXPERT = "pixel_values", "image_features", "expert"


class OnnxVisionEngine(OnnxEngine):
    """Implements lime_edge.session.engines.VisionEngine. The programs that see load when the first picture comes.

    Raises:
        LimeEdgeError: no execution provider, or a graph that cannot be loaded.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        super().__init__(bundle, options)
        facts, vision = bundle.manifest.facts_of(OnnxFacts), bundle.manifest.vision
        assert facts.vision is not None and vision is not None
        self._load = partial(load_graph, bundle, options=options)
        self._files = {False: facts.vision, True: facts.vision_routed or facts.vision}
        self._swaps, self._routing = facts.expert_input and vision.adapts_tower, False
        self._residual = np.zeros(self._total, np.float32)
        self._programs: dict[str, Any] = {}

    def set_expert(self, residual: np.ndarray) -> None:
        """Use d (sum_H,) float32 in the tower and the decoder; it must not change while in use."""
        super().set_expert(residual)
        self._residual, self._routing = residual, False

    def set_routed(self) -> None:
        """Weigh the frozen bank in both."""
        super().set_routed()
        self._routing = True

    def see(self, tiles: np.ndarray) -> np.ndarray:
        """Features (T, rows, hidden) float32 of tiles (T, 3, S, S) float32, in one call."""
        file = self._files[self._routing]
        if file not in self._programs:
            self._programs[file] = self._load(file)
        inputs = {PIXELS: np.ascontiguousarray(tiles, np.float32)}
        if self._swaps and not self._routing:
            inputs[EXPERT] = self._residual
        found: np.ndarray = self._programs[file].run([FEATURES], inputs)[0]
        return found
