"""ExecuTorch for vision-language models: the decoder's engine, and the program that sees beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.runtimes.executorch.decoder import ExecutorchEngine, load_method, load_program, wrap
from lime_edge.session.engines import SessionOptions
from lime_edge.targets.entries import ExecutorchFacts

METHODS = {False: "vision_encoder", True: "vision_encoder_routed"}


class ExecutorchVisionEngine(ExecutorchEngine):
    """Implements lime_edge.session.engines.VisionEngine. The program that sees is loaded when the first picture comes.

    Raises:
        LimeEdgeError: as ExecutorchEngine.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        super().__init__(bundle, options)
        facts, vision = bundle.manifest.facts_of(ExecutorchFacts), bundle.manifest.vision
        assert facts.vision is not None and facts.limits is not None and vision is not None
        self._open = partial(load_program, bundle, options.threads, facts.vision)
        self._place, self._most = bundle.path / facts.vision, facts.limits.batch
        self._swaps, self._routes = facts.expert_input and vision.adapts_tower, facts.vision_routed is not None
        self._eyes: Any = None
        self._methods: dict[bool, Any] = {}

    def see(self, tiles: np.ndarray) -> np.ndarray:
        """Features (T, rows, hidden) float32 of tiles (T, 3, S, S) float32.

        Raises:
            LimeEdgeError: more tiles of a routed call than were planned for.
        """
        routed = self._routing and self._routes
        if routed and len(tiles) > self._most:
            raise LimeEdgeError(
                f"routed: {len(tiles)} tiles, at most {self._most} were planned for", "pin an expert, or show less"
            )
        if routed not in self._methods:
            self._eyes = self._eyes or self._open()
            self._methods[routed] = load_method(self._eyes, METHODS[routed], self._place)
        parts = []
        for start in range(0, len(tiles), self._most):
            inputs = [wrap(np.ascontiguousarray(tiles[start : start + self._most], np.float32))]
            if self._swaps and not routed:
                inputs.append(self._expert)
            parts.append(self._methods[routed].execute(inputs)[0].numpy().copy())
        return np.concatenate(parts)
