"""From logits to text: sampling, stop strings, streaming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lime_edge.errors import Faults

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class GenerationOptions:
    """How to pick tokens and when to stop.

    max_new_tokens: at most this many. temperature: 0 is greedy. top_k: keep the k likeliest, 0 keeps
    all. top_p: keep the smallest set of that probability mass. seed: of the sampler. stop: strings
    that end the text and are not part of it. ignore_eos: generate on past the end token.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        with Faults("generation options", "lime-edge run --help explains each") as faults:
            if self.max_new_tokens < 1:
                faults.add("max_new_tokens", "at least 1", self.max_new_tokens)
            if not self.temperature >= 0:
                faults.add("temperature", "0 or more", self.temperature)
            if self.top_k < 0:
                faults.add("top_k", "0 or more", self.top_k)
            if not 0 < self.top_p <= 1:
                faults.add("top_p", "in (0, 1]", self.top_p)
            if any(not text for text in self.stop):
                faults.add("stop strings may not be empty")


def make_sampler(options: GenerationOptions) -> Callable[[np.ndarray], int]:
    """A function from logits (V,) to a token id, with a generator of its own."""
    if options.temperature == 0:
        return lambda logits: int(logits.argmax())
    random = np.random.default_rng(options.seed)

    def sample(logits: np.ndarray) -> int:
        probabilities = filter_probabilities(logits, options)
        return int(random.choice(probabilities.size, p=probabilities))

    return sample


def filter_probabilities(logits: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """softmax(logits / temperature) after top-k, then top-p (Holtzman et al., arXiv 1904.09751).

    Args:
        logits: (V,) float32.
    Returns:
        (V,) float64 that sums to 1.
    """
    scaled = logits.astype(np.float64) / options.temperature
    if 0 < options.top_k < scaled.size:
        threshold = np.partition(scaled, -options.top_k)[-options.top_k]
        scaled = np.where(scaled < threshold, -np.inf, scaled)
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if options.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        mass_before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[mass_before >= options.top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities


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
    pick = make_sampler(options)
    for count in range(options.max_new_tokens):
        token = pick(logits)
        if token in eos and not options.ignore_eos:
            return
        yield token
        if count + 1 < options.max_new_tokens:
            logits = step(token)
