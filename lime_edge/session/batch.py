"""Requests under way together: rows start, end and are refilled while others go on (continuous batching).

A row is one sequence with a cache and an expert of its own. All rows that have a token to go on with step in one pass;
the prompts of new ones are read in pieces between two steps, so that nobody waits long for somebody else's prompt. A
beginning that requests share under the same expert is read once. Row for row the answers are those of a session of its
own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lime_edge.errors import LimeEdgeError
from lime_edge.session.chunks import CHUNK, plan_chunks
from lime_edge.session.engines import Rows
from lime_edge.session.prefixes import SHORTEST, PrefixCache, count_common
from lime_edge.session.sampling import Pick

STOP, LENGTH, FULL, FAILED = "stop", "length", "cache", "failed"  # why a generation ended
SLICE = 64  # prompt tokens that are read between two steps


@dataclass(frozen=True)
class Reader:
    """Who reads tokens: d (sum_H,) float32, None for routing; `filler` tells it from others in a cache."""

    residual: np.ndarray | None = field(repr=False)
    filler: bytes


@dataclass(frozen=True)
class Order:
    """A request, checked.

    number: the caller's. ids: of the prompt. expert: reads them and answers, `silent` first ones left out, which
    `before` reads: the original model, where an expert acts from the generation prompt on. most: tokens to generate;
    limit: why it ends there. eos: tokens that end it.
    """

    number: int
    ids: tuple[int, ...]
    expert: Reader
    pick: Pick
    most: int
    limit: str
    eos: tuple[int, ...] = ()
    silent: int = 0
    before: Reader | None = None

    @property
    def first(self) -> Reader:
        """Who reads the prompt's beginning."""
        return self.before if self.before is not None and self.silent else self.expert

    @property
    def shareable(self) -> tuple[int, ...]:
        """The beginning that others may have read: all of what the original model reads; else all but two tokens,
        whose logits are wanted (a call of one may round otherwise); nothing where routing must see it in one call."""
        if self.silent:
            return self.ids[: self.silent]
        return () if self.expert.residual is None else self.ids[:-2]


@dataclass
class Job:
    """An order under way: its row, the prompt tokens that were read (`kept` of them by somebody else, before), the
    tokens it gave, and the one to go on with."""

    order: Order
    row: int
    read: int
    kept: int = 0
    given: int = 0
    token: int | None = None

    @property
    def reads(self) -> bool:
        """Whether some of its prompt is still to be read."""
        return self.read < len(self.order.ids)


@dataclass(frozen=True)
class Event:
    """What came of a request: a token, or, with `reason`, its end (then token is None), and what went wrong.

    kept: tokens of its prompt that did not have to be read again.
    """

    number: int
    token: int | None = None
    reason: str = ""
    fault: LimeEdgeError | None = None
    kept: int = 0


