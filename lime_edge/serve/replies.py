"""The bodies of answers, as OpenAI's clients read them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lime_edge.bundle.experts import Selection, describe_selection

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"  # a comment: keeps proxies from giving up


@dataclass(frozen=True)
class Form:
    """How one endpoint writes its answers.

    prefix: of their ids. whole, piece: what the object is called, at once and in pieces.
    """

    prefix: str
    whole: str
    piece: str
    is_chat: bool

    def choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        """One whole answer."""
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **(said if self.is_chat else {"text": text}), "logprobs": None, "finish_reason": reason}

    def delta(self, index: int, text: str, reason: str | None, begins: bool = False) -> dict[str, Any]:
        """One piece of an answer; `begins`: the first of a chat, which says who speaks."""
        said = {"delta": ({"role": "assistant"} if begins else {}) | ({"content": text} if text or begins else {})}
        return {
            "index": index,
            **(said if self.is_chat else {"text": text}),
            "logprobs": None,
            "finish_reason": reason,
        }


CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", True)
TEXT = Form("cmpl", "text_completion", "text_completion", False)


@dataclass(frozen=True)
class Head:
    """What every piece of one reply says: its id, when, which model and which skill."""

    form: Form
    model: str
    selection: Selection
    fingerprint: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def write(self, name: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A reply, or a piece of one."""
        return {
            "id": f"{self.form.prefix}-{self.id}",
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
            "lime": {"expert": describe_selection(self.selection)},
        }


@dataclass
class Usage:
    """Tokens of a request: of its prompts, of each answer so far, and of each prompt what was not read again."""

    prompt: int
    answers: dict[int, int] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)

    def write(self) -> dict[str, Any]:
        """As the API has it."""
        given = sum(self.answers.values())
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": given,
            "total_tokens": self.prompt + given,
            "prompt_tokens_details": {"cached_tokens": sum(self.kept.values())},
        }


def write_event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
