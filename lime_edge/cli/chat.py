"""The chat of `lime-edge run`: lines in, answers out, commands that begin with a slash."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lime_edge import terminal
from lime_edge.bundle.experts import describe_selection, parse_selection
from lime_edge.cli.answer import Answer, say_limits, stream_answer
from lime_edge.cli.conversation import Conversation, fit, load, save
from lime_edge.cli.flags import translate
from lime_edge.errors import LimeEdgeError, suggest
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions

QUOTES = '"""'
COMMANDS = {
    "/expert NAME": "switch: NAME, none, or NAME=WEIGHT,NAME=WEIGHT; the next answer reads the whole chat anew",
    "/experts": "list the experts",
    "/install FILE": "add an expert file while running",
    "/system TEXT": "set the system message; /system alone shows it, /system none takes it away",
    "/retry": "answer the last message again, with another expert for example",
    "/save FILE": "keep the conversation as JSON",
    "/load FILE": "go on with a conversation that was kept",
    "/stats": "speed of the last answer, and how full the cache is",
    "/cache": "who filled the cache",
    "/reset": "forget the conversation; the system message stays",
    "/help": "this list",
    "/quit": "leave (or end of input)",
}
MULTILINE = f"a line that ends with \\ goes on in the next one; {QUOTES} opens and closes a text of several lines"


