"""Core ML for encoders and vision models: one call in, one call out, on a Mac or through the interpreter.

Pinned, every row of a batch is a call of its own, padded to an enumerated length. Routed, the batch is one call as
it is: routing weighs over everything it is given.
"""

from __future__ import annotations

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.runtimes.coreml.decoder import SwitchedPackage
from lime_edge.runtimes.padded import PaddedEncoder
from lime_edge.session.engines import SessionOptions
from lime_edge.targets.entries import CoremlFacts

EXPERT = "expert"


class CoremlEncoderEngine(PaddedEncoder, SwitchedPackage):
    """The loaded package; implements lime_edge.session.encoder.EncoderEngine.

    Raises:
        LimeEdgeError: no Core ML where it is asked for, or a package that cannot be loaded.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        super().__init__(bundle, options)
        facts = bundle.manifest.facts_of(CoremlFacts)
        self._outputs, self._lengths = facts.outputs, facts.lengths

    @property
    def _routes(self) -> bool:
        return self._function == self._routed

    def _cast(self, x: np.ndarray) -> np.ndarray:
        """Ids as int32."""
        return x.astype(np.int32) if x.dtype == np.int64 else x

    def _compute(self, inputs: dict[str, np.ndarray], length: int | None) -> dict[str, np.ndarray]:
        if length is not None and self._takes_expert:
            inputs = inputs | {EXPERT: self._residual}
        return self._model.run(self._function, inputs)
