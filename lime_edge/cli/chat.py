"""One-shot answers and the chat of `lime-edge run`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from lime_edge import terminal
from lime_edge.bundle.experts import describe_selection, parse_selection
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import FULL, Session
from lime_edge.session.generate import GenerationOptions

COMMANDS = {
    "/expert NAME": "switch: NAME, none, or NAME=WEIGHT,NAME=WEIGHT; the next answer reads the whole chat anew",
    "/experts": "list the experts",
    "/install FILE": "add an expert file while running",
    "/cache": "who filled the cache",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave (or end of input)",
}


def answer_once(session: Session, prompt: str, options: GenerationOptions, system: str | None, raw: bool) -> None:
    """Print the answer to one prompt as it comes."""
    text = prompt if raw else session.codec.render_chat(_messages(system, [("user", prompt)]))
    for piece in session.generate(text, options):
        print(piece, end="", flush=True)
    print()
    warn_of_full_cache(session)


def warn_of_full_cache(session: Session) -> None:
    """Say that an answer ended because the cache did."""
    if session.finish_reason == FULL:
        room = "a larger --max-length, or for executorch and coreml an export with a larger --max-seq-len, makes room"
        text = f"(cut short: the cache of {session.max_length} tokens is full; {room})"
        terminal.err.print(text, markup=False, soft_wrap=True)


def _messages(system: str | None, turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    first = [("system", system)] if system else []
    return [{"role": role, "content": content} for role, content in [*first, *turns]]


class Chat:
    """A conversation at the terminal, or line by line from a pipe."""

    def __init__(self, session: Session, options: GenerationOptions, system: str | None, raw: bool):
        if not raw and not session.codec.can_chat:
            raise LimeEdgeError("this model has no chat template", "pass --raw and complete prompts")
        self.session, self.options, self.system, self.raw = session, options, system, raw
        self.turns: list[tuple[str, str]] = []

    def loop(self) -> None:
        """Read lines until /quit or the end of input."""
        using = describe_selection(self.session.selection)
        self._say(f"using {using}; experts: {', '.join(self.session.experts)}; /help lists the commands")
        while True:
            try:
                line = self._ask()
            except EOFError:
                return
            if line.strip() == "/quit":
                return
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    self._command(line.strip())
                else:
                    self._answer(line)
            except LimeEdgeError as error:
                self._say(f"error: {error}")

    def _ask(self) -> str:
        name = describe_selection(self.session.selection)
        return input(f"[{name}] > ") if sys.stdin.isatty() else input()

    def _answer(self, line: str) -> None:
        if self.raw:
            prompt = line
        else:
            self.turns.append(("user", line))
            prompt = self.session.codec.render_chat(_messages(self.system, self.turns))
        pieces = []
        try:
            for piece in self.session.generate(prompt, self.options, keep_cache=True):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            self._say(" (interrupted)")
        except LimeEdgeError:
            if not self.raw:
                self.turns.pop()
            raise
        print()
        warn_of_full_cache(self.session)
        if not self.raw:
            self.turns.append(("assistant", "".join(pieces)))

    def _command(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/expert" and argument:
            begin = time.perf_counter()
            self.session.use(parse_selection(argument.strip()))
            self._say(f"now {argument.strip()} ({(time.perf_counter() - begin) * 1e6:.0f} us)")
        elif command in ("/experts", "/expert"):
            self._say(", ".join(self.session.experts))
        elif command == "/install" and argument:
            self._say(f"installed {self.session.install(argument.strip())}")
        elif command == "/cache":
            filled = ", ".join(f"{s.selection}: {s.tokens} tokens" for s in self.session.cache)
            self._say(filled or "empty")
        elif command == "/reset":
            self.turns.clear()
            self.session.reset()
        elif command == "/help":
            self._say("\n".join(f"{name:<16} {about}" for name, about in COMMANDS.items()))
        else:
            self._say(f"unknown command {line!r}; /help lists them")

    def _say(self, text: str) -> None:
        terminal.err.print(text, markup=False, soft_wrap=True)