class Chat:
    """A conversation at the terminal, or line by line from a pipe."""

    def __init__(self, session: Session, options: GenerationOptions, system: str | None, raw: bool):
        if not raw and not session.codec.can_chat:
            raise LimeEdgeError("this model has no chat template", "pass `raw` and complete prompts")
        self.session, self.options, self.raw = session, options, raw
        self.talk = Conversation(system)
        self.last: Answer | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/expert": self._switch,
            "/experts": lambda _: self._say(", ".join(self.session.experts)),
            "/install": self._install,
            "/system": self._set_system,
            "/retry": self._retry,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._show_stats,
            "/cache": self._show_cache,
            "/reset": self._reset,
            "/help": self._help,
        }

    def loop(self) -> None:
        """Read messages until /quit or the end of input."""
        self._prepare_editing()
        using = describe_selection(self.session.selection)
        self._say(f"using {using}; experts: {', '.join(self.session.experts)}; /help lists the commands")
        while True:
            try:
                message = self._ask()
            except EOFError:
                return
            if message.strip() == "/quit":
                return
            if not message.strip():
                continue
            try:
                self._take(message)
            except LimeEdgeError as error:
                self._say(f"error: {translate(str(error))}")

    def _take(self, message: str) -> None:
        if not message.startswith("/"):
            self._answer(message)
            return
        name, _, argument = message.strip().partition(" ")
        name = name.lower()
        command = self._commands.get(name)
        if command is None:
            hint = suggest(name, self._commands) or "/help lists them"
            raise LimeEdgeError(f"unknown command {name!r}", hint)
        command(argument.strip())

    # reading

    def _ask(self) -> str:
        """One message: a line, lines joined by a backslash at their ends, or a text between triple quotes."""
        name = describe_selection(self.session.selection)
        first = self._read(f"[{name}] > ")
        if first.strip().startswith(QUOTES):
            return self._read_block(first.strip().removeprefix(QUOTES))
        lines = [first]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read("... "))
        return "\n".join(lines)

    def _read_block(self, first: str) -> str:
        lines = [first] if first else []
        if first.endswith(QUOTES):
            return first.removesuffix(QUOTES)
        while True:
            line = self._read("... ")
            if line.rstrip().endswith(QUOTES):
                return "\n".join([*lines, line.rstrip().removesuffix(QUOTES)]).rstrip("\n")
            lines.append(line)

    def _read(self, prompt: str) -> str:
        return input(prompt) if sys.stdin.isatty() else input()

    def _prepare_editing(self) -> None:
        """Arrow keys and the tab key, where the terminal and Python have them."""
        if not sys.stdin.isatty():
            return
        with suppress(ImportError):  # Windows has no readline
            import readline

            words = [*self._commands, *self.session.experts]
            readline.set_completer_delims(" ,")
            readline.set_completer(lambda text, n: ([w for w in words if w.startswith(text)] + [None])[n])
            readline.parse_and_bind("tab: complete")

    # answering

    def _answer(self, message: str) -> None:
        if self.raw:
            self.last = stream_answer(self.session, message, self.options, keep_cache=True)
        else:
            self._answer_turn(message)
        self._warn(self.last)

    def _answer_turn(self, message: str) -> None:
        talk = self.talk.add("user", message)
        shorter, prompt = fit(self.session, talk, self.options)
        if dropped := len(talk.turns) - len(shorter.turns):
            self._say(
                f"(the cache of {self.session.max_length} tokens is full: the oldest {dropped} turns are forgotten)"
            )
        self.last = stream_answer(self.session, prompt, self.options, keep_cache=True)
        self.talk = shorter.add("assistant", self.last.text)

    def _warn(self, answer: Answer | None) -> None:
        if answer is not None:
            say_limits(self.session, answer, self.options)

    # commands

    def _switch(self, name: str) -> None:
        if not name:
            self._say(", ".join(self.session.experts))
            return
        begin = time.perf_counter()
        self.session.use(parse_selection(name))
        self._say(f"now {name} ({(time.perf_counter() - begin) * 1e6:.0f} us)")

    def _install(self, file: str) -> None:
        if not file:
            raise LimeEdgeError("/install needs a file", "for example /install new-skill.safetensors")
        self._say(f"installed {self.session.install(file)}")

    def _set_system(self, text: str) -> None:
        if text:
            self.talk = Conversation(None if text == "none" else text, self.talk.turns)
        self._say(f"system message: {self.talk.system or 'none'}")

    def _retry(self, _: str) -> None:
        before, message = self.talk.without_last_exchange()
        if message is None:
            raise LimeEdgeError("nothing to answer again", "write a message first (with `raw` no turns are kept)")
        kept, self.talk = self.talk, before
        try:
            self._answer(message)
        except LimeEdgeError:
            self.talk = kept
            raise

    def _save(self, file: str) -> None:
        if not file:
            raise LimeEdgeError("/save needs a file", "for example /save talk.json")
        save(self.talk, Path(file), describe_selection(self.session.selection))
        self._say(f"kept {len(self.talk.turns)} turns in {file}")

    def _load(self, file: str) -> None:
        if not file:
            raise LimeEdgeError("/load needs a file", "for example /load talk.json")
        self.talk, expert = load(Path(file))
        self._say(f"{len(self.talk.turns)} turns from {file}, kept with {expert}; using {self._using()}")

    def _using(self) -> str:
        return describe_selection(self.session.selection)

    def _show_stats(self, _: str) -> None:
        if self.last is None:
            raise LimeEdgeError("no answer yet", "write something first")
        filled = sum(segment.tokens for segment in self.session.cache)
        self._say(
            f"{self._using()} on {self.session.provider}: {self.last.describe()}; "
            f"cache {filled} of {self.session.max_length} tokens; "
            f"{len(self.talk.turns)} turns"
        )

    def _show_cache(self, _: str) -> None:
        filled = ", ".join(f"{s.selection}: {s.tokens} tokens" for s in self.session.cache)
        self._say(filled or "empty")

    def _reset(self, _: str) -> None:
        self.talk = Conversation(self.talk.system)
        self.session.reset()

    def _help(self, _: str) -> None:
        self._say("\n".join(f"{name:<16} {about}" for name, about in COMMANDS.items()))
        self._say(MULTILINE)

    def _say(self, text: str) -> None:
        terminal.err.print(terminal.show_plain(text), markup=False, soft_wrap=True)
