"""What clients send, read and checked: the fields of OpenAI's API that mean something here, the others refused.

A field that would change the answer and is not supported is refused, never ignored; where it says what is so anyway
(`n: 1`, `presence_penalty: 0`) it is taken. Fields that nobody here knows are left alone: clients send many.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from lime_edge.errors import LimeEdgeError
from lime_edge.serve.refusals import Refusal, refuse
from lime_edge.serve.skills import Lime
from lime_edge.session.generate import GenerationOptions

MOST_CHOICES, MOST_STOPS = 16, 16
ROLES = {"developer": "system"}  # what the API calls otherwise than chat templates do
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what is not supported, and the values that ask for nothing
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
}
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Count = Annotated[int, Meta(ge=1, le=1 << 31)]
Ids = Annotated[list[Annotated[int, Meta(ge=0, le=1 << 31)]], Meta(min_length=1)]
T = TypeVar("T")


class StreamOptions(msgspec.Struct):
    """include_usage: a last chunk that counts the tokens."""

    include_usage: bool | None = None


class Part(msgspec.Struct):
    """A part of a message."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    """One turn of a conversation."""

    role: str
    content: str | list[Part] | None = None


class Sampling(msgspec.Struct):
    """What chat and completions have in common."""

    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=MOST_STOPS)] | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    lime: Lime | str | None = None


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)] = msgspec.field(default_factory=list)
    max_completion_tokens: Count | None = None


class CompletionBody(Sampling):
    """POST /v1/completions. prompt: complete text or token ids, or several of either."""

    prompt: str | list[Any] = ""


class EmbeddingBody(msgspec.Struct):
    """POST /v1/embeddings."""

    model: Name
    input: str | list[Any]
    encoding_format: str | None = None
    dimensions: Count | None = None
    lime: Lime | str | None = None


def read_body(data: bytes, kind: type[T]) -> T:
    """A request's JSON as one of the classes above.

    Raises:
        Refusal: 400: no JSON, a field of another type or out of its range, or one that is not supported here.
    """
    try:
        raw = msgspec.json.decode(data)
        if not isinstance(raw, dict):
            raise Refusal(400, "the body is no JSON object")
        body = msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise Refusal(400, str(error), "invalid_value", find_param(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", "invalid_json") from None
    for name, neutral in NEUTRAL.items():
        if name in raw and not any(raw[name] == value for value in neutral):
            raise Refusal(400, f"`{name}` is not supported by this server", "unsupported_parameter", name)
    return body


def find_param(problem: str) -> str | None:
    """The field that a message of msgspec is about."""
    path = re.search(r"`\$\.?([^`]+)`", problem)
    missing = re.search(r"missing required field `([^`]+)`", problem)
    found = path or missing
    return found[1] if found else None


def read_messages(body: ChatBody) -> list[dict[str, str]]:
    """The conversation as chat templates take it.

    Raises:
        Refusal: 400: pictures, tools, or a turn without text.
    """
    if not body.messages:
        raise Refusal(400, "`messages` holds nothing", param="messages")
    return [
        {"role": ROLES.get(message.role, message.role), "content": read_content(message, place)}
        for place, message in enumerate(body.messages)
    ]


def read_content(message: Message, place: int) -> str:
    """A turn's text, put together where it comes in parts."""
    where = f"messages[{place}]"
    if message.role not in ("system", "developer", "user", "assistant"):
        raise Refusal(400, f"{where}: the role {message.role!r} is not supported", "invalid_value", f"{where}.role")
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise Refusal(400, f"{where}: `content` is missing", "invalid_value", f"{where}.content")
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise Refusal(400, f"{where}: only parts of type text are supported", "invalid_value", f"{where}.content")
    return "".join(part.text or "" for part in message.content)


def read_prompts(given: str | list[Any], param: str) -> list[str | list[int]]:
    """The prompts of a completion, or the inputs of embeddings: one, or several.

    Raises:
        Refusal: 400: neither text nor token ids, or nothing.
    """
    if isinstance(given, str):
        return [given]
    try:
        if given and all(isinstance(one, int) for one in given):
            return [msgspec.convert(given, Ids)]
        return msgspec.convert(given, Annotated[list[str | Ids], Meta(min_length=1)])
    except msgspec.ValidationError as error:
        raise Refusal(400, f"`{param}`: {error}", "invalid_value", param) from None


def read_options(body: Sampling, limit: int | None, room: int) -> GenerationOptions:
    """How to pick tokens and when to stop.

    Args:
        limit: tokens that an answer may have, where the server was given one. room: tokens that a row holds; an answer
            that it ends says so ("length").
    Raises:
        Refusal: 400.
    """
    asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if limit is not None and asked is not None and asked > limit:
        raise Refusal(
            400, f"`max_tokens`: {asked} are asked for, this server gives at most {limit}", param="max_tokens"
        )
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    try:
        return GenerationOptions(
            max_new_tokens=asked or limit or room,
            temperature=body.temperature or 0.0,
            top_k=body.top_k or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=None if body.seed is None else body.seed % (1 << 64),
            stop=tuple(stop for stop in stops if stop),
            ignore_eos=bool(body.ignore_eos),
        )
    except LimeEdgeError as error:
        raise refuse(error) from None
