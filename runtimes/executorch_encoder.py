"""ExecuTorch for encoders and vision models: one call in, one call out; the expert is an argument."""

from __future__ import annotations

from typing import Any

import numpy as np

from lime_edge.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.runtimes.executorch import check_provider, load_method, load_program, wrap
from lime_edge.session import SessionOptions


def open_encoder_engine(bundle: Bundle, options: SessionOptions) -> ExecutorchEncoderEngine:
    """Load the bundle's ExecuTorch program.

    Raises:
        LimeEdgeError: a missing package or backend, or a program that cannot be loaded.
    """
    return ExecutorchEncoderEngine(bundle, options)


class ExecutorchEncoderEngine:
    """The loaded program; implements lime_edge.encoder_session.EncoderEngine. `routed` loads on first use."""

    def __init__(self, bundle: Bundle, options: SessionOptions):
        facts = self._facts = bundle.manifest.targets["executorch"]
        self._file, self._total = bundle.path / facts["file"], bundle.manifest.sites.total
        self.provider = check_provider(facts["providers"], options.providers)
        self._program = load_program(bundle, options.threads)
        self._pinned = load_method(self._program, "forward", self._file)
        self._routed: Any = None
        self._routing = False
        self._residual = np.zeros(self._total, np.float32)
        self._expert = wrap(self._residual)

    def set_expert(self, residual: np.ndarray) -> None:
        """Use d (sum_H,) float32 from the next call on.

        Raises:
            LimeEdgeError: another length or dtype.
        """
        if residual.shape != (self._total,) or residual.dtype != np.float32:
            raise LimeEdgeError(f"expert: expected ({self._total},) float32, found {residual.shape} {residual.dtype}")
        np.copyto(self._residual, residual)
        self._routing = False

    def set_routed(self) -> None:
        """Weigh the checkpoint's experts per token from the next call on."""
        if self._routed is None:
            self._routed = load_method(self._program, "routed", self._file)
        self._routing = True

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, float32. A batch beyond the planned one is run in pieces, unless it is routed.

        Raises:
            LimeEdgeError: more tokens than were planned for, or a routed batch beyond the planned one.
        """
        arrays = [inputs[entry["name"]] for entry in self._facts["inputs"]]
        most = self._facts["limits"]["batch"]
        self._check(arrays, most)
        parts = [self._call([a[i : i + most] for a in arrays]) for i in range(0, len(arrays[0]), most)]
        joined = [np.concatenate(values) if len(values) > 1 else values[0] for values in zip(*parts, strict=True)]
        return dict(zip(self._facts["outputs"], joined, strict=True))

    def _check(self, arrays: list[np.ndarray], most: int) -> None:
        limits, first = self._facts["limits"], self._facts["inputs"][0]["shape"]
        for axis, name in enumerate(first):
            if name == "sequence" and arrays[0].shape[axis] > limits[name]:
                raise LimeEdgeError(f"tokens: expected at most {limits[name]}, found {arrays[0].shape[axis]}")
        if self._routing and len(arrays[0]) > most:
            raise LimeEdgeError(f"routed batch: expected at most {most}, found {len(arrays[0])}",
                                "routing weighs a batch as one call: run a smaller one")  # fmt: skip

    def _call(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        method = self._routed if self._routing else self._pinned
        given = [wrap(array) for array in arrays]
        if not self._routing and self._facts["expert_input"]:
            given.append(self._expert)
        return [value.numpy() for value in method.execute(given)]
