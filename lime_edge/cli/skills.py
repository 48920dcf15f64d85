"""One text, many skills: the answers of several experts in one pass, in a table that fills while they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from lime_edge import terminal
from lime_edge.bundle.experts import Selection, describe_selection, parse_selection
from lime_edge.bundle.vision.pictures import open_picture
from lime_edge.cli.answer import INTERRUPTED, compose_prompt
from lime_edge.errors import LimeEdgeError, show_plain
from lime_edge.session.decoder import Session
from lime_edge.session.desk import Piece
from lime_edge.session.generate import GenerationOptions, TextStream
from lime_edge.session.vision import VisionSession

ALL = "all"
PER_SECOND = 8  # pictures of the table
Prompt = str | list[int]
Compose = Callable[[Selection], Prompt]


@dataclass
class Skill:
    """One expert's answer as it grows. first_s: when its first token came; reason: None while it goes on."""

    selection: Selection
    text: str = ""
    tokens: int = 0
    first_s: float | None = None
    reason: str | None = None

    def facts(self) -> dict[str, Any]:
        """As --json prints it."""
        first = None if self.first_s is None else self.first_s * 1e3
        facts = {"expert": describe_selection(self.selection), "answer": self.text, "tokens": self.tokens}
        return facts | {"finish_reason": self.reason, "first_token_ms": first}


@dataclass
class Pass:
    """All of them. rows: at once; nbytes: of their caches; prompts_s, steps_s: seconds reading and answering."""

    skills: list[Skill]
    rows: int = 1
    nbytes: int = 0
    seconds: float = 0.0
    prompts_s: float = 0.0
    steps_s: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(skill.tokens for skill in self.skills)

    def describe(self) -> str:
        """In one line."""
        later = sum(max(0, skill.tokens - 1) for skill in self.skills)  # the first one comes of the prompt
        speed = f", then {later / self.steps_s:.0f} tokens/s together" if later and self.steps_s else ""
        memory = f"; {self.rows} rows, caches of {terminal.show_size(self.nbytes)}" if self.nbytes else ""
        return (
            f"{len(self.skills)} skills, {self.tokens} tokens in {self.seconds:.2f} s: prompts {self.prompts_s:.2f} s"
            f"{speed}{memory}"
        )


def asks_for_many(text: str | None, experts: Sequence[str]) -> bool:
    """Whether --expert names several: all, or a,b,c (a blend has weights; an expert may have a name like these)."""
    return text is not None and text not in experts and "=" not in text and (text.lower() == ALL or "," in text)


def read_selections(text: str, experts: Sequence[str]) -> list[Selection]:
    """The experts that `all` or a,b,c means; none and routed may be among them.

    Raises:
        LimeEdgeError: no name between two commas, or one twice.
    """
    if text.lower() == ALL:
        return list(experts)
    names = [name.strip() for name in text.split(",")]
    if any(name.lower() == ALL and name not in experts for name in names):
        raise LimeEdgeError(f"`expert`: {text!r}: all stands alone", "write a,b,c, or all")
    if not all(names) or len(set(names)) < len(names):
        raise LimeEdgeError(f"`expert`: {text!r}: a name is missing or there twice", "write a,b,c, or all")
    return [parse_selection(name) for name in names]


def answer_many(
    session: Session,
    prompt: str,
    selections: Sequence[Selection],
    options: GenerationOptions,
    system: str | None,
    raw: bool,
    as_json: bool,
    images: Sequence[Path] = (),
) -> Pass:
    """Print every expert's answer to one prompt: as a table that fills, or as one JSON document."""
    shown = [open_picture(image) for image in images] if isinstance(session, VisionSession) else images

    def compose(selection: Selection) -> Prompt:  # a picture may look different to each
        return compose_prompt(session, prompt, system, raw, shown, selection)

    done = Pass([Skill(selection) for selection in selections])
    with show_table(prompt, done, not as_json) as refresh:
        try:
            run_skills(session, compose, done, options, refresh)
        except KeyboardInterrupt:
            for skill in done.skills:
                skill.reason = skill.reason or INTERRUPTED
    done.seconds = time.perf_counter() - done.begun
    if as_json:
        facts = {"prompt": prompt, "target": session.target, "provider": session.provider}
        counted = {name: getattr(done, name) for name in ("rows", "nbytes", "seconds", "prompts_s", "steps_s")}
        terminal.print_json(facts | counted | {"answers": [skill.facts() for skill in done.skills]})
    else:
        terminal.out.print(draw_table(prompt, done))
        terminal.note(done.describe())
    return done


