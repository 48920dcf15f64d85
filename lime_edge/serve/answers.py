"""Answers of language models: from the updates of a request's rows to one body, or to events as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lime_edge.serve.refusals import Refusal
from lime_edge.serve.replies import DONE, WAITING, Head, Usage, write_event
from lime_edge.serve.worker import Ask, Mailbox, Update, Worker

PATIENCE = 15.0  # seconds of silence after which a stream says that it is alive
STALL = 60.0  # seconds that a client may take to read what it was sent
CLOSED_REQUEST = 499  # nobody reads it: the client has left


class Departure(Exception):
    """The client has gone."""


class Answer:
    """The answers to one request, one row each. Use as an asynchronous context: leaving it frees the rows.

    Args:
        asks: one for each answer that is wanted. usage: begins with the tokens of the prompts.
    """

    def __init__(self, worker: Worker, asks: Sequence[Ask], head: Head, usage: Usage, receive: Receive):
        self._worker, self._asks, self._receive = worker, asks, receive
        self.head, self.usage = head, usage
        self._mailbox: Mailbox = asyncio.Queue()

    async def __aenter__(self) -> Answer:
        self._tickets = self._worker.submit(self._asks, self._mailbox)
        self._watch = asyncio.create_task(self._watch_client())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watch.cancel()
        self._worker.cancel(self._tickets)

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._mailbox.put_nowait(Update(-1))

    def _open(self, update: Update) -> Update:
        if update.index < 0:
            raise Departure
        if update.refusal is not None:
            raise update.refusal
        if update.tokens:
            self.usage.answers[update.index], self.usage.kept[update.index] = update.tokens, update.kept
        return update

    async def accept(self) -> None:
        """Wait until all rows are queued: from then on nothing is wrong with the request.

        Raises:
            Refusal: what is wrong with it. Departure: the client has gone.
        """
        self._early: list[Update] = []
        left = len(self._asks)
        while left:
            update = self._open(await self._mailbox.get())
            if update.accepted:
                left -= 1
            else:
                self._early.append(update)

    async def updates(self) -> AsyncIterator[Update | None]:
        """What comes until all have ended, after `accept`; None where nothing came for PATIENCE.

        Raises:
            Refusal: an answer failed, or the server goes down. Departure: the client has gone.
        """
        left = len(self._asks)
        for update in self._early:
            left -= update.ends
            yield update
        while left:
            coming = asyncio.ensure_future(self._mailbox.get())
            try:
                while not (await asyncio.wait([coming], timeout=PATIENCE))[0]:
                    yield None
                update = self._open(coming.result())
            finally:
                coming.cancel()
            left -= update.ends
            yield update

    async def gather(self) -> dict[str, Any]:
        """The whole reply.

        Raises: as `updates`.
        """
        texts, reasons = [""] * len(self._asks), [""] * len(self._asks)
        await self.accept()
        async for update in self.updates():
            if update is not None:
                texts[update.index] += update.piece
                reasons[update.index] = update.reason
        form = self.head.form
        choices = [form.choice(index, text, reasons[index]) for index, text in enumerate(texts)]
        return self.head.write(form.whole, choices) | {"usage": self.usage.write()}


class EventStream(Response):
    """A reply in pieces. An error before the first piece is an ordinary one, later an event that ends the stream.

    Args:
        counted: whether a last piece tells the tokens.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, counted: bool):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._counted = answer, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; leaves early, and frees the rows, when the client does."""
        with suppress(Departure, OSError, TimeoutError):
            async with self._answer:
                await self._answer.accept()
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for event in self._events():
                    message = {"type": "http.response.body", "body": event, "more_body": True}
                    await asyncio.wait_for(send(message), STALL)
                await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        head, form = self._answer.head, self._answer.head.form
        none = {"usage": None} if self._counted else {}
        begun: set[int] = set()
        try:
            async for update in self._answer.updates():
                if update is None:
                    yield WAITING
                    continue
                if form.is_chat and update.index not in begun:
                    begun.add(update.index)
                    yield write_event(head.write(form.piece, [form.delta(update.index, "", None, True)]) | none)
                if update.piece:
                    yield write_event(head.write(form.piece, [form.delta(update.index, update.piece, None)]) | none)
                if update.reason:
                    yield write_event(head.write(form.piece, [form.delta(update.index, "", update.reason)]) | none)
        except Refusal as refusal:
            yield write_event(refusal.body())
            return
        if self._counted:
            yield write_event(head.write(form.piece, []) | {"usage": self._answer.usage.write()})
        yield DONE


async def reply(request: Request, answer: Answer, streamed: bool, counted: bool) -> Response | dict[str, Any]:
    """What a request is answered with."""
    if streamed:
        return EventStream(answer, counted)
    try:
        async with answer:
            return await answer.gather()
    except Departure:
        return Response(status_code=CLOSED_REQUEST)
