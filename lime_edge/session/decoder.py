"""The session: one loaded artifact, experts switched without reloading. The same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import NONE, ROUTED, ExpertBank, Selection, describe_selection
from lime_edge.bundle.prompts import TextCodec
from lime_edge.errors import LimeEdgeError
from lime_edge.session.batch import FULL, LENGTH, STOP
from lime_edge.session.cache import ROOM, Cache, Segment
from lime_edge.session.desk import Desk
from lime_edge.session.engines import Engine
from lime_edge.session.generate import GenerationOptions, TextStream, stream_tokens
from lime_edge.session.many import Answers, open_answers, read_logits
from lime_edge.session.prefixes import PrefixCache
from lime_edge.session.requests import MOST_ROWS, AnyRequest, open_rows
from lime_edge.session.switching import ExpertSwitch
from lime_edge.session.turn import Turn

IN_USE: Any = object()  # in the place of a selection: the session's own


class Session(ExpertSwitch):
    """An opened language model on one target. A routed prompt is run in one call.

    A cache belongs to the expert that filled it. `use` starts a new cache when the selection
    changes, unless keep_cache=True; `cache` tells who filled what. `generate` starts a new sequence
    unless keep_cache=True, which keeps the longest common prefix. `finish_reason` says why the last
    generation ended: "stop" (end token or stop string), "length" (max_new_tokens), "cache" (it is
    full), None before the first and where one was left before its end.

    One generation at a time: whatever changes cache or expert under a running one ends it with an error at its
    next token, never with an answer that is half another's. One thread at a time: the first that uses the session
    owns it, any other is refused; `hand_over` gives it on. Sessions share nothing: open one per thread.

    Use it as a context manager or let it go out of scope.
    """

    def __init__(self, bundle: Bundle, engine: Engine, bank: ExpertBank, target: str):
        self._engine = engine
        self._codec: TextCodec | None = None
        self._turn = Turn()
        self.prefixes = PrefixCache()
        self.finish_reason: str | None = None
        self._header = find_header(bundle)
        self._cache = Cache(engine, target)
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
        before = self._selection
        super().use(selection)
        if self._selection != before:
            self._turn.disturb("use")
        if not keep_cache and not self._cache.is_filled_by(self._label):
            self._turn.disturb("use")
            self._cache.rewind(self._cache.common)

    def install(self, path: Path | str, name: str | None = None) -> str:
        """Add an expert file while running; see ExpertSwitch.install. Replacing the one in use starts a new cache."""
        installed = super().install(path, name)
        if self._uses(installed):
            self._turn.disturb("install")
        return installed

    # the cache

    @property
    def cache(self) -> tuple[Segment, ...]:
        """Who filled the cache, in order."""
        return self._cache.segments

    @property
    def max_length(self) -> int:
        """Tokens the cache holds."""
        return self._engine.capacity

    @property
    def _label(self) -> str:
        return describe_selection(self._selection)

    def reset(self) -> None:
        """Start a new cache."""
        self._owner.check()
        self._turn.disturb("reset")
        self._cache.rewind(0)

    def count_silent(self, ids: Sequence[int]) -> int:
        """The tokens of a prompt that the original model reads: all but the last ones where the expert acts from the
        generation prompt on, none where it always acts."""
        return max(0, len(ids) - self._header) if self._header else 0

    def _read(self, ids: Sequence[int], start: int, keep: int) -> np.ndarray:
        """Append a prompt from token `start` on; logits of its last `keep` positions (0: all from there on)."""
        silent = self.count_silent(ids)
        if start >= silent:
            return self._feed(ids[start:], keep)
        wanted = max(0, keep - (len(ids) - silent)) if keep else silent - start
        self._switchable.set_expert(self._bank.residual(None))
        try:
            head = self._cache.feed(self._check_ids(ids[start:silent]), max(wanted, 1), NONE, False)
            head = head.copy() if wanted else head[:0]
            if start <= self._cache.common:
                self._cache.common = silent
        finally:
            self._apply(self._selection)
        tail = self._feed(ids[silent:], min(keep, len(ids) - silent))
        return np.concatenate([head, tail]) if wanted else tail

    def _feed(self, ids: Sequence[int], keep: int) -> np.ndarray:
        """Append tokens under the selection; logits of the last `keep` positions of this call (0: all)."""
        array, routed = self._check_ids(ids), self._selection == ROUTED
        if keep < 0:
            raise LimeEdgeError(f"keep: expected 0 or more, found {keep}", "0 keeps the logits of every position")
        if routed and array.size > 1 and len(self._cache) and not self._header:
            raise LimeEdgeError(
                f"routed: {array.size} tokens after a cache of {len(self._cache)}",
                "a routed prompt is run in one call, then token by token",
            )
        return self._cache.feed(array, keep, self._label, routed)

    def _check_ids(self, ids: Sequence[int]) -> np.ndarray:
        vocab = self.bundle.manifest.backbone.vocab
        try:
            array = np.asarray(ids)
        except ValueError:  # lists of several lengths
            array = np.empty(0, object)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise LimeEdgeError(
                f"token ids: expected a non-empty list of integers, found shape {array.shape} {array.dtype}",
                "give at least one token id, in a flat list",
            )
        if array.min() < 0 or array.max() >= vocab and not self._knows(array):
            raise LimeEdgeError(
                f"token ids: expected 0..{vocab - 1}, found {array.min()}..{array.max()}",
                "they come from another tokenizer?",
            )
        return array.astype(np.int64, copy=False)

    def _knows(self, ids: np.ndarray) -> bool:
        """Whether ids beyond the vocabulary mean something: rows of pictures, where the model sees."""
        return False

    # running

    def logits(self, input_ids: Sequence[int], keep: int = 0) -> np.ndarray:
        """Logits of a sequence of its own (a new cache).

        Args:
            input_ids: (S,) token ids. keep: only the last `keep` positions, 0 for all.
        Returns:
            (S or keep, V) float32; with keep=1 overwritten by the next call: copy it to keep it.
        """
        self._owner.check()
        self._turn.disturb("logits")
        self._cache.rewind(0)
        return self._read(self._check_ids(input_ids).tolist(), 0, keep)

    def extend(self, input_ids: Sequence[int], keep: int = 1) -> np.ndarray:
        """Logits of tokens appended to what the cache holds: (keep or S, V) float32.

        With keep=1 the array is overwritten by the next call: copy it to keep it.
        """
        self._owner.check()
        self._turn.disturb("extend")
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
            keep_cache: keep the longest prefix that the cache already holds (docs/sampling.md says what that changes).
        Yields:
            Text, as soon as it is certain. Nothing is checked or computed before the first piece is asked for.
        Raises:
            LimeEdgeError: bad ids or options, no room, logits that are no numbers, an engine that fails; after a
                piece, that something else changed the session's cache or expert, or that another thread goes on.
        """
        options = replace(options or GenerationOptions(), **changes)
        stream = TextStream(self.codec.decode, options.stop)
        for token in self._run(prompt, options, keep_cache, lambda: stream.stopped):
            if piece := stream.push(token):
                yield piece
        if piece := stream.finish():
            yield piece

    def generate_ids(
        self, prompt: str | Sequence[int], options: GenerationOptions | None = None, keep_cache: bool = False
    ) -> Iterator[int]:
        """Stream token ids; as `generate`, without a tokenizer when the prompt is ids."""
        return self._run(prompt, options or GenerationOptions(), keep_cache, lambda: False)

    def _run(
        self, prompt: str | Sequence[int], options: GenerationOptions, keep_cache: bool, stopped: Callable[[], bool]
    ) -> Iterator[int]:
        """One generation, from its first `next` on.

        Args:
            stopped: asked after every token: has the text come to a stop string?
        Raises:
            LimeEdgeError: bad ids, no room, or, after a token, that something changed cache or expert meanwhile.
        """
        self._owner.check()
        ids = self.read_prompt(prompt)
        room = self._engine.capacity - len(ids)
        if room < 1:
            raise LimeEdgeError(f"the cache holds {self._engine.capacity} tokens, the prompt has {len(ids)}", ROOM)
        turn = self._turn.begin()
        kept = self._count_kept(ids, keep_cache)
        self._cache.rewind(kept)
        self.finish_reason, count = None, 0
        limit = min(options.max_new_tokens, room)
        why = FULL if limit < options.max_new_tokens else LENGTH
        step: Callable[[int], np.ndarray] = lambda token: self._feed([token], 1)[-1]  # noqa: E731
        first, options = self._read(ids, kept, 1)[-1], replace(options, max_new_tokens=limit)
        for token in stream_tokens(first, step, options, self.eos):
            count += 1
            yield token
            self._owner.check()
            self._turn.check(turn)
            if stopped():
                self.finish_reason = STOP
                return
        self.finish_reason = STOP if count < limit else why

    def _count_kept(self, ids: Sequence[int], keep_cache: bool) -> int:
        """Tokens of a prompt that need not be read again.

        What the original model read is kept without being asked for: it is the same for every expert. Two tokens at
        least are left to read, for a call of one may round otherwise; and routing must see all of its own in one call.
        """
        silent = self.count_silent(ids)
        kept = self._cache.count_kept(ids, [NONE] * silent + [self._label] * (len(ids) - silent))
        if not keep_cache:
            kept = min(kept, silent, self._cache.common)
        elif self._selection == ROUTED:
            kept = min(kept, silent)
        kept = min(kept, max(silent, len(ids) - 2))
        return kept - 1 if 0 < kept == silent - 1 else kept

    # many at once

    def generate_many(
        self,
        requests: Iterable[AnyRequest],
        options: GenerationOptions | None = None,
        rows: int = MOST_ROWS,
        memory: int | None = None,
        **changes: Any,
    ) -> Answers:
        """Answer many requests in one pass, each under an expert of its own.

        Rows start, end and are refilled while others go on; a long prompt is read in pieces between their steps; a
        beginning that requests share under the same expert is read once. Row for row the answers are those of a session
        of its own (in a quantized bundle the number of rows may tip a token that is about as likely as another). The
        session's own cache and selection play no part: a row keeps the expert it began with.

        Args:
            requests: (prompt, selection) each, or (prompt, selection, GenerationOptions); selections as for `use`.
            options: for all that have none of their own; `changes` are fields of it.
            rows: at most this many run at once, the others wait. memory: bytes that the caches of all rows may take.
        Returns:
            An iterator of (row, piece): which request, and text as soon as it is certain. `Answers` tells more.
        Raises:
            LimeEdgeError: at once, and before anything is computed: a request that is wrong or does not fit, by its
                number; an engine that runs one sequence. While it runs: see Answers.
        """
        return self._open_answers(requests, options, rows, memory, True, changes)

    def generate_many_ids(
        self,
        requests: Iterable[AnyRequest],
        options: GenerationOptions | None = None,
        rows: int = MOST_ROWS,
        memory: int | None = None,
        **changes: Any,
    ) -> Answers:
        """As `generate_many`, but (row, token id), stop strings left out of account; needs no tokenizer for ids."""
        return self._open_answers(requests, options, rows, memory, False, changes)

    def _open_answers(
        self,
        requests: Iterable[AnyRequest],
        options: GenerationOptions | None,
        rows: int,
        memory: int | None,
        as_text: bool,
        changes: dict[str, Any],
    ) -> Answers:
        self._owner.check()
        options = replace(options or GenerationOptions(), **changes)
        return open_answers(self, list(requests), options, rows, memory, as_text)

    def open_desk(
        self,
        rows: int = MOST_ROWS,
        capacity: int | None = None,
        memory: int | None = None,
        queue: int | None = None,
        keep_prompts: bool = False,
    ) -> Desk:
        """A desk that takes requests while others run: what a server stands on.

        Args:
            rows: at most this many run at once. capacity: tokens that a row holds, None for `max_length`. memory: bytes
                that the caches of all rows may take (fewer rows, where they are more). queue: requests that may wait.
            keep_prompts: keep every prompt in `prefixes`, for requests to come that begin alike under the same expert.
        Raises:
            LimeEdgeError: an engine that runs one sequence; no row fits; rows, capacity or queue out of range.
        """
        self._owner.check()
        if queue is not None and queue < 0:
            raise LimeEdgeError(f"queue: expected 0 or more, or None, found {queue}", "0: who finds no row is refused")
        made = open_rows(self, rows, self.max_length if capacity is None else capacity, memory)
        return Desk(self, made, True, queue, keep_prompts)

    def logits_many(self, requests: Iterable[tuple[str | Sequence[int], Selection]], keep: int = 0) -> list[np.ndarray]:
        """Logits of many sequences, each under an expert of its own; a beginning they share under one is read once.

        Args:
            requests: (text or (S,) token ids, selection) each. keep: only the last `keep` positions, 0 for all.
        Returns:
            (S or keep, V) float32 each, in order.
        Raises:
            LimeEdgeError: see `generate_many`.
        """
        self._owner.check()
        if keep < 0:
            raise LimeEdgeError(f"keep: expected 0 or more, found {keep}", "0 keeps the logits of every position")
        return read_logits(self, list(requests), keep)

    # what it knows

    def check_owner(self) -> None:
        """Refuse another thread than the session's own.

        Raises:
            LimeEdgeError: it belongs to another.
        """
        self._owner.check()

    def read_prompt(
        self, prompt: str | Sequence[Any], images: Sequence[Any] = (), selection: Selection = IN_USE
    ) -> list[int]:
        """The token ids of a complete prompt, checked.

        Args:
            images, selection: for a model that sees, see `VisionSession.read_prompt`.
        Raises:
            LimeEdgeError: none, ids that the model has not, or pictures.
        """
        if len(images):
            raise LimeEdgeError(
                f"{self.bundle.path} holds a language model: it sees no pictures", "take a vision-language bundle"
            )
        if not isinstance(prompt, str | Sequence | np.ndarray) or isinstance(prompt, bytes):
            raise LimeEdgeError(
                f"prompt: expected text or token ids, found {type(prompt).__name__}", "see codec.encode"
            )
        ids = self.codec.encode(prompt) if isinstance(prompt, str) else prompt
        return self._check_ids(cast(Sequence[int], ids)).tolist()

    @property
    def engine(self) -> Engine:
        """What runs the model."""
        return self._engine

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        facts = self.bundle.manifest.decoder
        return () if facts is None else facts.eos

    @property
    def codec(self) -> TextCodec:
        """Tokenizer and chat template, read when first needed."""
        if self._codec is None:
            self._codec = TextCodec(self.bundle.path / "tokenizer", self.bundle.manifest.prompts)
        return self._codec

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.release()
        self.reset()


def find_header(bundle: Bundle) -> int:
    """How many of a prompt's last tokens the expert acts on: 0 for one that always acts (lime.json, `activation`)."""
    return getattr(getattr(bundle.manifest, "activation", None), "tokens", 0)
