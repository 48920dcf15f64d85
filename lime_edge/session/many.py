"""Many requests in one session: who asks for what, and the answers as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lime_edge.bundle.experts import Selection
from lime_edge.bundle.prompts import TextCodec
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.session.batch import FULL, LENGTH, STOP, Batch, Event, Order, Reader, begin_row, plan_piece
from lime_edge.session.chunks import CHUNK
from lime_edge.session.engines import Rows, blame_engine
from lime_edge.session.generate import GenerationOptions, TextStream
from lime_edge.session.prefixes import SHORTEST, PrefixCache, count_common
from lime_edge.session.sampling import make_sampler

MOST_ROWS = 16  # decoded at once unless the caller says otherwise
FORM = "a request is (prompt, selection) or (prompt, selection, GenerationOptions)"


@dataclass(frozen=True)
class Request:
    """What one row is asked.

    prompt: complete text, or token ids. selection: its expert, see ExpertSwitch.use. options: its own, or None for
    those that the call gives to all.
    """

    prompt: str | Sequence[int]
    selection: Selection
    options: GenerationOptions | None = None


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

    def read_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Checked token ids."""

    def identify(self, selection: Selection) -> tuple[np.ndarray | None, bytes]:
        """A selection's own numbers, and what tells it from others."""


def read_request(given: AnyRequest, number: int) -> Request:
    """A request from what stands for one.

    Raises:
        LimeEdgeError: it has another form.
    """
    if isinstance(given, Request):
        return given
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        raise LimeEdgeError(f"request {number}: expected (prompt, selection), found {type(given).__name__}", FORM)
    request = Request(*given)
    if request.options is not None and not isinstance(request.options, GenerationOptions):
        raise LimeEdgeError(f"request {number}: options: expected GenerationOptions, found {request.options!r}", FORM)
    return request


class Answers:
    """The answers of `Session.generate_many`, piece by piece as they come: an iterator of (row, piece).

    `reasons` says why a request has ended, by its row, as `Session.finish_reason` does; "failed" where it raised.
    `rows` of them run at once, `nbytes` is what their caches take when all are full. `stop` ends one early; letting go
    of the object ends them all.
    """

    def __init__(self, session: Asked, batch: Batch, rows: Rows, streams: Sequence[TextStream | None]):
        self._session, self._batch, self._streams = session, batch, streams
        self._ready: deque[tuple[int, Any]] = deque()
        self._faults: deque[LimeEdgeError] = deque()
        self.rows, self.capacity, self.nbytes = rows.count, rows.capacity, rows.nbytes
        self.reasons: dict[int, str] = {}

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        """The next piece, of whichever request has one.

        Raises:
            LimeEdgeError: logits that are no numbers, by the request, of which this is the end (the others go on when
                the next piece is asked for); an engine that fails; another thread.
        """
        self._session.check_owner()
        while not self._ready:
            if self._faults:
                raise self._faults.popleft()
            if not self._batch.busy:
                raise StopIteration
            try:
                events = self._batch.advance()
            except LimeEdgeError:
                raise
            except Exception as error:
                raise blame_engine(self._session.target, error) from error
            for event in events:
                self._note(event)
        return self._ready.popleft()

    def stop(self, row: int) -> None:
        """End a request now, whether it runs or waits."""
        self._session.check_owner()
        self._batch.stop(row)
        self.reasons.setdefault(row, STOP)

    def _note(self, event: Event) -> None:
        if event.number in self.reasons:
            return
        stream = self._streams[event.number]
        if event.token is None:
            self.reasons[event.number] = event.reason
            if event.fault is not None:
                self._faults.append(event.fault)
            piece: Any = stream.finish() if stream else ""
        elif stream is None:
            self._ready.append((event.number, event.token))
            return
        else:
            piece = stream.push(event.token)
            if stream.stopped:
                self._batch.stop(event.number)
                self.reasons[event.number] = STOP
        if piece:
            self._ready.append((event.number, piece))


