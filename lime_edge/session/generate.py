"""From logits to text: options, stop strings, streaming."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from lime_edge.errors import Faults
from lime_edge.session.sampling import make_sampler

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class GenerationOptions:
    """How to pick tokens and when to stop; docs/sampling.md says each step.

    max_new_tokens: at most this many. temperature: 0 is greedy. top_k: keep the k likeliest, 0 keeps
    all. top_p: keep the smallest set of that probability mass. seed: of the sampler, 0..2^64 - 1. stop: strings
    (or one) that end the text and are not part of it. ignore_eos: generate on past the end token.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        with Faults("generation options", "lime-edge run --help explains each") as faults:
            _check_number(faults, "max_new_tokens", self.max_new_tokens, Integral, "a whole number, at least 1", 1)
            _check_number(faults, "temperature", self.temperature, Real, "a finite number, 0 or more", 0)
            _check_number(faults, "top_k", self.top_k, Integral, "a whole number, 0 or more", 0)
            _check_number(faults, "top_p", self.top_p, Real, "in (0, 1]", 0, 1)
            if self.top_p == 0:
                faults.add("top_p", "in (0, 1]", self.top_p)
            if self.seed is not None:
                _check_number(faults, "seed", self.seed, Integral, "a whole number in 0..2^64 - 1", 0, 2**64 - 1)
            stop = (self.stop,) if isinstance(self.stop, str) or not isinstance(self.stop, Sequence) else self.stop
            if not all(isinstance(text, str) for text in stop):
                faults.add("stop", "strings", self.stop)
            elif not all(stop):
                faults.add("stop strings may not be empty")
        object.__setattr__(self, "stop", tuple(stop))


def _check_number(
    faults: Faults, name: str, value: object, kind: type, wanted: str, least: float, most: float = math.inf
) -> None:
    """Note a fault where `value` is no number of that kind, or out of its range; infinity and NaN are in none."""
    fits = isinstance(value, kind) and not isinstance(value, bool)
    try:
        finite = kind is Integral or (fits and math.isfinite(value))  # type: ignore[arg-type]
    except OverflowError:  # a whole number that no float holds
        finite = False
    if not (fits and finite and least <= value <= most):  # type: ignore[operator]
        faults.add(name, wanted, value)


class TextStream:
    """Turns token ids into pieces of text that are safe to print, and watches for stop strings.

    A piece is held back while it may still change: bytes of an unfinished character, or the
    beginning of a stop string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._given = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; return the text that became certain (maybe empty)."""
        self._ids.append(token)
        text = self._decode(self._ids)
        found = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(text[: min(found)])
        safe = len(text.rstrip(REPLACEMENT)) if text.endswith(REPLACEMENT) else len(text)
        return self._give(text[: min(safe, self._stop_begins(text))])

    def finish(self) -> str:
        """The text still held back when generation ends without a stop string."""
        return "" if self.stopped else self._give(self._decode(self._ids))

    def _stop_begins(self, text: str) -> int:
        """Where the longest tail of `text` starts that a stop string begins with."""
        for length in range(min(len(text), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return len(text) - length
        return len(text)

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece


def stream_tokens(
    logits: np.ndarray, step: Callable[[int], np.ndarray], options: GenerationOptions, eos: Sequence[int]
) -> Iterator[int]:
    """Pick tokens until eos or the limit.

    Args:
        logits: (V,) after the prompt. step: feeds one token and returns the next logits (V,).
    Yields:
        Token ids, the end token not among them.
    """
    pick = make_sampler(options.temperature, options.top_k, options.top_p, options.seed)
    for count in range(options.max_new_tokens):
        token = pick(logits)
        if token in eos and not options.ignore_eos:
            return
        yield token
        if count + 1 < options.max_new_tokens:
            logits = step(token)
