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
from functools import partial

from lime_edge.bundle.experts import Selection
from lime_edge.errors import LimeEdgeError
from lime_edge.serve.metrics import Metrics
from lime_edge.serve.refusals import Refusal, refuse, refuse_shutdown
from lime_edge.serve.settings import ServeOptions
from lime_edge.serve.skills import name_skill
from lime_edge.serve.thread import SessionThread
from lime_edge.session.batch import FAILED, FULL, LENGTH, STOP
from lime_edge.session.decoder import Session
from lime_edge.session.desk import Piece
from lime_edge.session.generate import GenerationOptions

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

    index: which of a request's answers. tokens: how many it has by now. kept: tokens of its prompt that did not have to
    be read again. accepted: it is queued, nothing else yet.
    """

    index: int
    piece: str = ""
    tokens: int = 0
    kept: int = 0
    reason: str = ""
    refusal: Refusal | None = None
    accepted: bool = False

    @property
    def ends(self) -> bool:
        """Whether nothing more comes."""
        return bool(self.reason) or self.refusal is not None


Mailbox = asyncio.Queue[Update]


@dataclass(eq=False)
class Ticket:
    """An answer under way. `ended` is written by the event loop alone."""

    ask: Ask
    index: int
    mailbox: Mailbox = field(repr=False)
    asked: float = field(default_factory=time.monotonic)
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
        self._options, self._metrics = options, metrics
        self.thread = SessionThread("lime-edge-rows", lambda: self._prepare(open_session()), self._step)
        self.under_way: set[Ticket] = set()  # the event loop's
        self.broken: str | None = None  # why no answer can be given any more
        self.closing, self.kept_bytes = False, 0

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
        return len(self._desk.running)

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
        count, most = len(self.under_way), self.rows + self._options.most_waiting
        if len(asks) + count > most:
            self._metrics.refused.inc()
            told = f"{count} answers run or wait: no more are queued"
            if len(asks) > most:
                told = f"n: {len(asks)} answers at once; this server runs and queues {most} at most"
            raise Refusal(429, told, "queue_full", retry_after=1 + count // self.rows)
        return [self._queue(ask, index, mailbox) for index, ask in enumerate(asks)]

    def _queue(self, ask: Ask, index: int, mailbox: Mailbox) -> Ticket:
        ticket = Ticket(ask, index, mailbox)
        self.under_way.add(ticket)
        self.thread.put(partial(self._begin, ticket))
        return ticket

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """End answers that nobody waits for any more: their rows are free at the next step."""
        for ticket in tickets:
            if not ticket.ended:
                self._end(ticket, CANCELLED)
                self.thread.put(partial(self._drop, ticket))

    def end_all(self) -> None:
        """End every answer, and say why: the server goes down."""
        for ticket in list(self.under_way):
            ticket.mailbox.put_nowait(Update(ticket.index, refusal=refuse_shutdown()))
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
        self.under_way.discard(ticket)
        self._metrics.answers.labels(ticket.skill, reason).inc()
        self._metrics.seconds.observe(time.monotonic() - ticket.asked)

    # the thread's side

    def _prepare(self, session: Session) -> Session:
        self._session, self.codec = session, session.codec
        session.prefixes.limit = self._options.prefixes
        self._open_desk()
        return session

    def _open_desk(self) -> None:
        options, keep = self._options, self._options.prefixes > 0
        self._desk = self._session.open_desk(options.rows, None, options.memory, None, keep_prompts=keep)
        self.rows, self.capacity, self.nbytes = self._desk.rows, self._desk.capacity, self._desk.nbytes
        self._tickets, self._numbers = dict[int, Ticket](), dict[Ticket, int]()  # by the desk's numbers, and back

    def _begin(self, ticket: Ticket) -> None:
        if ticket.ended:
            return
        ask = ticket.ask
        try:
            number = self._desk.ask(ask.ids, ask.selection, ask.options)
        except LimeEdgeError as error:
            self._post([(ticket, Update(ticket.index, refusal=refuse(error)))])
            return
        self._tickets[number], self._numbers[ticket] = ticket, number
        self._metrics.prompt_tokens.labels(ticket.skill).inc(len(ask.ids))
        self._post([(ticket, Update(ticket.index, accepted=True))])

    def _drop(self, ticket: Ticket) -> None:
        number = self._numbers.pop(ticket, None)
        if number is not None:
            del self._tickets[number]
            self._desk.stop(number)

    def _step(self) -> bool:
        """One step of all rows, and what came of it; whether there is more to do."""
        if self._desk.busy:
            try:
                pieces = self._desk.advance()
            except LimeEdgeError as error:  # an engine's: nothing is known of its rows any more
                self._recover(error)
            else:
                self._post([self._note(piece) for piece in pieces])
        return self._desk.busy

    def _note(self, piece: Piece) -> tuple[Ticket, Update]:
        """What came of a ticket; counted."""
        ticket = self._tickets[piece.number]
        if piece.token is not None:
            self._metrics.answer_tokens.labels(ticket.skill).inc()
            if piece.new_tokens == 1:
                self.kept_bytes = self._session.prefixes.nbytes
                self._metrics.kept_tokens.labels(ticket.skill).inc(piece.kept_tokens)
                self._metrics.first_token.observe(time.monotonic() - ticket.asked)
        reason, refusal = "", None
        if piece.reason is not None:
            del self._tickets[piece.number], self._numbers[ticket]
            reason = REASONS.get(piece.reason, "")
            if not reason:
                refusal = Refusal(500, piece.fault.problem if piece.fault else piece.reason, "no_numbers")
        return ticket, Update(ticket.index, piece.text, piece.new_tokens, piece.kept_tokens, reason, refusal)

    def _recover(self, error: LimeEdgeError) -> None:
        """The engine failed: its answers end with an error, and new rows are opened for those that come."""
        self._metrics.failures.inc()
        told = Refusal(500, error.problem, "engine_failed")
        tickets = list(self._numbers)
        for ticket in tickets:
            self._drop(ticket)
        self._post([(ticket, Update(ticket.index, refusal=told)) for ticket in tickets])
        try:
            self._open_desk()
        except Exception as worse:
            self.broken = str(worse)

    def _post(self, updates: Sequence[tuple[Ticket, Update]]) -> None:
        if updates:
            with suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._deliver, updates)
