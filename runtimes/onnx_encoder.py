"""ONNX Runtime for encoders and vision models: one call in, one call out; the expert is an input."""

from __future__ import annotations

from typing import Any

import numpy as np

from lime_edge.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.runtimes.onnx import choose_providers, ort
from lime_edge.session import SessionOptions

EXPERT = "expert"


def open_encoder_engine(bundle: Bundle, options: SessionOptions) -> OnnxEncoderEngine:
    """Load the bundle's ONNX graph.

    Raises:
        LimeEdgeError: no execution provider, or a graph that cannot be loaded.
    """
    return OnnxEncoderEngine(bundle, options)


class OnnxEncoderEngine:
    """The loaded graphs; implements lime_edge.encoder_session.EncoderEngine. The routed one loads on first use."""

    def __init__(self, bundle: Bundle, options: SessionOptions):
        self._bundle, self._facts = bundle, bundle.manifest.targets["onnx"]
        self._options = options
        self._pinned = self._load(self._facts["file"])
        self._routed: Any = None
        self._routing = False
        self.provider = self._pinned.get_providers()[0]
        self._residual = np.zeros(0, np.float32)

    def set_expert(self, residual: np.ndarray) -> None:
        """Use d (sum_H,) float32 from the next call on; it must not change while in use."""
        self._residual, self._routing = residual, False

    def set_routed(self) -> None:
        """Weigh the checkpoint's experts per token from the next call on."""
        if self._routed is None:
            self._routed = self._load(self._facts["routed"])
        self._routing = True

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, float32."""
        session, names = (self._routed if self._routing else self._pinned), self._facts["outputs"]
        if not self._routing and self._facts["expert_input"]:
            inputs = inputs | {EXPERT: self._residual}
        return dict(zip(names, session.run(names, inputs), strict=True))

    def _load(self, name: str) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads := self._options.threads or self._facts.get("threads"):
            options.intra_op_num_threads = threads
        providers = choose_providers(self._options.providers or tuple(self._facts["providers"]))
        file = self._bundle.path / name
        try:
            return ort.InferenceSession(str(file), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no public base
            first = str(error).splitlines()[0]
            hint = "lime-edge inspect BUNDLE --verify compares the hashes"
            raise LimeEdgeError(f"{file}: ONNX Runtime cannot load it: {first}", hint) from None