class Batch:
    """Orders on the rows of an engine. `submit` some, `advance` while there are any, `stop` one at any time.

    Args:
        rows: of the engine. prefixes: where beginnings that are shared are kept. keep_prompts: every prompt is kept
            there, for orders that are not known yet; otherwise what an order that waits has in common with it.
    """

    def __init__(self, rows: Rows, prefixes: PrefixCache, keep_prompts: bool = False):
        self._rows, self._prefixes, self._keeps = rows, prefixes, keep_prompts
        self._queue: deque[Order] = deque()
        self._jobs: dict[int, Job] = {}  # by the order's number, in the order they started
        self.prompts_s = self.steps_s = 0.0  # seconds spent on each so far

    @property
    def busy(self) -> bool:
        """Whether there is anything to advance."""
        return bool(self._queue or self._jobs)

    @property
    def running(self) -> tuple[int, ...]:
        """Numbers of the orders that have a row."""
        return tuple(self._jobs)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Numbers of the orders that wait for one, in order."""
        return tuple(order.number for order in self._queue)

    def submit(self, order: Order) -> None:
        """Queue an order: it starts when a row is free.

        Raises:
            LimeEdgeError: its prompt, or with it its answer, does not fit into a row: nothing is cut off in silence.
        """
        needed = len(order.ids) + order.most - 1  # the last token is given out, not read
        if needed > self._rows.capacity:
            raise LimeEdgeError(
                f"request {order.number}: {needed} tokens are needed, a row holds {self._rows.capacity}",
                "shorten it, or open longer rows",
            )
        self._queue.append(order)

    def stop(self, number: int) -> None:
        """End an order that runs or waits; one that has ended already is nothing to stop."""
        job = self._jobs.pop(number, None)
        if job is not None:
            self._rows.stop(job.row)
        else:
            self._queue = deque(order for order in self._queue if order.number != number)

    def advance(self) -> list[Event]:
        """Start what fits, read a piece of the prompts that wait, and one step of all rows that answer."""
        begun = time.perf_counter()
        self._start()
        events = self._read_prompts()
        self.prompts_s += (read := time.perf_counter()) - begun
        stepping = [job for job in self._jobs.values() if job.token is not None]
        if stepping:
            tokens = [job.token for job in stepping if job.token is not None]
            for job, logits in zip(stepping, self._rows.step([job.row for job in stepping], tokens), strict=True):
                events += self._take(job, logits)
        self.steps_s += time.perf_counter() - read
        return events

    def _start(self) -> None:
        """Give free rows to the orders that waited longest, those left out that a prompt being read will spare work."""
        waiting: list[Order] = []
        while self._queue and len(self._jobs) < self._rows.count:
            order = self._queue.popleft()
            if self._is_worth_waiting(order):
                waiting.append(order)
            else:
                row, read = begin_row(self._rows, order, self._prefixes, order.shareable)
                self._jobs[order.number] = Job(order, row, read, read)
        self._queue.extendleft(reversed(waiting))

    def _is_worth_waiting(self, order: Order) -> bool:
        """Whether a prompt that is being read now will give the order a longer beginning than there is."""
        found = self._prefixes.find(order.first.filler, order.shareable, self._rows.capacity)[0]
        return any(
            count_common(job.order.shareable, order.shareable) >= found + SHORTEST
            for job in self._jobs.values()
            if job.read < len(job.order.shareable) and job.order.first.filler == order.first.filler
        )

    def _read_prompts(self) -> list[Event]:
        """About SLICE tokens of prompts, first come first; CHUNK where nobody answers yet."""
        events: list[Event] = []
        size = SLICE if any(job.token is not None for job in self._jobs.values()) else CHUNK
        budget = size
        for job in [job for job in self._jobs.values() if job.reads]:
            while budget > 0 and job.reads:
                before = job.read
                logits = self._read(job, size)
                budget -= job.read - before
                if not job.reads:
                    events += self._take(job, logits)
        return events

    def _read(self, job: Job, size: int) -> np.ndarray:
        """The next piece of a prompt: its last logits (V,)."""
        stop = plan_piece(job.order, job.read, size)
        logits = self._rows.feed(job.row, np.array(job.order.ids[job.read : stop], np.int64), 1)[-1]
        job.read = stop
        if stop == job.order.silent:
            self._rows.set_expert(job.row, job.order.expert.residual)
            self._share(job, job.order.ids[:stop])
        elif stop == len(job.order.ids) and not job.order.silent:
            self._share(job, job.order.shareable if self._keeps else ())
        return logits

    def _share(self, job: Job, least: Sequence[int]) -> None:
        """Keep the beginning of a prompt that was read, as far as orders that wait have it too; `least` in any case."""
        own, filler = job.order.shareable, job.order.first.filler
        wanted = [count_common(own, other.shareable) for other in self._queue if other.first.filler == filler]
        count = max([*wanted, len(least)])
        if count >= SHORTEST and count > self._prefixes.find(filler, own[:count], self._rows.capacity)[0]:
            self._prefixes.keep(filler, own[:count], self._rows.save(job.row, count))

    def _take(self, job: Job, logits: np.ndarray) -> list[Event]:
        """Pick a token; what comes of it."""
        order = job.order
        try:
            token = order.pick(logits)
        except LimeEdgeError as error:
            fault = LimeEdgeError(f"request {order.number}: {error.problem}", error.hint)
            return [self._end(job, FAILED, fault)]
        if token in order.eos:
            return [self._end(job, STOP)]
        job.given, job.token = job.given + 1, token
        events = [Event(order.number, token, kept=job.kept)]
        if job.given == order.most:
            events.append(self._end(job, order.limit))
        return events

    def _end(self, job: Job, reason: str, fault: LimeEdgeError | None = None) -> Event:
        self.stop(job.order.number)
        return Event(job.order.number, None, reason, fault, job.kept)


def begin_row(rows: Rows, order: Order, prefixes: PrefixCache, most: Sequence[int]) -> tuple[int, int]:
    """Take a row for an order; it begins with what is kept of its prompt.

    Args:
        most: the beginning that need not be read again where it is kept.
    Returns:
        The row, and how many tokens it begins with.
    """
    count, prefix = prefixes.find(order.first.filler, most, rows.capacity)
    if 0 < count == order.silent - 1:
        count -= 1  # no single token is left to be read
    row = rows.start(order.first.residual, prefix)
    rows.rewind(row, count)
    if order.silent and count == order.silent:
        rows.set_expert(row, order.expert.residual)
    return row, count


def plan_piece(order: Order, read: int, size: int) -> int:
    """Where the next piece of a prompt ends: after `size` tokens or so, where the reader changes, routed at its end."""
    end = order.silent if read < order.silent else len(order.ids)
    if read >= order.silent and order.expert.residual is None:
        return end
    return read + plan_chunks(read, end - read, size)[0]
