"""Calls of a decoder's graph on some rows of the caches: what never changes is bound once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from lime_edge.runtimes.onnx.caches import Caches

EXPERT = "expert"  # the input of a pinned graph, (rows, sum_H): 1 row, or one for each row of the call


@dataclass(frozen=True)
class Shared:
    """What all calls on the same caches share.

    caches: keys and values. logits: (rows, 1, V) float32, where the last position's logits of each row go.
    virtual: prompt tuning's virtual tokens, in the cache before everything else.
    """

    caches: Caches
    logits: np.ndarray
    virtual: int


class BoundGraph:
    """A graph with the caches of rows first to first + count bound, as past and as present: attention writes in place.

    Several tokens a call need count 1: ONNX Runtime's GroupQueryAttention takes one token a row otherwise.
    """

    def __init__(self, session: ort.InferenceSession, shared: Shared, first: int = 0, count: int = 1):
        self._session, self._virtual = session, shared.virtual
        self._binding = session.io_binding()
        for name, view in shared.caches.view(first, count):
            value = wrap(view)
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)
        self._keep = np.ones(1, np.int64)
        self._binding.bind_ortvalue_input("logits_to_keep", wrap(self._keep))
        self._last = shared.logits[first : first + count]
        self._tokens = np.zeros((count, 1), np.int64)
        self._bound = {"last": wrap(self._last), "tokens": wrap(self._tokens)}
        self._ones = np.ones((1, shared.caches.tokens), np.int64)
        self._held: dict[str, np.ndarray] = {}

    def bind(self, name: str, array: np.ndarray) -> None:
        """Bind an input until another array is bound to it; its memory is read at every run."""
        self._held[name] = array  # the binding does not own it
        self._binding.bind_ortvalue_input(name, wrap(array))

    def run(self, ids: np.ndarray, lengths: np.ndarray, keep: int) -> np.ndarray:
        """Append tokens to the rows' caches.

        Args:
            ids: (count, S) int64. lengths: (count,) tokens in each row's cache, virtual ones not counted.
            keep: the last positions whose logits are wanted, 1 to S.
        Returns:
            (count, keep, V) float32; with keep=1 a part of the shared buffer, which later calls overwrite.
        """
        totals = lengths + (ids.shape[1] + self._virtual)
        if len(totals) == 1:
            self.bind("attention_mask", self._ones[:, : totals[0]])
        else:  # padding is on the right: a row's tokens come first, the call's among them
            self.bind("attention_mask", (np.arange(totals.max()) < totals[:, None]).astype(np.int64))
        if self._virtual:  # they go before the first call's tokens
            own = np.arange(0 if lengths.any() else self._virtual, dtype=np.int64)
            self.bind("virtual_ids", np.tile(own, (ids.shape[0], 1)))
        if ids.shape[1] == 1:
            self._tokens[:] = ids
            self._binding.bind_ortvalue_input("input_ids", self._bound["tokens"])
        else:
            self.bind("input_ids", np.ascontiguousarray(ids))
        self._keep[0] = keep
        if keep == 1:
            logits, value = self._last, self._bound["last"]
        else:
            logits = np.empty((ids.shape[0], keep, self._last.shape[-1]), np.float32)
            value = wrap(logits)
        self._binding.bind_ortvalue_output("logits", value)
        self._session.run_with_iobinding(self._binding)
        return logits


def wrap(array: np.ndarray) -> ort.OrtValue:
    """An OrtValue over the array's own memory; the caller keeps the array alive while it is bound."""
    return ort.OrtValue.ortvalue_from_numpy(array)
