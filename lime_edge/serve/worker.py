"""The thread that owns a session and steps its rows; the asyncio side talks to it by queues alone.

To the thread: functions, run one after another between two steps. Back: `Update`s, one call into the event loop for
all that a step gave, put into the mailbox of whoever asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from lime_edge.bundle.experts import Selection
from lime_edge.errors import LimeEdgeError
from lime_edge.serve.metrics import Metrics
from lime_edge.serve.refusals import Refusal, refuse, refuse_shutdown
from lime_edge.serve.settings import ServeOptions
from lime_edge.serve.skills import name_skill
from lime_edge.serve.thread import SessionThread
from lime_edge.session.batch import FAILED, FULL, LENGTH, STOP, Batch, Event
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions, TextStream
from lime_edge.session.many import Request, make_order, open_rows

CANCELLED = "cancelled"
REASONS = {STOP: "stop", LENGTH: "length", FULL: "length"}  # as the API calls them


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted. ids: the prompt. selection: whose. options: how."""

    ids: tuple[int, ...] = field(repr=False)
    selection: Selection
    options: GenerationOptions


@dataclass(frozen=True)
class Update:
    """What came of an answer: a piece of text, and with `reason` its end; with `refusal` why there is none.

    index: which of a request's answers. tokens: how many it has by now. accepted: it is queued, nothing else yet.
    """

    index: int
    piece: str = ""
    tokens: int = 0
    reason: str = ""
    refusal: Refusal | None = None
    accepted: bool = False

    @property
    def ends(self) -> bool:
        """Whether nothing more comes."""
        return bool(self.reason) or self.refusal is not None


Mailbox = asyncio.Queue[Update]


@dataclass
class Ticket:
    """An answer under way. `stream` is the worker's; `ended` the event loop's."""

    number: int
    ask: Ask
    index: int
    mailbox: Mailbox = field(repr=False)
    stream: TextStream = field(repr=False)
    asked: float = field(default_factory=time.monotonic)
    tokens: int = 0
    ended: bool = False

    @property
    def skill(self) -> str:
        """What it is counted under."""
        return name_skill(self.ask.selection)


