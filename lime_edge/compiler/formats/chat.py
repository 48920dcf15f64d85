"""A chat template reduced to text around each turn, and proven equal to the template on random conversations.

What a template says between two turns is found with marks for texts; from those joints follow prefixes and suffixes
(docs/prompts.md). Whatever does not follow, or fails the proof, leaves a reason instead.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from lime_edge.bundle.fields import Prompts, Speaker
from lime_edge.bundle.prompts import TextCodec
from lime_edge.bundle.templates import Conversation, Rendered, plain, render_all
from lime_edge.bundle.turns import ASSISTANT, SYSTEM, USER, write_turns

ROUNDS = 200  # random conversations of the proof
MARK, MARKS = "Qz%dJx", re.compile(r"Qz\d+Jx")  # a text that no template looks for
DAYS = ("2001-02-03", "2031-11-12")  # a template that knows the date writes them differently
ODD = (
    [USER, USER],
    [ASSISTANT, USER],
    [SYSTEM, SYSTEM, USER],
    [USER, SYSTEM, USER],
    [ASSISTANT],
    [USER, ASSISTANT] * 2,
)
TALK = [USER, ASSISTANT, USER, ASSISTANT, USER]
Render = Callable[[Sequence[Conversation]], list[Rendered]]


class Irreducible(Exception):
    """Why a template cannot be written as text around turns."""


def reduce_template(codec: TextCodec) -> Prompts | None:
    """A model's chat template as text around each turn, or the reason why that cannot be; None where it has none."""
    return None if codec.template is None else reduce_or_explain(codec.template, codec.special_names)


def reduce_or_explain(template: str, names: dict[str, str]) -> Prompts:
    """The same for a template's text and the names of its special tokens."""
    try:
        return reduce_text(template, names)
    except Irreducible as why:
        return Prompts(reason=plain(str(why)))


def reduce_text(template: str, names: dict[str, str]) -> Prompts:
    """A template's text as text around each turn.

    Raises:
        Irreducible: with the reason.
    """
    render = partial(render_all, template, names, date=DAYS[0])
    prompts = find_turns(render, names.get("bos_token", ""))
    draw = random.Random(0)
    pieces = list_pieces(template, names.values())
    regular = [draw_conversation(draw, prompts, pieces, False) for _ in range(ROUNDS)]
    prove(prompts, regular, render(regular))
    prove(prompts, regular[:20], render_all(template, names, regular[:20], date=DAYS[1]), "depends on the date: ")
    loose = Prompts(**{name: getattr(prompts, name) for name in prompts.__struct_fields__} | {"order": "any"})
    odd = [Conversation(mark(roles), roles[-1] != ASSISTANT) for roles in ODD if set(roles) <= set(prompts.roles)]
    odd += [draw_conversation(draw, prompts, pieces, True) for _ in range(ROUNDS)]
    try:
        prove(loose, odd, render(odd))
    except Irreducible:
        return prompts
    return loose


def mark(roles: Sequence[str], around: str = "") -> list[dict[str, str]]:
    """A conversation of marks, one a turn."""
    return [{"role": role, "content": around + MARK % place + around} for place, role in enumerate(roles)]


def find_joints(roles: Sequence[str], rendered: Rendered) -> list[str]:
    """What stands before, between and after the marks of a conversation.

    Raises:
        Irreducible: refused, or a turn's text comes not once, or not in its place.
    """
    if rendered.error:
        raise Irreducible(f"the template refuses an ordinary conversation: {rendered.error}")
    if MARKS.findall(rendered.text) != [MARK % place for place in range(len(roles))]:
        raise Irreducible(f"a turn's text is left out, repeated or moved ({', '.join(roles)})")
    return MARKS.split(rendered.text)


@dataclass(frozen=True)
class Joints:
    """What a template says between two turns of an ordinary conversation, at its start and at its end."""

    start: str
    answer: str  # user to assistant
    again: str  # assistant to user
    opening: str  # user to the answer that is to be written
    user_end: str
    assistant_end: str


def read_joints(render: Render) -> Joints:
    """From three conversations.

    Raises:
        Irreducible: what is said between two turns depends on more than whose they are.
    """
    closed, opened, answered = (
        find_joints(roles, rendered)
        for roles, rendered in zip(
            (TALK, TALK, TALK[:-1]),
            render([Conversation(mark(TALK), False), Conversation(mark(TALK)), Conversation(mark(TALK[:-1]), False)]),
            strict=True,
        )
    )
    if not (closed[:-1] == opened[:-1] and closed[:4] == answered[:4] and closed[1:3] == closed[3:5]):
        raise Irreducible("what stands around a turn depends on where in the conversation it is")
    return Joints(closed[0], closed[1], closed[2], opened[-1], closed[-1], answered[-1])


def find_turns(render: Render, bos: str) -> Prompts:
    """Prefixes and suffixes that say what the joints say.

    Raises:
        Irreducible: there are none.
    """
    joints = read_joints(render)
    for user_suffix in list_suffixes(joints):
        closing = joints.user_end[len(user_suffix) :]
        if not joints.assistant_end.endswith(closing):
            continue
        suffix = joints.assistant_end.removesuffix(closing) if closing else joints.assistant_end
        if not joints.again.startswith(suffix):
            continue
        user = Speaker(prefix=joints.again[len(suffix) :], suffix=user_suffix)
        assistant = Speaker(prefix=joints.answer[len(user_suffix) :], suffix=suffix)
        if joints.start.endswith(user.prefix):
            opening = joints.opening[len(user_suffix) :]
            found = add_system(render, joints.start, user, assistant, bos)
            found |= {"opening": opening, "closing": closing}
            return Prompts(strip=find_stripped(render, tuple(found["roles"])), order="alternating", **found)
    raise Irreducible("what stands between turns is no suffix and prefix")


