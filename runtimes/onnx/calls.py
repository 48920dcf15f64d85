"""Calls of a decoder's graph on some rows of the caches: what never changes is bound once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from lime_edge.runtimes.onnx.caches import Caches
from lime_edge.runtimes.onnx.places import Buffer, Device, Host
from lime_edge.session.features import FeatureRows

EXPERT = "expert"  # the input of a pinned graph, (rows, sum_H): 1 row, or one for each row of the call
CAPTURE, NOT_CAPTURED = "gpu_graph_id", "-1"  # run option and its value. Source: onnxruntime_run_options_config_keys.h
_captures = itertools.count(1)  # a number per captured call in this process


@dataclass(frozen=True)
class Shared:
    """What all calls on the same caches share.

    place: where buffers lie. caches: keys and values. logits: (rows, 1, V) float32, where the last position's logits
    of each row go. virtual: prompt tuning's virtual tokens, in the cache before everything else. starts: the graph
    takes the first wanted position, counted from the end, instead of how many are wanted. images: rows of pictures that
    ids beyond the vocabulary mean, None in a model of text alone.
    """

    place: Host | Device
    caches: Caches
    logits: Buffer
    virtual: int
    starts: bool = False
    images: FeatureRows | None = None


class BoundGraph:
    """A graph with the caches of rows first to first + count bound, as past and as present: attention writes in place.

    Several tokens a call need count 1: ONNX Runtime's GroupQueryAttention takes one token a row otherwise. On a GPU a
    call of one token a row is captured as a CUDA graph at its first run: its buffers keep their addresses and sizes,
    the mask is as long as the cache, and a switch of the expert is a copy into its buffer.
    """

    def __init__(self, session: ort.InferenceSession, shared: Shared, first: int = 0, count: int = 1):
        self._session, self._virtual, self._place = session, shared.virtual, shared.place
        self._binding = session.io_binding()
        for name, view in shared.caches.view(first, count):
            view.bind_input(self._binding, f"past_key_values.{name}")
            view.bind_output(self._binding, f"present.{name}")
        self._starts, self._images = shared.starts, shared.images
        self._keep = np.ones(1, np.int64)  # the processor reads it, on a GPU too
        Host().share(self._keep).bind_input(self._binding, "logits_start" if self._starts else "logits_to_keep")
        self._last = shared.logits.rows(first, count)
        self._ones = np.ones((1, shared.caches.tokens), np.int64)
        self._held: dict[str, Buffer] = {}  # the binding does not own what is bound
        self._fixed: dict[str, Buffer] = {}
        self._captured, self._plain = ort.RunOptions(), ort.RunOptions()
        if self._place.captures:
            self._captured.add_run_config_entry(CAPTURE, str(next(_captures)))
            self._plain.add_run_config_entry(CAPTURE, NOT_CAPTURED)

    def bind(self, name: str, array: np.ndarray, fixed: bool = False) -> None:
        """Give an input an array, whose memory is read at every run (on a GPU: a copy of it).

        Args:
            fixed: every array is written to the first one's buffer, whose address stays.
        """
        buffer = self._fixed.get(name) if fixed else None
        if buffer is None:
            buffer = self._place.share(array.copy() if fixed else array)  # what is written to must be its own
        else:
            buffer.write(array)
        if fixed:
            self._fixed[name] = buffer
        if self._held.get(name) is not buffer:
            self._held[name] = buffer
            buffer.bind_input(self._binding, name)

    def bind_expert(self, residuals: np.ndarray) -> None:
        """Give the pinned graph its experts (1 or count, sum_H) float32; they must not change while bound."""
        self.bind(EXPERT, residuals, fixed=self._place.captures)

    def run(self, ids: np.ndarray, lengths: np.ndarray, keep: int) -> np.ndarray:
        """Append tokens to the rows' caches.

        Args:
            ids: (count, S) int64. lengths: (count,) tokens in each row's cache, virtual ones not counted.
            keep: the last positions whose logits are wanted, 1 to S.
        Returns:
            (count, keep, V) float32; with keep=1 maybe a part of the shared buffer, which later calls overwrite.
        """
        if self._images is not None:
            ids, features = self._images.resolve(ids)
            self.bind("image_features", features.astype(np.float16) if self._starts else features)
        totals = lengths + (ids.shape[1] + self._virtual)
        captured = self._place.captures and ids.shape[1] == 1 and bool(lengths.all())
        width = self._ones.shape[1] if captured else int(totals.max())
        if len(totals) == 1 and not captured:
            self.bind("attention_mask", self._ones[:, :width])
        else:  # padding is on the right: a row's tokens come first, the call's among them
            self.bind("attention_mask", (np.arange(width) < totals[:, None]).astype(np.int64), fixed=captured)
        if self._virtual:  # they go before the first call's tokens
            own = np.arange(0 if lengths.any() else self._virtual, dtype=np.int64)
            self.bind("virtual_ids", np.tile(own, (ids.shape[0], 1)))
        self.bind("input_ids", ids, fixed=ids.shape[1] == 1)
        self._keep[0] = -keep if self._starts else keep
        logits = self._last
        if keep > 1:
            logits = self._place.zeros((ids.shape[0], keep, self._last.shape[-1]), np.float32)
        logits.bind_output(self._binding, "logits")
        self._session.run_with_iobinding(self._binding, self._captured if captured else self._plain)
        return logits.read()