class Worker:
    """Answers requests in the rows of one session.

    Args:
        open_session: called on the session's thread.
    """

    def __init__(self, open_session: Callable[[], Session], options: ServeOptions, metrics: Metrics):
        self._options, self._metrics, self._numbers = options, metrics, 0
        self.thread = SessionThread("lime-edge-rows", lambda: self._prepare(open_session()), self._step)
        self.under_way: dict[int, Ticket] = {}  # the event loop's
        self.broken: str | None = None  # why no answer can be given any more
        self.closing = False

    # the event loop's side

    async def start(self) -> Session:
        """Open the session on its thread; what is returned is for looking at.

        Raises:
            LimeEdgeError: the bundle or its engine, or one that runs one sequence at a time.
        """
        self._loop = asyncio.get_running_loop()
        return await self.thread.start()

    @property
    def running(self) -> int:
        """Rows that are taken."""
        return len(self._batch.running)

    @property
    def waiting(self) -> int:
        """Answers that have no row yet."""
        return max(0, len(self.under_way) - self.running)

    def submit(self, asks: Sequence[Ask], mailbox: Mailbox) -> list[Ticket]:
        """Queue the answers of one request, all or none.

        Raises:
            Refusal: 503 when it goes down or is broken, 429 when the queue is full.
        """
        if self.closing:
            raise refuse_shutdown()
        if self.broken is not None:
            raise Refusal(503, f"the engine failed: {self.broken}", "engine_failed")
        count = len(self.under_way)
        if len(asks) + count > self.rows + self._options.most_waiting:
            self._metrics.refused.inc()
            told = f"{count} answers run or wait: no more are queued"
            raise Refusal(429, told, "queue_full", retry_after=1 + count // self.rows)
        return [self._queue(ask, index, mailbox) for index, ask in enumerate(asks)]

    def _queue(self, ask: Ask, index: int, mailbox: Mailbox) -> Ticket:
        self._numbers += 1
        ticket = Ticket(self._numbers, ask, index, mailbox, TextStream(self.codec.decode, ask.options.stop))
        self.under_way[ticket.number] = ticket
        self.thread.put(lambda: self._begin(ticket))
        return ticket

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """End answers that nobody waits for any more: their rows are free at the next step."""
        for ticket in tickets:
            if not ticket.ended:
                self._end(ticket, CANCELLED)
                self.thread.put(lambda number=ticket.number: self._drop(number))  # type: ignore[misc]

    def end_all(self) -> None:
        """End every answer, and say why: the server goes down."""
        for ticket in list(self.under_way.values()):
            ticket.mailbox.put_nowait(Update(ticket.index, tokens=ticket.tokens, refusal=refuse_shutdown()))
            self.cancel([ticket])

    def _deliver(self, updates: Sequence[tuple[Ticket, Update]]) -> None:
        for ticket, update in updates:
            if ticket.ended:
                continue
            if update.ends:
                self._end(ticket, update.reason or FAILED)
            ticket.mailbox.put_nowait(update)

    def _end(self, ticket: Ticket, reason: str) -> None:
        ticket.ended = True
        self.under_way.pop(ticket.number, None)
        self._metrics.answers.labels(ticket.skill, reason).inc()
        self._metrics.seconds.observe(time.monotonic() - ticket.asked)

    # the thread's side

    def _prepare(self, session: Session) -> Session:
        self._session, self.codec = session, session.codec
        self._open_batch()
        return session

    def _open_batch(self) -> None:
        session, options = self._session, self._options
        rows = open_rows(session, options.rows, session.max_length, options.memory)
        self.rows, self.capacity, self.nbytes = rows.count, rows.capacity, rows.nbytes
        self._batch, self._tickets = Batch(rows, session.prefixes), dict[int, Ticket]()

    def _begin(self, ticket: Ticket) -> None:
        try:
            request = Request(ticket.ask.ids, ticket.ask.selection)
            order = make_order(self._session, request, ticket.number, ticket.ask.options)
            self._batch.submit(order)
        except LimeEdgeError as error:
            problem = error.problem.removeprefix(f"request {ticket.number}: ")
            self._post([(ticket, Update(ticket.index, refusal=refuse(LimeEdgeError(problem, error.hint))))])
            return
        self._tickets[ticket.number] = ticket
        self._metrics.prompt_tokens.labels(ticket.skill).inc(len(order.ids))
        self._post([(ticket, Update(ticket.index, accepted=True))])

    def _drop(self, number: int) -> None:
        if self._tickets.pop(number, None) is not None:
            self._batch.stop(number)

    def _step(self) -> bool:
        """One step of all rows, and what came of it; whether there is more to do."""
        if self._batch.busy:
            try:
                events = self._batch.advance()
            except Exception as error:  # an engine's: nothing is known of its rows any more
                self._recover(error)
            else:
                self._post([pair for event in events for pair in self._note(event)])
        return self._batch.busy

    def _note(self, event: Event) -> list[tuple[Ticket, Update]]:
        ticket = self._tickets.get(event.number)
        if ticket is None:  # it came to a stop string in this very step
            return []
        if event.token is None:
            del self._tickets[event.number]
            if event.fault is not None:
                told = Refusal(500, event.fault.problem, "no_numbers")
                return [(ticket, Update(ticket.index, tokens=ticket.tokens, refusal=told))]
            return [(ticket, Update(ticket.index, ticket.stream.finish(), ticket.tokens, REASONS[event.reason]))]
        ticket.tokens += 1
        if ticket.tokens == 1:
            self._metrics.first_token.observe(time.monotonic() - ticket.asked)
        self._metrics.answer_tokens.labels(ticket.skill).inc()
        piece = ticket.stream.push(event.token)
        if ticket.stream.stopped:
            self._drop(event.number)
            return [(ticket, Update(ticket.index, piece, ticket.tokens, REASONS[STOP]))]
        return [(ticket, Update(ticket.index, piece, ticket.tokens))] if piece else []

    def _recover(self, error: Exception) -> None:
        """The engine failed: its answers end with an error, and new rows are opened for those that come."""
        self._metrics.failures.inc()
        problem = error.problem if isinstance(error, LimeEdgeError) else f"{type(error).__name__}: {error}"
        told = Refusal(500, f"the engine failed: {problem}", "engine_failed")
        self._post([(ticket, Update(ticket.index, refusal=told)) for ticket in self._tickets.values()])
        for number in list(self._tickets):
            self._drop(number)
        try:
            self._open_batch()
        except Exception as worse:
            self.broken = str(worse)

    def _post(self, updates: Sequence[tuple[Ticket, Update]]) -> None:
        if updates:
            with suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._deliver, updates)
