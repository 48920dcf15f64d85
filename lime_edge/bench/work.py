"""What the benchmark gives each kind of model to do: prompts and answers, or calls. One class a kind, found once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lime_edge.bench.energy import Meter, spend_calls, spend_tokens
from lime_edge.bench.inputs import draw_inputs, draw_prompt, takes_text
from lime_edge.bench.rounds import Series, time_decoder, time_encoder
from lime_edge.bench.timing import time_round
from lime_edge.bundle.bundle import Bundle
from lime_edge.session.kinds import DECODER, ENCODER, VISION, find_kind

Count = Callable[[int, int], None]


@dataclass(frozen=True)
class Load:
    """How much: tokens of each prompt, tokens decoded after it, and in the cache before (None: the prompt's)."""

    lengths: Sequence[int]
    decoded: int
    depth: int | None = None

    @property
    def filled(self) -> int:
        """Tokens a cache must hold."""
        return max(*self.lengths, self.depth or 0) + self.decoded


class Work(Protocol):
    """One kind of model at work. decodes: whether it has steps whose speed memory bounds."""

    name: str
    decodes: bool

    def count_tokens(self, load: Load) -> int:
        """Tokens that the model's context must hold."""

    def takes_text(self, session: Any) -> bool:
        """Whether an input's length is a number of tokens."""

    def describe(self, load: Load, length: int) -> dict[str, int | None]:
        """`gen_tokens` and `depth` of a run."""

    def answer(self, session: Any, load: Load) -> None:
        """Once, untimed."""

    def time(
        self, session: Any, baseline: Any, load: Load, warmup: int, repeat: int, progress: Count
    ) -> dict[int, Series]:
        """Every length, in rounds; the baseline (None: there is none) in the same ones."""

    def spend(self, meter: Meter, session: Any, load: Load, length: int) -> dict[str, Any]:
        """Joules of one length's work."""


class DecoderWork:
    """Prompts, and the tokens after them."""

    name, decodes = DECODER.name, True

    def count_tokens(self, load: Load) -> int:
        """Prompt, or depth, and answer."""
        return load.filled

    def takes_text(self, session: Any) -> bool:
        """Always."""
        return True

    def describe(self, load: Load, length: int) -> dict[str, int | None]:
        """What is decoded, and how deep in the cache."""
        return {"gen_tokens": load.decoded, "depth": length if load.depth is None else load.depth}

    def answer(self, session: Any, load: Load) -> None:
        """One prompt and its answer."""
        vocab = session.bundle.manifest.backbone.vocab
        before = None if load.depth is None else draw_prompt(vocab, load.depth)
        time_round(session, draw_prompt(vocab, load.lengths[0]), load.decoded, before)

    def time(
        self, session: Any, baseline: Any, load: Load, warmup: int, repeat: int, progress: Count
    ) -> dict[int, Series]:
        """Rounds of prompts, answers and switches."""
        return time_decoder(session, baseline, load.lengths, load.decoded, load.depth, warmup, repeat, progress)

    def spend(self, meter: Meter, session: Any, load: Load, length: int) -> dict[str, Any]:
        """Joules a token."""
        return spend_tokens(meter, session, length, load.depth, load.decoded)


class VisionWork(DecoderWork):
    """The language model of one that sees: prompts without pictures."""

    name = VISION.name


class EncoderWork:
    """One call, one answer: texts of a length, or images of the model's own size."""

    name, decodes = ENCODER.name, False

    def count_tokens(self, load: Load) -> int:
        """The longest text."""
        return max(load.lengths)

    def takes_text(self, session: Any) -> bool:
        """Not where it takes images."""
        return takes_text(session)

    def describe(self, load: Load, length: int) -> dict[str, int | None]:
        """Nothing is decoded."""
        return {"gen_tokens": None, "depth": None}

    def answer(self, session: Any, load: Load) -> None:
        """One call."""
        session.run(**draw_inputs(session, load.lengths[0]))

    def time(
        self, session: Any, baseline: Any, load: Load, warmup: int, repeat: int, progress: Count
    ) -> dict[int, Series]:
        """Rounds of calls and switches; one length where there is no text."""
        lengths = load.lengths if self.takes_text(session) else load.lengths[:1]
        return time_encoder(session, baseline, lengths, warmup, repeat, progress)

    def spend(self, meter: Meter, session: Any, load: Load, length: int) -> dict[str, Any]:
        """Joules a call."""
        return spend_calls(meter, session, length)


WORKS: dict[str, Work] = {work.name: work for work in (DecoderWork(), VisionWork(), EncoderWork())}


def find_work(bundle: Bundle) -> Work:
    """What a bundle's kind of model is given to do."""
    return WORKS[find_kind(bundle).name]
