"""The session: one loaded artifact, experts switched without reloading. The same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lime_edge.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.experts import ExpertBank, Selection, describe_selection, read_expert
from lime_edge.generate import GenerationOptions, TextStream, stream_tokens
from lime_edge.prompts import TextCodec

ROUTED = "routed"
ALWAYS_ON = ("dora", "slicefine", "prompt_tuning")  # no p gives the original layer back
CHUNK = 512  # prompt tokens fed at once: bounds the memory of a long prompt


@dataclass(frozen=True)
class SessionOptions:
    """How to load.

    threads: of the engine, None for the bundle's default. max_length: tokens the cache holds, None
    for the model's context or 2048, whichever is less. providers: execution providers to try, in
    order, instead of the bundle's.
    """

    threads: int | None = None
    max_length: int | None = None
    providers: tuple[str, ...] = ()


class Engine(Protocol):
    """What a runtime file provides: a model with a cache that takes an expert residual."""

    provider: str
    length: int
    capacity: int

    def set_expert(self, residual: np.ndarray) -> None:
        """Use d (sum_H,) float32 from the next call on."""

    def set_routed(self) -> None:
        """Weigh the bundle's own experts per token from the next call on."""

    def feed(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Append ids (S,) int64 to the cache; logits (keep or S, V) float32 of the last positions."""

    def rewind(self, length: int) -> None:
        """Forget the cache after its first `length` tokens."""


@dataclass(frozen=True)
class Segment:
    """A stretch of the cache: which selection filled it, and its number of tokens."""

    selection: str
    tokens: int


class Session:
    """An opened bundle on one target.

    "routed" mixes the experts of the checkpoint: that bank is frozen in the artifact, and experts
    installed later are pinned or blended, never routed to. A routed prompt is run in one call.

    A cache belongs to the expert that filled it. `use` starts a new cache when the selection
    changes, unless keep_cache=True; `cache` tells who filled what. `generate` starts a new sequence
    unless keep_cache=True, which keeps the longest common prefix.

    Use it as a context manager or let it go out of scope; it is not safe for several threads.
    """

    def __init__(self, bundle: Bundle, engine: Engine, bank: ExpertBank, target: str):
        self.bundle, self.target = bundle, target
        self._engine, self._bank = engine, bank
        self._codec: TextCodec | None = None
        self._ids: list[int] = []
        self._segments: list[Segment] = []
        self._single: str | None = bundle.manifest.adapter.get("single")
        self._variant: str = bundle.manifest.adapter.get("variant", "lora")
        self._selection: Selection = None
        first = self._single or (bank.names[0] if bank.names else None)
        self._apply(first)

    # experts

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the installed experts."""
        return self._bank.names

    @property
    def selection(self) -> Selection:
        """What is in use: an expert's name, a blend, or None."""
        return self._selection

    @property
    def provider(self) -> str:
        """The execution provider the engine took."""
        return self._engine.provider

    def use(self, selection: Selection, keep_cache: bool = False) -> None:
        """Switch the expert; nothing is reloaded.

        Args:
            selection: an expert's name, {name: weight} summing to 1, None for the original backbone,
                or "routed": the experts of the checkpoint weighed per token and site.
            keep_cache: keep what another expert wrote into the cache (then it is a mixture, and
                `cache` says so); otherwise the cache starts anew.
        Raises:
            LimeEdgeError: unknown name, bad weights, a single-expert bundle, a bundle without routing,
                or None for a variant that cannot be switched off.
        """
        self._apply(selection)
        if not keep_cache and any(s.selection != describe_selection(selection) for s in self._segments):
            self.reset()

    def _apply(self, selection: Selection) -> None:
        if self._single is not None:
            if selection != self._single:
                asked = describe_selection(selection)
                raise LimeEdgeError(f"this bundle holds {self._single!r} alone (--single), asked for {asked!r}",
                                    "export it without --single")  # fmt: skip
        elif selection == ROUTED:
            self._engine.set_routed()
        elif selection is None and self._variant in ALWAYS_ON:
            raise LimeEdgeError(f"a {self._variant} adapter cannot be switched off: no expert vector gives the "
                                "original layer", "pick an expert, or use the original model")  # fmt: skip
        else:
            self._engine.set_expert(self._bank.residual(selection))
        self._selection = dict(selection) if isinstance(selection, Mapping) else selection

    def install(self, path: Path | str, name: str | None = None) -> str:
        """Add an expert file while running; returns its name. Nothing is written.

        Raises:
            LimeEdgeError: damaged, NaN, wrong length, or made for another backbone.
        """
        expert = read_expert(Path(path))
        expert = replace(expert, name=name) if name else expert
        if self._single is not None:
            raise LimeEdgeError(f"this bundle holds {self._single!r} alone (--single)", "export it without --single")
        self._bank.install(expert, str(path))
        if self._uses(expert.name):
            self.reset()
            self._apply(self._selection)
        return expert.name

    def remove(self, name: str) -> None:
        """Forget an installed expert; the one in use cannot be removed."""
        if self._uses(name):
            raise LimeEdgeError(f"expert {name!r} is in use", "switch to another one first")
        self._bank.remove(name)

    def _uses(self, name: str) -> bool:
        used = self._selection
        return name == used if isinstance(used, str) else used is not None and name in used

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
            raise LimeEdgeError(f"the cache holds {self._engine.capacity} tokens, {total} are needed",
                                "shorten the prompt or open the session with a larger max_length")  # fmt: skip
        chunk = CHUNK
        if self._selection == ROUTED:
            if self._engine.length and array.size > 1:
                raise LimeEdgeError(f"routed: {array.size} tokens after a cache of {self._engine.length}",
                                    "a routed prompt is run in one call, then token by token")  # fmt: skip
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
        array = np.asarray(ids, dtype=np.int64)
        if array.ndim != 1 or array.size == 0:
            raise LimeEdgeError(f"token ids: expected a non-empty list, found shape {array.shape}")
        if array.min() < 0 or array.max() >= vocab:
            raise LimeEdgeError(f"token ids: expected 0..{vocab - 1}, found {array.min()}..{array.max()}")
        return array

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

    def generate(self, prompt: str | Sequence[int], options: GenerationOptions | None = None,
                 keep_cache: bool = False, **changes: Any) -> Iterator[str]:  # fmt: skip
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
                return
        if piece := stream.finish():
            yield piece

    def generate_ids(self, prompt: str | Sequence[int], options: GenerationOptions | None = None,
                     keep_cache: bool = False) -> Iterator[int]:  # fmt: skip
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
            raise LimeEdgeError(f"the cache holds {self._engine.capacity} tokens, the prompt has {len(ids)}",
                                "shorten it or open the session with a larger max_length")  # fmt: skip
        options = replace(options, max_new_tokens=min(options.max_new_tokens, room))
        step: Callable[[int], np.ndarray] = lambda token: self._feed([token], 1)[-1]  # noqa: E731
        yield from stream_tokens(self._feed(ids[shared:], 1)[-1], step, options, eos)

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
