"""A request: who asks what of which expert, and what the batch makes of it once it has been checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lime_edge.bundle.experts import Selection
from lime_edge.bundle.prompts import TextCodec
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.session.batch import FULL, LENGTH, Order, Reader
from lime_edge.session.engines import Rows
from lime_edge.session.generate import GenerationOptions
from lime_edge.session.prefixes import PrefixCache
from lime_edge.session.sampling import make_sampler

MOST_ROWS = 16  # decoded at once unless the caller says otherwise
FORM = "a request is (prompt, selection), (prompt, selection, GenerationOptions), or these and a list of pictures"


@dataclass(frozen=True)
class Request:
    """What one row is asked.

    prompt: complete text, or token ids. selection: its expert, see ExpertSwitch.use. options: its own, or None for
    those that the call gives to all. images: pictures of a model that sees, one for each placeholder.
    """

    prompt: str | Sequence[int]
    selection: Selection
    options: GenerationOptions | None = None
    images: Sequence[Any] = ()


AnyRequest = Request | tuple[Any, ...]


class Asked(Protocol):
    """What is needed of a session: see `lime_edge.session.decoder.Session`."""

    target: str
    prefixes: PrefixCache

    @property
    def engine(self) -> object:
        """What runs the model."""

    @property
    def codec(self) -> TextCodec:
        """Its tokenizer."""

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    @property
    def max_length(self) -> int:
        """Tokens that a cache holds."""

    def check_owner(self) -> None:
        """Refuse another thread."""

    def count_silent(self, ids: Sequence[int]) -> int:
        """Tokens of a prompt that the original model reads."""

    def read_prompt(self, prompt: str | Sequence[Any], images: Sequence[Any] = ..., selection: Any = ...) -> list[int]:
        """Checked token ids, pictures seen under a selection among them."""

    def identify(self, selection: Selection) -> tuple[np.ndarray | None, bytes]:
        """A selection's own numbers, and what tells it from others."""


def read_request(given: AnyRequest, number: int, options: GenerationOptions) -> Request:
    """A request from what stands for one; `options` where it has none of its own.

    Raises:
        LimeEdgeError: it has another form.
    """
    if not isinstance(given, Request):
        if not isinstance(given, tuple) or len(given) not in (2, 3, 4):
            raise LimeEdgeError(f"request {number}: expected (prompt, selection), found {type(given).__name__}", FORM)
        given = Request(*given)
    if given.options is None:
        return replace(given, options=options)
    if not isinstance(given.options, GenerationOptions):
        raise LimeEdgeError(f"request {number}: options: expected GenerationOptions, found {given.options!r}", FORM)
    return given


def make_order(session: Asked, request: Request, number: int, capacity: int) -> Order:
    """A request as the batch takes it.

    Args:
        capacity: tokens that a row holds.
    Raises:
        LimeEdgeError: bad ids, an unknown expert, or a prompt that leaves no room for a token.
    """
    options = request.options or GenerationOptions()
    try:
        ids = session.read_prompt(request.prompt, request.images, request.selection)
        expert = Reader(*session.identify(request.selection))
        silent = session.count_silent(ids)
        before = Reader(*session.identify(None)) if silent else None
        room = capacity - len(ids)
        if room < 1:
            raise LimeEdgeError(f"a cache holds {capacity} tokens, the prompt has {len(ids)}", "shorten it")
    except LimeEdgeError as error:
        raise LimeEdgeError(f"request {number}: {error.problem}", error.hint, error.exit_code) from None
    most = min(options.max_new_tokens, room)
    return Order(
        number,
        tuple(ids),
        expert,
        make_sampler(options.temperature, options.top_k, options.top_p, options.seed),
        most,
        LENGTH if most == options.max_new_tokens else FULL,
        () if options.ignore_eos else session.eos,
        silent,
        before,
    )


def open_rows(session: Asked, count: int, capacity: int, memory: int | None) -> Rows:
    """As many rows as fit into `memory`.

    Raises:
        LimeEdgeError: an engine that runs one sequence at a time, or not even one row fits.
    """
    opening = getattr(session.engine, "open_rows", None)
    if opening is None:
        raise LimeEdgeError(
            f"{session.target}: this engine runs one sequence at a time (docs/many-skills.md says why)",
            "export with `target=onnx` for rows, or ask one after another",
        )
    with Faults("generate_many") as faults:
        if count < 1:
            faults.add("rows", "at least 1", count)
        if memory is not None and memory < 1:
            faults.add("memory", "bytes, at least 1, or None", memory)
    if memory is not None:
        each = opening(1, capacity).nbytes  # untouched: it takes no memory yet
        if each > memory:
            problem = f"`memory`: a row of {capacity} tokens takes {each} bytes, {memory} are allowed"
            raise LimeEdgeError(problem, "allow more, or open the session with a smaller `max_length`")
        count = min(count, memory // each)
    try:
        return opening(count, capacity)
    except MemoryError:
        problem = f"`rows`: no memory for the caches of {count} rows of {capacity} tokens"
        raise LimeEdgeError(problem, "ask for fewer rows, or name `memory` that they may take") from None
