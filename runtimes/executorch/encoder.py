"""ExecuTorch for encoders and vision models: one call in, one call out; the expert is an argument."""

from __future__ import annotations

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.runtimes.executorch.decoder import SwitchedProgram, wrap
from lime_edge.session.engines import SessionOptions
from lime_edge.targets.entries import ExecutorchFacts


class ExecutorchEncoderEngine(SwitchedProgram):
    """The loaded program; implements lime_edge.session.encoder.EncoderEngine.

    Raises:
        LimeEdgeError: a missing package or backend, or a program that cannot be loaded.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        super().__init__(bundle, options)
        self._facts = bundle.manifest.facts_of(ExecutorchFacts)
        assert self._facts.limits is not None, "the manifest is checked: an encoder's facts have them"
        self._limits = self._facts.limits

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, float32. A batch beyond the planned one is run in pieces, unless it is routed.

        Raises:
            LimeEdgeError: more tokens than were planned for, or a routed batch beyond the planned one.
        """
        arrays = [inputs[entry.name] for entry in self._facts.inputs]
        most = self._limits.batch
        self._check(arrays, most)
        parts = [self._call([a[i : i + most] for a in arrays]) for i in range(0, len(arrays[0]), most)]
        joined = [np.concatenate(values) if len(values) > 1 else values[0] for values in zip(*parts, strict=True)]
        return dict(zip(self._facts.outputs, joined, strict=True))

    def _check(self, arrays: list[np.ndarray], most: int) -> None:
        longest = self._limits.sequence or 0
        for axis, name in enumerate(self._facts.inputs[0].shape):
            if name == "sequence" and arrays[0].shape[axis] > longest:
                raise LimeEdgeError(f"tokens: expected at most {longest}, found {arrays[0].shape[axis]}")
        if self._routing and len(arrays[0]) > most:
            raise LimeEdgeError(
                f"routed batch: expected at most {most}, found {len(arrays[0])}",
                "routing weighs a batch as one call: run a smaller one",
            )

    def _call(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        given = [wrap(array) for array in arrays]
        if not self._routing and self._facts.expert_input:
            given.append(self._expert)
        return [value.numpy() for value in self._method.execute(given)]
