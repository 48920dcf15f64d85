"""Core ML for encoders and vision models: one call in, one call out, on a Mac or through the interpreter.

Pinned, every row of a batch is a call of its own, padded to an enumerated length. Routed, the batch is one call as
it is: routing weighs over everything it is given.
"""

from __future__ import annotations

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.runtimes.coreml.decoder import SwitchedPackage
from lime_edge.session.engines import SessionOptions
from lime_edge.targets.entries import CoremlFacts

EXPERT, IDS = "expert", "input_ids"


class CoremlEncoderEngine(SwitchedPackage):
    """The loaded package; implements lime_edge.session.encoder.EncoderEngine.

    Raises:
        LimeEdgeError: no Core ML where it is asked for, or a package that cannot be loaded.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        super().__init__(bundle, options)
        facts = bundle.manifest.facts_of(CoremlFacts)
        self._outputs, self._lengths = facts.outputs, facts.lengths

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, float32."""
        inputs = {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in inputs.items()}
        if self._function == self._routed:
            found = self._model.run(self._function, inputs)
            return {name: np.asarray(found[name], np.float32) for name in self._outputs}
        count = len(next(iter(inputs.values())))
        rows = [self._run_row({name: x[row : row + 1] for name, x in inputs.items()}) for row in range(count)]
        return {name: np.concatenate([row[name] for row in rows]) for name in self._outputs}

    def _run_row(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One text or image; outputs that have a row per token lose those of the padding."""
        tokens = inputs[IDS].shape[1] if IDS in inputs else 0
        length = next((n for n in self._lengths if n >= tokens), tokens)
        if length > tokens:  # the mask is among the inputs, so its zeros tell the padding
            inputs = {name: np.pad(x, ((0, 0), (0, length - tokens))) for name, x in inputs.items()}
        if self._takes_expert:
            inputs = inputs | {EXPERT: self._residual}
        found = self._model.run("main", inputs)
        padded = {name: length > tokens and found[name].ndim == 3 for name in self._outputs}
        return {
            name: np.asarray(found[name][:, :tokens] if padded[name] else found[name], np.float32)
            for name in self._outputs
        }