def open_answers(
    session: Asked,
    requests: Sequence[AnyRequest],
    options: GenerationOptions,
    most: int,
    memory: int | None,
    as_text: bool,
) -> Answers:
    """Check all requests, make room, and queue them; nothing is computed yet.

    Args:
        options: for requests that have none of their own. most: rows at once. memory: bytes of their caches, or None.
        as_text: pieces of text rather than token ids.
    Raises:
        LimeEdgeError: every request that is wrong or has no room, by its number; an engine that runs one sequence.
    """
    orders = [
        make_order(session, read_request(given, number), number, options) for number, given in enumerate(requests)
    ]
    if not orders:
        raise LimeEdgeError("no requests", FORM)
    needed = max(len(order.ids) + order.most - 1 for order in orders)
    rows = open_rows(session, min(most, len(orders)), needed, memory)
    batch = Batch(rows, session.prefixes)
    for order in orders:
        batch.submit(order)
    stops = [read_request(given, number).options or options for number, given in enumerate(requests)]
    streams = [TextStream(session.codec.decode, one.stop) if as_text else None for one in stops]
    return Answers(session, batch, rows, streams)


def make_order(session: Asked, request: Request, number: int, options: GenerationOptions) -> Order:
    """A request as the batch takes it.

    Raises:
        LimeEdgeError: bad ids, an unknown expert, or a prompt that leaves no room for a token.
    """
    options = request.options or options
    try:
        ids = session.read_prompt(request.prompt)
        expert = Reader(*session.identify(request.selection))
        silent = session.count_silent(ids)
        before = Reader(*session.identify(None)) if silent else None
        room = session.max_length - len(ids)
        if room < 1:
            raise LimeEdgeError(f"a cache holds {session.max_length} tokens, the prompt has {len(ids)}", "shorten it")
    except LimeEdgeError as error:
        raise LimeEdgeError(f"request {number}: {error.problem}", error.hint) from None
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
            f"{session.target}: this engine runs one sequence at a time",
            "export with --target onnx for rows, or ask one after another",
        )
    with Faults("generate_many") as faults:
        if count < 1:
            faults.add("rows", "at least 1", count)
        if memory is not None and memory < 1:
            faults.add("memory", "bytes, at least 1, or None", memory)
    if memory is not None:
        each = opening(1, capacity).nbytes  # untouched: it takes no memory yet
        if each > memory:
            raise LimeEdgeError(f"a row of {capacity} tokens takes {each} bytes, {memory} are allowed", "allow more")
        count = min(count, memory // each)
    return opening(count, capacity)


def read_logits(session: Asked, requests: Sequence[tuple[Any, Selection]], keep: int) -> list[np.ndarray]:
    """Logits of sequences under experts of their own; a beginning that some share under one expert is read once.

    Args, Returns, Raises: see Session.logits_many.
    """
    orders = []
    for number, (prompt, selection) in enumerate(requests):
        options = GenerationOptions(max_new_tokens=1)
        orders.append(make_order(session, Request(prompt, selection), number, options))
    if not orders:
        return []
    rows = open_rows(session, 1, max(len(order.ids) for order in orders), None)
    found: list[np.ndarray] = []
    for place, order in enumerate(orders):
        later = [other for other in orders[place + 1 :] if other.first.filler == order.first.filler]
        found.append(_read_one(session, rows, order, later, keep))
    return found


def _read_one(session: Asked, rows: Rows, order: Order, later: Sequence[Order], keep: int) -> np.ndarray:
    wanted = min(keep, len(order.ids)) if keep else len(order.ids)
    first = len(order.ids) - wanted  # the first position whose logits are wanted
    row, start = begin_row(rows, order, session.prefixes, order.shareable[:first])
    parts = []
    while start < len(order.ids):
        stop = plan_piece(order, start, CHUNK)
        own = stop - max(start, first)
        logits = rows.feed(row, np.array(order.ids[start:stop], np.int64), max(own, 1))
        parts += [logits.copy()] if own > 0 else []
        start = stop
        if stop == order.silent:
            rows.set_expert(row, order.expert.residual)
    shared = max((count_common(order.shareable, other.shareable) for other in later), default=0)
    if shared >= SHORTEST:
        session.prefixes.keep(order.first.filler, order.ids[:shared], rows.save(row, shared))
    rows.stop(row)
    return np.concatenate(parts)
