"""Embeddings: texts through an encoder bundle, each under the expert that was asked for."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from lime_edge.bundle.experts import ROUTED, Selection
from lime_edge.bundle.prompts import TextCodec
from lime_edge.errors import LimeEdgeError
from lime_edge.serve.refusals import Refusal, refuse_shutdown
from lime_edge.serve.settings import ServeOptions
from lime_edge.serve.thread import SessionThread
from lime_edge.session.encoder import EncoderSession

SENTENCE, TOKENS = "sentence_embedding", "last_hidden_state"
TOGETHER = 16  # texts of one length in one call


class Embedder:
    """Answers embedding requests with one encoder session, on its thread."""

    def __init__(self, open_session: Callable[[], EncoderSession], options: ServeOptions):
        self._options = options
        self.thread = SessionThread("lime-edge-embeddings", open_session)
        self.under_way, self.closing = 0, False

    async def start(self) -> EncoderSession:
        """Open the session on its thread; what is returned is for looking at.

        Raises:
            LimeEdgeError: the bundle or its engine; a model that reads no text or gives no embedding.
        """
        session = await self.thread.start()
        self.context = session.bundle.manifest.backbone.context
        self.codec = TextCodec(session.bundle.path / "tokenizer")
        if "input_ids" not in session.inputs or not {SENTENCE, TOKENS} & set(session.outputs):
            raise LimeEdgeError(
                f"{session.bundle.path}: gives {', '.join(session.outputs)}: no embedding of a text",
                f"export an encoder that gives {SENTENCE} or {TOKENS}",
            )
        return session

    async def embed(self, texts: Sequence[Sequence[int]], selection: Selection) -> list[np.ndarray]:
        """One vector (H,) float32 for each text.

        Args:
            texts: token ids, special ones included.
        Raises:
            Refusal: 503 when the server goes down, 429 when too many wait.
            LimeEdgeError: what the session refuses.
        """
        if self.closing:
            raise refuse_shutdown()
        if self.under_way > self._options.most_waiting:
            raise Refusal(429, f"{self.under_way} requests wait: no more are queued", "queue_full", retry_after=1)
        self.under_way += 1
        try:
            found: dict[int, np.ndarray] = {}
            for places in plan_calls(texts, 1 if selection == ROUTED else TOGETHER):
                ids = [list(texts[place]) for place in places]
                vectors = await self.thread.call(lambda session, ids=ids: embed_ids(session, ids, selection))  # type: ignore[misc]
                found |= dict(zip(places, vectors, strict=True))
            return [found[place] for place in range(len(texts))]
        finally:
            self.under_way -= 1


def plan_calls(texts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Which texts go into a call together: of one length, so that nothing is padded, `most` of them."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    calls = []
    for _, places in groupby(order, key=lambda place: len(texts[place])):
        group = list(places)
        calls += [group[start : start + most] for start in range(0, len(group), most)]
    return calls


def embed_ids(session: EncoderSession, ids: Sequence[Sequence[int]], selection: Selection) -> np.ndarray:
    """Vectors (B, H) float32 of token ids (B, T): the model's own, or the mean over tokens scaled to length 1."""
    if session.selection != selection:
        session.use(selection)
    found = session.run(input_ids=np.array(ids, np.int64))
    if SENTENCE in found:
        return found[SENTENCE].copy()
    mean = found[TOKENS].mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def write_vector(vector: np.ndarray, form: str) -> Any:
    """A vector as the API writes it: a list of numbers, or base64 of little-endian float32."""
    if form == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")
    return [float(value) for value in vector]
