"""A desk that takes requests at any time: what a server stands on, and what `generate_many` is a loop over."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lime_edge.bundle.experts import Selection
from lime_edge.errors import EXIT_MISSING, LimeEdgeError
from lime_edge.session.batch import STOP, Batch, Event, Order
from lime_edge.session.engines import Rows, blame_engine
from lime_edge.session.generate import GenerationOptions, TextStream
from lime_edge.session.requests import Asked, Request, make_order


class QueueFullError(LimeEdgeError):
    """As many requests wait as may: ask again later."""


@dataclass(frozen=True)
class Piece:
    """What came of a request, in order: a token with the text that became certain, or its end.

    number: what `ask` gave. text: maybe empty: a piece is held back while it may still change. token: None where the
    piece is the end alone. reason: None while it goes on; "stop" (end token or stop string), "length", "cache" (its
    row is full), "failed" (then `fault` says why). prompt_tokens, kept_tokens: of the prompt, and those of them that
    did not have to be read again. new_tokens: answered so far, the end token not counted.
    """

    number: int
    text: str = ""
    token: int | None = None
    reason: str | None = None
    fault: LimeEdgeError | None = None
    prompt_tokens: int = 0
    kept_tokens: int = 0
    new_tokens: int = 0


@dataclass
class Asking:
    """A request that has not ended: its text so far (None where only ids are wanted), and its numbers."""

    stream: TextStream | None
    prompt_tokens: int
    new_tokens: int = 0


class Desk:
    """Requests in, pieces of answers out, a step at a time; `Session.open_desk` opens one.

    `ask` queues a request while others run, `advance` makes one step for all that have a row, `stop` ends one. Which
    thread: the session's, for every call (docs/many-skills.md shows how a server does that).

    rows: that run at once. capacity: tokens that each holds. nbytes: of their caches when all are full.
    """

    def __init__(
        self, session: Asked, rows: Rows, as_text: bool = True, queue: int | None = None, keep_prompts: bool = False
    ):
        self._session, self._queue = session, queue
        self._batch = Batch(rows, session.prefixes, keep_prompts)
        self._asked: dict[int, Asking] = {}
        self._numbers = itertools.count()
        self.as_text = as_text
        self.rows, self.capacity, self.nbytes = rows.count, rows.capacity, rows.nbytes

    def ask(self, prompt: str | Sequence[int], selection: Selection, options: GenerationOptions | None = None) -> int:
        """Queue a request: it starts when a row is free. The expert is the one of now, though it be replaced later.

        Args:
            prompt: complete text (chat template applied) or token ids. selection: see ExpertSwitch.use.
        Returns:
            Its number, which is never given twice.
        Raises:
            QueueFullError: as many wait as may; nothing else was looked at.
            LimeEdgeError: bad ids, an unknown expert, a prompt that leaves no room for a token; another thread.
        """
        self.check_owner()
        if self._queue is not None and len(self._asked) >= self.rows + self._queue:
            raise QueueFullError(f"{len(self.waiting)} requests wait already", "ask again later", EXIT_MISSING)
        number = next(self._numbers)
        request = Request(prompt, selection, options or GenerationOptions())
        self.place(make_order(self._session, request, number, self.capacity), request.options)
        return number

    def place(self, order: Order, options: GenerationOptions | None) -> None:
        """Queue an order that was checked before, under its own number."""
        stop = () if options is None else options.stop
        stream = TextStream(self._session.codec.decode, stop) if self.as_text else None
        self._batch.submit(order)
        self._asked[order.number] = Asking(stream, len(order.ids))

    @property
    def busy(self) -> bool:
        """Whether there is anything to advance."""
        return self._batch.busy

    @property
    def running(self) -> tuple[int, ...]:
        """Numbers of the requests that have a row."""
        return self._batch.running

    @property
    def waiting(self) -> tuple[int, ...]:
        """Numbers of the requests that wait for one, in order."""
        return self._batch.waiting

    @property
    def prompts_s(self) -> float:
        """Seconds spent on reading prompts, since it was opened."""
        return self._batch.prompts_s

    @property
    def steps_s(self) -> float:
        """Seconds spent on decode steps, since it was opened."""
        return self._batch.steps_s

    def advance(self) -> list[Piece]:
        """One step: start who waits where a row is free, read a piece of a new prompt, a token for all who answer.

        Returns:
            What came of it, maybe nothing. A request ends with the piece that has a `reason`.
        Raises:
            LimeEdgeError: the engine fails, for all of them: ask again, or `close`; another thread.
        """
        self.check_owner()
        try:
            events = self._batch.advance()
        except LimeEdgeError:
            raise
        except Exception as error:
            raise blame_engine(self._session.target, error) from error
        return [piece for event in events if (piece := self._tell(event)) is not None]

    def stop(self, number: int) -> None:
        """End a request now, whether it runs or waits; no piece of it comes any more. It may have ended."""
        self.check_owner()
        self._batch.stop(number)
        self._asked.pop(number, None)

    def close(self) -> None:
        """End all requests."""
        self.check_owner()
        for number in list(self._asked):
            self.stop(number)

    def check_owner(self) -> None:
        """Refuse another thread than the session's own."""
        self._session.check_owner()

    def _tell(self, event: Event) -> Piece | None:
        asking = self._asked.get(event.number)
        if asking is None:  # a stop string ended it in this very step
            return None
        text, reason, stream = "", event.reason or None, asking.stream
        if event.token is not None:
            asking.new_tokens += 1
            text = stream.push(event.token) if stream else ""
            if stream and stream.stopped:
                self._batch.stop(event.number)
                reason = STOP
        elif stream:
            text = stream.finish()
        if reason is not None:
            del self._asked[event.number]
        tokens = asking.prompt_tokens, event.kept, asking.new_tokens
        return Piece(event.number, text, event.token, reason, event.fault, *tokens)
