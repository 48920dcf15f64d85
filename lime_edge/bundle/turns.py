"""A conversation written without its template: text around each turn (docs/prompts.md)."""

from __future__ import annotations

from collections.abc import Sequence

from lime_edge.bundle.fields import Prompts
from lime_edge.bundle.templates import Message

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


def write_turns(prompts: Prompts, messages: Sequence[Message], open_turn: bool) -> str | None:
    """The text of a conversation, or None where it is none that `prompts` was proven for.

    Args:
        messages: {"role": ..., "content": ...} each, both strings. open_turn: begin the assistant's turn.
    """
    turns = [(message.get("role"), message.get("content")) for message in messages]
    if any(set(message) != {"role", "content"} for message in messages) or not fits_order(prompts, turns):
        return None
    if prompts.default_system is not None and turns[0][0] != SYSTEM:
        turns.insert(0, (SYSTEM, prompts.default_system))
    parts, merged = [prompts.begin], False
    for role, content in turns:
        speaker = prompts.roles[role]  # type: ignore[index]
        text = content.strip() if role in prompts.strip else content  # type: ignore[union-attr]
        parts += ["" if merged else speaker.prefix, text, speaker.suffix]  # type: ignore[list-item]
        merged = prompts.system_opens_user and role == SYSTEM
    return "".join(parts) + (prompts.opening if open_turn else prompts.closing)


def fits_order(prompts: Prompts, turns: Sequence[tuple[object, object]]) -> bool:
    """Whether every turn is text of a known role, and, where the template insists, user and assistant alternate."""
    texts = all(isinstance(role, str) and isinstance(content, str) for role, content in turns)
    if not turns or not texts or any(role not in prompts.roles for role, _ in turns):
        return False
    if prompts.order == "any":
        return True
    spoken = [role for role, _ in turns[turns[0][0] == SYSTEM :]]
    return bool(spoken) and all(role == (USER, ASSISTANT)[place % 2] for place, role in enumerate(spoken))