def list_suffixes(joints: Joints) -> Iterable[str]:
    """Where what follows a user's text may be cut, the most natural first: all that stands there at the end, a whole
    line or mark of it, every letter that does not depend on what comes."""
    common = os.path.commonprefix([joints.answer, joints.opening, joints.user_end])
    if common == joints.user_end:
        yield common
    for end in sorted((found.end() for found in re.finditer(r"[\n>\]]", common)), reverse=True):
        yield common[:end]
    yield common
    yield ""


def add_system(render: Render, start: str, user: Speaker, assistant: Speaker, bos: str) -> dict:
    """The system turn and what begins a conversation, as fields of Prompts.

    Args:
        start: what stands before a user's text that goes first.
    Raises:
        Irreducible: a system turn is written in a way that no prefix and suffix give.
    """
    roles = [SYSTEM, *TALK]
    (rendered,) = render([Conversation(mark(roles))])
    begin = start.removesuffix(user.prefix) if user.prefix else start
    if rendered.error:
        return {"begin": begin, "roles": {USER: user, ASSISTANT: assistant}}
    before, after = find_joints(roles, rendered)[:2]
    merged = not after.endswith(user.prefix)
    suffix = after if merged else after.removesuffix(user.prefix) if user.prefix else after
    default = None
    if not before.startswith(begin):
        if merged or not (begin.startswith(before) and begin.endswith(suffix)):
            raise Irreducible("a conversation without a system turn begins unlike one with it")
        default = begin[len(before) : len(begin) - len(suffix)]
        begin = bos if bos and before.startswith(bos) and not user.prefix.startswith(bos) else ""
    system = Speaker(prefix=before[len(begin) :], suffix=suffix)
    return {
        "begin": begin,
        "roles": {SYSTEM: system, USER: user, ASSISTANT: assistant},
        "default_system": default,
        "system_opens_user": merged,
    }


def find_stripped(render: Render, roles: tuple[str, ...]) -> tuple[str, ...]:
    """The roles whose texts lose white space at both ends.

    Raises:
        Irreducible: a template refuses white space.
    """
    talk = [SYSTEM, *TALK] if SYSTEM in roles else list(TALK)
    plain, spaced = render([Conversation(mark(talk)), Conversation(mark(talk, " \n\t"))])
    if spaced.error:
        raise Irreducible(f"the template refuses texts with white space: {spaced.error}")
    joints, wider = MARKS.split(plain.text), MARKS.split(spaced.text)
    return tuple(role for role in roles if wider[talk.index(role)] == joints[talk.index(role)])


def list_pieces(template: str, names: Iterable[str]) -> list[str]:
    """What random texts are made of: words, white space, and whatever the template itself mentions."""
    quoted = [text for pair in re.findall(r"'([^']{1,200})'|\"([^\"]{1,200})\"", template) for text in pair if text]
    around = re.findall(r"[^{}%]{1,80}", template)
    odd = [
        "",
        " ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u2028",
        "0",
        "{{ 1 }}",
        "{% x %}",
        "<b>",
        "&amp;",
        "\\n",
        "'",
    ]
    words = [
        "hello",
        "Zażółć",
        "文字",
        "👍🏽",
        "e\u0301",
        "\x1f",
        "a" * 300,
        "[INST]",
        "</think>",
        "<think>\nno\n</think>",
    ]
    return [*odd, *words, *names, *dict.fromkeys([*quoted, *around])]


def draw_conversation(draw: random.Random, prompts: Prompts, pieces: Sequence[str], any_order: bool) -> Conversation:
    """A conversation of one to nine turns."""
    if any_order:
        roles = draw.choices(list(prompts.roles), k=draw.randrange(1, 8))
    else:
        count = draw.randrange(1, 9)
        roles = [SYSTEM] * (SYSTEM in prompts.roles and draw.random() < 0.5) + (TALK[:2] * 4)[:count]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(6))) for _ in roles]
    opened = draw.random() < 0.3 if roles[-1] == ASSISTANT else draw.random() < 0.8
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return Conversation(messages, opened and (any_order or roles[-1] != ASSISTANT))


def prove(
    prompts: Prompts, conversations: Sequence[Conversation], rendered: Sequence[Rendered], what: str = ""
) -> None:
    """Compare what the reduced form writes with what the template wrote.

    Raises:
        Irreducible: they differ, or the template refuses what the reduced form writes.
    """
    for one, expected in zip(conversations, rendered, strict=True):
        if expected.error:
            raise Irreducible(f"{what}the template refuses a conversation: {expected.error}")
        found = write_turns(prompts, one.messages, one.open)
        assert found is not None, "only what may be written is drawn"
        if found != expected.text:
            common = len(os.path.commonprefix([found, expected.text]))
            shown = expected.text[max(0, common - 20) : common + 20]
            raise Irreducible(f"{what}more than whose turn it is decides what is written, near {shown!r}")
