"""Core AI for encoders and vision models: one call in, one call out.

Pinned, every row of a batch is a call of its own, padded to a length that the file has. Routed, the batch is one call
as it is: routing weighs over everything it is given.
"""

from __future__ import annotations

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.runtimes.coreai.decoder import SwitchedModel
from lime_edge.runtimes.padded import PaddedEncoder
from lime_edge.session.engines import SessionOptions
from lime_edge.targets.entries import CoreaiFacts

EXPERT = "expert"


class CoreaiEncoderEngine(PaddedEncoder, SwitchedModel):
    """The loaded file; implements lime_edge.session.engines.EncoderEngine.

    Raises:
        LimeEdgeError: no Core AI where it is asked for, or a file that it refuses.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        super().__init__(bundle, options)
        facts = bundle.manifest.facts_of(CoreaiFacts)
        self._outputs, self._lengths = facts.outputs, sorted(facts.lengths)

    @property
    def _routes(self) -> bool:
        return self._routing

    def _cast(self, x: np.ndarray) -> np.ndarray:
        """Ids as int32, pixels in what the file computes in."""
        return x.astype(np.int32 if x.dtype == np.int64 else self._dtype)

    def _compute(self, inputs: dict[str, np.ndarray], length: int | None) -> dict[str, np.ndarray]:
        if length is None:
            return self._model.run("routed", inputs, {})
        given = inputs | {EXPERT: self._expert} if self._takes_expert else inputs
        return self._model.run(f"main_{length}" if self._lengths else "main", given, {})
