"""A conversation: who said what, how much of it fits the cache, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lime_edge.bundle.documents import parse_json, read_text
from lime_edge.bundle.staging import write_file
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions

FORMAT = "lime-edge-chat"


@dataclass(frozen=True)
class Conversation:
    """The system message, or None, and the turns after it: (role, text), the user's first."""

    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()

    def add(self, role: str, text: str) -> Conversation:
        """The conversation with one more turn."""
        return Conversation(self.system, (*self.turns, (role, text)))

    def without_oldest(self) -> Conversation:
        """The conversation without its first message and the answers to it."""
        following = [place for place, (role, _) in enumerate(self.turns) if role == "user" and place]
        return Conversation(self.system, self.turns[following[0] :] if following else ())

    def without_last_exchange(self) -> tuple[Conversation, str | None]:
        """The conversation before the user's last message, and that message; None where there is none."""
        asked = [place for place, (role, _) in enumerate(self.turns) if role == "user"]
        if not asked:
            return self, None
        return Conversation(self.system, self.turns[: asked[-1]]), self.turns[asked[-1]][1]

    def messages(self) -> list[dict[str, str]]:
        """As a chat template takes them."""
        first = [("system", self.system)] if self.system else []
        return [{"role": role, "content": text} for role, text in [*first, *self.turns]]


def fit(session: Session, talk: Conversation, options: GenerationOptions) -> tuple[Conversation, str]:
    """Forget the oldest exchanges until the prompt leaves room for an answer; the system message stays.

    Room is `max_new_tokens`, but at most a quarter of the cache: a long limit must not cost the whole memory.

    Returns:
        The conversation that fits, and its prompt.
    Raises:
        LimeEdgeError: the last message alone does not fit.
    """
    room = min(options.max_new_tokens, session.max_length // 4)
    while True:
        prompt = session.codec.render_chat(talk.messages())
        count = len(session.codec.encode(prompt))
        shorter = talk.without_oldest()
        if count + room <= session.max_length or not shorter.turns:
            break
        talk = shorter
    if count >= session.max_length:
        what = "message and the system message are" if talk.system else "message is"
        raise LimeEdgeError(
            f"the {what} too long: {count} tokens with the template, the cache holds {session.max_length}",
            "write less, or start again with a larger `max_length`",
        )
    return talk, prompt


def save(talk: Conversation, file: Path, expert: str) -> None:
    """Write a conversation; only a conversation is replaced.

    Raises:
        LimeEdgeError: the file is something else, or cannot be written.
    """
    if file.exists():
        load(file)
    body = {"format": FORMAT, "expert": expert, "messages": talk.messages()}
    write_file(file, (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())


def load(file: Path) -> tuple[Conversation, str]:
    """Read what `save` wrote: the conversation, and the expert that it ended with.

    Raises:
        LimeEdgeError: missing, or something else.
    """
    hint = "/save FILE writes one"
    body = parse_json(read_text(file, hint), str(file), hint)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise LimeEdgeError(f"{file}: not a conversation of this chat", "/save FILE writes one; choose another name")
    try:
        said = [(str(message["role"]), str(message["content"])) for message in body["messages"]]
    except (KeyError, TypeError) as error:
        raise LimeEdgeError(f"{file}: damaged: {error!r}", "/save FILE writes it anew") from None
    system = said.pop(0)[1] if said and said[0][0] == "system" else None
    return Conversation(system, tuple(said)), str(body.get("expert"))
