"""The session: one loaded artifact, experts switched without reloading. The same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import ROUTED, ExpertBank, Selection, describe_selection
from lime_edge.bundle.prompts import TextCodec
from lime_edge.errors import LimeEdgeError
from lime_edge.session.engines import Engine
from lime_edge.session.generate import GenerationOptions, TextStream, stream_tokens
from lime_edge.session.switching import ExpertSwitch

ROOM = (
    "shorten the prompt, open the session with a larger max_length, or, where the cache is static (executorch, "
    "coreml), export with a larger --max-seq-len"
)
STOP, LENGTH, FULL = "stop", "length", "cache"  # why a generation ended
CHUNK = 512  # prompt tokens fed at once: bounds the memory of a long prompt


@dataclass(frozen=True)
class Segment:
    """A stretch of the cache: which selection filled it, and its number of tokens."""

    selection: str
    tokens: int


class Session(ExpertSwitch):
    """An opened language model on one target. A routed prompt is run in one call.

    A cache belongs to the expert that filled it. `use` starts a new cache when the selection
    changes, unless keep_cache=True; `cache` tells who filled what. `generate` starts a new sequence
    unless keep_cache=True, which keeps the longest common prefix. `finish_reason` says why the last
    generation ended: "stop" (end token or stop string), "length" (max_new_tokens), "cache" (it is
    full), None before the first and where one was left before its end.

    Use it as a context manager or let it go out of scope; it is not safe for several threads.
    """

    def __init__(self, bundle: Bundle, engine: Engine, bank: ExpertBank, target: str):
        self._engine = engine
        self._codec: TextCodec | None = None
        self._ids: list[int] = []
        self._segments: list[Segment] = []
        self.finish_reason: str | None = None
        super().__init__(bundle, engine, bank, target)

    def use(self, selection: Selection, keep_cache: bool = False) -> None:
        """Switch the expert; nothing is reloaded ("routed" loads its graph once).

        Args:
            selection: see ExpertSwitch.use.
            keep_cache: keep what another expert wrote into the cache (then it is a mixture, and
                `cache` says so); otherwise the cache starts anew.
        Raises:
            LimeEdgeError: see ExpertSwitch.use.
        """
        super().use(selection)
        if not keep_cache and any(s.selection != describe_selection(selection) for s in self._segments):
            self.reset()

    # the cache

    @property
    def cache(self) -> tuple[Segment, ...]:
        """Who filled the cache, in order."""
        return tuple(self._segments)

    @property
    def max_length(self) -> int:
        """Tokens the cache holds."""
        return self._engine.capacity

    def reset(self) -> None:
        """Start a new cache."""
        self._rewind(0)

    def _rewind(self, length: int) -> None:
        self._engine.rewind(length)
        del self._ids[length:]
        kept, left = [], length
        for segment in self._segments:
            if left > 0:
                kept.append(Segment(segment.selection, min(segment.tokens, left)))
            left -= segment.tokens
        self._segments = kept

    def _feed(self, ids: Sequence[int], keep: int) -> np.ndarray:
        """Append tokens; logits of the last `keep` positions of this call (0: all)."""
        array = self._check_ids(ids)
        room = self._engine.capacity - self._engine.length
        if len(ids) > room:
            total = len(ids) + self._engine.length
            raise LimeEdgeError(f"the cache holds {self._engine.capacity} tokens, {total} are needed", ROOM)
        chunk = CHUNK
        if self._selection == ROUTED:
            if self._engine.length and array.size > 1:
                raise LimeEdgeError(
                    f"routed: {array.size} tokens after a cache of {self._engine.length}",
                    "a routed prompt is run in one call, then token by token",
                )
            chunk = array.size
        first = 0 if keep == 0 else max(0, array.size - keep)  # the first position whose logits are wanted
        parts = []
        for start in range(0, array.size, chunk):
            piece = array[start : start + chunk]
            wanted = start + piece.size - max(start, first)
            rows = self._engine.feed(piece, max(wanted, 1))
            if wanted > 0:
                parts.append(rows if array.size <= chunk else rows.copy())
        self._ids.extend(ids)
        self._note(len(ids))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _check_ids(self, ids: Sequence[int]) -> np.ndarray:
        vocab = self.bundle.manifest.model["vocab"]
        array = np.asarray(ids)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise LimeEdgeError(
                f"token ids: expected a non-empty list of integers, found shape {array.shape} {array.dtype}",
                "give at least one token id, in a flat list",
            )
        if array.min() < 0 or array.max() >= vocab:
            raise LimeEdgeError(
                f"token ids: expected 0..{vocab - 1}, found {array.min()}..{array.max()}",
                "they come from another tokenizer?",
            )
        return array.astype(np.int64, copy=False)

    def _note(self, tokens: int) -> None:
        name = describe_selection(self._selection)
        if self._segments and self._segments[-1].selection == name:
            tokens += self._segments.pop().tokens
        self._segments.append(Segment(name, tokens))

    # running

    def logits(self, input_ids: Sequence[int], keep: int = 0) -> np.ndarray:
        """Logits of a sequence of its own (a new cache).

        Args:
            input_ids: (S,) token ids. keep: only the last `keep` positions, 0 for all.
        Returns:
            (S or keep, V) float32; with keep=1 overwritten by the next call: copy it to keep it.
        """
        self.reset()
        return self._feed(input_ids, keep)

    def extend(self, input_ids: Sequence[int], keep: int = 1) -> np.ndarray:
        """Logits of tokens appended to what the cache holds: (keep or S, V) float32.

        With keep=1 the array is overwritten by the next call: copy it to keep it.
        """
        return self._feed(input_ids, keep)

    def generate(
        self,
        prompt: str | Sequence[int],
        options: GenerationOptions | None = None,
        keep_cache: bool = False,
        **changes: Any,
    ) -> Iterator[str]:
        """Stream the answer, piece by piece.

        Args:
            prompt: complete text (chat template applied) or token ids.
            options: see GenerationOptions; `changes` are fields of it (max_new_tokens=64).
            keep_cache: keep the longest prefix that the cache already holds.
        """
        options = replace(options or GenerationOptions(), **changes)
        codec = self.codec
        stream = TextStream(codec.decode, options.stop)
        for token in self.generate_ids(prompt, options, keep_cache):
            if piece := stream.push(token):
                yield piece
            if stream.stopped:
                self.finish_reason = STOP
                return
        if piece := stream.finish():
            yield piece

    def generate_ids(
        self, prompt: str | Sequence[int], options: GenerationOptions | None = None, keep_cache: bool = False
    ) -> Iterator[int]:
        """Stream token ids; as `generate`, without a tokenizer when the prompt is ids."""
        options = options or GenerationOptions()
        ids = self.codec.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_ids(ids)
        keeps = keep_cache and self._selection != ROUTED  # routing must see the whole prompt in one call
        shared = self._shared_prefix(ids) if keeps else 0
        self._rewind(shared)
        eos = self.bundle.manifest.model.get("eos", ())
        room = self._engine.capacity - len(ids)
        if room < 1:
            raise LimeEdgeError(f"the cache holds {self._engine.capacity} tokens, the prompt has {len(ids)}", ROOM)
        self.finish_reason, count = None, 0
        limit = min(options.max_new_tokens, room)
        step: Callable[[int], np.ndarray] = lambda token: self._feed([token], 1)[-1]  # noqa: E731
        for token in stream_tokens(self._feed(ids[shared:], 1)[-1], step, replace(options, max_new_tokens=limit), eos):
            count += 1
            yield token
        self.finish_reason = STOP if count < limit else (FULL if limit < options.max_new_tokens else LENGTH)

    def _shared_prefix(self, ids: Sequence[int]) -> int:
        """Tokens the cache already holds; at least one is left to feed."""
        count = 0
        for mine, theirs in zip(self._ids, ids[:-1], strict=False):
            if mine != theirs:
                break
            count += 1
        return count

    @property
    def codec(self) -> TextCodec:
        """Tokenizer and chat template, read when first needed."""
        if self._codec is None:
            self._codec = TextCodec(self.bundle.path / "tokenizer")
        return self._codec

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()
