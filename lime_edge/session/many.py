"""Many requests whose answers are wanted together: generate_many and logits_many of a session."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lime_edge.bundle.experts import Selection
from lime_edge.errors import LimeEdgeError
from lime_edge.session.batch import STOP, Order, begin_row, plan_piece
from lime_edge.session.chunks import CHUNK
from lime_edge.session.desk import Desk, Piece
from lime_edge.session.engines import Rows
from lime_edge.session.generate import GenerationOptions
from lime_edge.session.prefixes import SHORTEST, count_common
from lime_edge.session.requests import FORM, AnyRequest, Asked, Request, make_order, open_rows, read_request


class Answers:
    """The answers of `Session.generate_many`, piece by piece as they come: an iterator of (row, piece).

    `reasons` says why a request has ended, by its row, as `Session.finish_reason` does; "failed" where it raised.
    `rows` of them run at once, `nbytes` is what their caches take when all are full. `stop` ends one early; letting go
    of the object ends them all.
    """

    def __init__(self, desk: Desk):
        self._desk = desk
        self._ready: deque[tuple[int, Any]] = deque()
        self._faults: deque[LimeEdgeError] = deque()
        self.rows, self.capacity, self.nbytes = desk.rows, desk.capacity, desk.nbytes
        self.reasons: dict[int, str] = {}

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        """The next piece, of whichever request has one.

        Raises:
            LimeEdgeError: logits that are no numbers, by the request, of which this is the end (the others go on when
                the next piece is asked for); an engine that fails; another thread.
        """
        self._desk.check_owner()
        while not self._ready:
            if self._faults:
                raise self._faults.popleft()
            if not self._desk.busy:
                raise StopIteration
            for piece in self._desk.advance():
                self._note(piece)
        return self._ready.popleft()

    def stop(self, row: int) -> None:
        """End a request now, whether it runs or waits."""
        self._desk.stop(row)
        self.reasons.setdefault(row, STOP)

    def _note(self, piece: Piece) -> None:
        content: Any = piece.text if self._desk.as_text else piece.token
        if content not in (None, ""):
            self._ready.append((piece.number, content))
        if piece.reason is not None:
            self.reasons[piece.number] = piece.reason
        if piece.fault is not None:
            self._faults.append(piece.fault)


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
    asked = [read_request(given, number, options) for number, given in enumerate(requests)]
    orders = [make_order(session, request, number, session.max_length) for number, request in enumerate(asked)]
    if not orders:
        raise LimeEdgeError("no requests", FORM)
    needed = max(len(order.ids) + order.most - 1 for order in orders)
    desk = Desk(session, open_rows(session, min(most, len(orders)), needed, memory), as_text)
    for order, request in zip(orders, asked, strict=True):
        desk.place(order, request.options)
    return Answers(desk)


def read_logits(session: Asked, requests: Sequence[tuple[Any, Selection]], keep: int) -> list[np.ndarray]:
    """Logits of sequences under experts of their own; a beginning that some share under one expert is read once.

    Args, Returns, Raises: see Session.logits_many.
    """
    orders = []
    for number, (prompt, selection) in enumerate(requests):
        options = GenerationOptions(max_new_tokens=1)
        orders.append(make_order(session, Request(prompt, selection, options), number, session.max_length))
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