def run_skills(session: Session, compose: Compose, done: Pass, options: GenerationOptions, refresh: Any) -> None:
    """Answer in one pass where the engine can, else one after another."""
    if not hasattr(session.engine, "open_rows"):
        terminal.note(f"({session.target} runs one sequence at a time: the answers come one after another)")
        run_one_by_one(session, compose, done, options, refresh)
        return
    prompts = [session.read_prompt(compose(skill.selection)) for skill in done.skills]
    needed = max(map(len, prompts)) + options.max_new_tokens
    desk = session.open_desk(rows=len(done.skills), capacity=min(session.max_length, needed))
    asked = zip(prompts, done.skills, strict=True)
    places = {desk.ask(prompt, skill.selection, options): skill for prompt, skill in asked}
    done.rows, done.nbytes = desk.rows, desk.nbytes
    while desk.busy:
        for piece in desk.advance():
            take(places[piece.number], piece, done)
        done.prompts_s, done.steps_s = desk.prompts_s, desk.steps_s
        refresh()


def take(skill: Skill, piece: Piece, done: Pass) -> None:
    """Note what came.

    Raises:
        LimeEdgeError: the request failed.
    """
    if piece.fault is not None:
        raise LimeEdgeError(f"{describe_selection(skill.selection)}: {piece.fault.problem}", piece.fault.hint)
    skill.text, skill.tokens, skill.reason = skill.text + piece.text, piece.new_tokens, piece.reason
    if skill.tokens and skill.first_s is None:
        skill.first_s = time.perf_counter() - done.begun


def run_one_by_one(session: Session, compose: Compose, done: Pass, options: GenerationOptions, refresh: Any) -> None:
    """The same answers from an engine that runs one sequence at a time."""
    for skill in done.skills:
        session.use(skill.selection)
        stream, begun, last = TextStream(session.codec.decode, options.stop), time.perf_counter(), 0.0
        for token in session.generate_ids(compose(skill.selection), options):
            last = time.perf_counter()
            if skill.first_s is None:
                skill.first_s, done.prompts_s = last - done.begun, done.prompts_s + last - begun
                begun = last
            skill.tokens += 1
            skill.text += stream.push(token)
            refresh()
            if stream.stopped:
                break
        done.steps_s += max(0.0, last - begun)
        skill.text += stream.finish()
        skill.reason = "stop" if stream.stopped else session.finish_reason


def draw_table(title: str, done: Pass) -> Table:
    """Expert, answer, tokens and what ended it."""
    table = Table(title=Text(show_plain(f"input: {title}")), title_justify="left", title_style="bold")
    for header in ("expert", "answer"):
        table.add_column(header, overflow="fold")
    table.add_column("tokens", justify="right")
    table.add_column("ended by")
    for skill in done.skills:
        ended = skill.reason or ("..." if skill.tokens else "")
        table.add_row(
            Text(show_plain(describe_selection(skill.selection))),
            Text(show_plain(skill.text)),
            str(skill.tokens),
            ended,
        )
    return table


@contextmanager
def show_table(title: str, done: Pass, wanted: bool) -> Iterator[Any]:
    """Yield what draws the table anew (seldom enough); nothing is drawn where nobody watches, or quiet is wanted."""
    if not wanted or terminal.is_quiet() or not terminal.out.is_terminal:
        yield lambda: None
        return
    with Live(console=terminal.out, auto_refresh=False, transient=True, vertical_overflow="ellipsis") as live:
        drawn = 0.0

        def refresh() -> None:
            nonlocal drawn
            if (now := time.perf_counter()) - drawn >= 1 / PER_SECOND:
                live.update(draw_table(title, done), refresh=True)
                drawn = now

        yield refresh
