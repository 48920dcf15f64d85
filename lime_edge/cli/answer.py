"""One answer: printed as it comes, timed, and what ended it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from lime_edge import terminal
from lime_edge.bundle.experts import Selection, describe_selection
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import FULL, IN_USE, LENGTH, STOP, Session
from lime_edge.session.generate import GenerationOptions, TextStream
from lime_edge.session.vision import VisionSession

INTERRUPTED = "interrupted"
CUT = 130  # the exit code after Ctrl-C, as shells have it


@dataclass(frozen=True)
class Answer:
    """What was said: text, tokens, seconds to the first token and in all, and what ended it."""

    text: str
    tokens: int
    first_s: float
    seconds: float
    ended: str | None

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first; None where there are none."""
        spent = self.seconds - self.first_s
        return (self.tokens - 1) / spent if self.tokens > 1 and spent > 0 else None

    def describe(self) -> str:
        """In one line: "12 tokens, first after 31 ms, then 180 tokens/s, ended by length"."""
        speed = f", then {self.tokens_per_s:.0f} tokens/s" if self.tokens_per_s else ""
        return f"{self.tokens} tokens, first after {self.first_s * 1e3:.0f} ms{speed}, ended by {self.ended}"

    def facts(self) -> dict[str, Any]:
        """As --json prints it."""
        return {
            "answer": self.text,
            "tokens": self.tokens,
            "finish_reason": self.ended,
            "first_token_ms": self.first_s * 1e3,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
        }


def compose_prompt(
    session: Session,
    prompt: str,
    system: str | None,
    raw: bool,
    images: Sequence[Any] = (),
    selection: Selection = IN_USE,
) -> str | list[int]:
    """What a session is given for a user's text: complete text, or with pictures its token ids.

    Args:
        images: files or opened pictures, in the order of their placeholders; before the text where the chat template is
            applied.
        selection: under which they are seen; by default the one in use.
    Raises:
        LimeEdgeError: pictures for a model that sees none, or see `VisionSession.read_prompt`.
    """
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
    if isinstance(session, VisionSession):
        return session.read_prompt(prompt if raw else messages, images, selection)
    if images:
        raise LimeEdgeError(
            f"`image`: {session.bundle.path} holds a language model: it sees no pictures",
            "take a vision-language bundle",
        )
    return prompt if raw else session.codec.render_chat(messages)


def answer_once(
    session: Session,
    prompt: str,
    options: GenerationOptions,
    system: str | None,
    raw: bool,
    as_json: bool,
    images: Sequence[Path] = (),
) -> None:
    """Print the answer to one prompt, as it comes or as one JSON document."""
    text = compose_prompt(session, prompt, system, raw, images)
    answer = stream_answer(session, text, options, show=not as_json)
    if as_json:
        facts = {"expert": describe_selection(session.selection), "target": session.target, "prompt": prompt}
        terminal.print_json(facts | {"provider": session.provider} | answer.facts())
    say_limits(session, answer, options)
    if answer.ended == INTERRUPTED:
        raise typer.Exit(CUT)


def stream_answer(
    session: Session,
    prompt: str | Sequence[int],
    options: GenerationOptions,
    keep_cache: bool = False,
    show: bool = True,
) -> Answer:
    """Generate an answer and print its pieces; Ctrl-C ends it and keeps what there is."""
    pieces: list[str] = []
    begin = time.perf_counter()
    first, tokens, ended = 0.0, 0, ""
    stream = TextStream(session.codec.decode, options.stop)

    def give(piece: str) -> None:
        pieces.append(piece)
        if show:
            print(piece, end="", flush=True)

    try:
        with closing(session.generate_ids(prompt, options, keep_cache)) as ids:  # type: ignore[type-var]
            for token in ids:
                tokens += 1
                first = first or time.perf_counter() - begin
                give(stream.push(token))
                if stream.stopped:
                    ended = STOP
                    break
        give(stream.finish())
    except KeyboardInterrupt:
        ended = INTERRUPTED
    if show:
        print()
    seconds = time.perf_counter() - begin
    return Answer("".join(pieces), tokens, first or seconds, seconds, ended or session.finish_reason)


def say_limits(session: Session, answer: Answer, options: GenerationOptions) -> None:
    """Say on standard error that a limit, or the user, cut the answer, and which."""
    if answer.ended == FULL:
        room = "a larger --max-length, or where the cache is static an export with a larger --max-seq-len, makes room"
        terminal.note(f"(cut short: the cache of {session.max_length} tokens is full; {room})")
    elif answer.ended == LENGTH:
        terminal.note(f"(cut short after {options.max_new_tokens} tokens; a larger --max-new-tokens gives more)")
    elif answer.ended == INTERRUPTED:
        terminal.note("(interrupted)")
