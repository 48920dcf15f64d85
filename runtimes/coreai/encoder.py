"""Core AI for encoders and vision models: one call in, one call out.

Pinned, every row of a batch is a call of its own, padded to a length that the file has. Routed, the batch is one call
as it is: routing weighs over everything it is given.
"""

from __future__ import annotations

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.runtimes.coreai.decoder import SwitchedModel
from lime_edge.session.engines import SessionOptions
from lime_edge.targets.entries import CoreaiFacts

EXPERT, IDS = "expert", "input_ids"


class CoreaiEncoderEngine(SwitchedModel):
    """The loaded file; implements lime_edge.session.engines.EncoderEngine.

    Raises:
        LimeEdgeError: no Core AI where it is asked for, or a file that it refuses.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        super().__init__(bundle, options)
        facts = bundle.manifest.facts_of(CoreaiFacts)
        self._outputs, self._lengths = facts.outputs, sorted(facts.lengths)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, float32."""
        inputs = {name: x.astype(np.int32 if x.dtype == np.int64 else self._dtype) for name, x in inputs.items()}
        if self._routing:
            found = self._model.run("routed", inputs, {})
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
        given = inputs | {EXPERT: self._expert} if self._takes_expert else inputs
        found = self._model.run(f"main_{length}" if self._lengths else "main", given, {})
        return {
            name: np.asarray(x[:, :tokens] if length > tokens and x.ndim == 3 else x, np.float32)
            for name, x in found.items()
        }
