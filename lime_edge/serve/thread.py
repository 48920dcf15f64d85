"""A session's own thread: it opens the session, and whatever is done with it is done there."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Generic, TypeVar

from lime_edge.session.switching import ExpertSwitch

SessionT = TypeVar("SessionT", bound=ExpertSwitch)
T = TypeVar("T")
Work = Callable[[], None]


def rest() -> bool:
    """Nothing to do between two works."""
    return False


class SessionThread(Generic[SessionT]):
    """Runs functions one after another, and `step` between them for as long as that finds something to do.

    Args:
        name: of the thread. open_session: called first, on the thread. step: whether there is more to do.
    """

    def __init__(self, name: str, open_session: Callable[[], SessionT], step: Callable[[], bool] = rest):
        self._open_session, self._step = open_session, step
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._opened: Future[SessionT] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.session: SessionT  # the thread's alone

    async def start(self) -> SessionT:
        """Open the session; what is returned is for looking at.

        Raises:
            LimeEdgeError: what opening raises.
        """
        self._thread.start()
        return await asyncio.wrap_future(self._opened)

    def put(self, work: Work) -> None:
        """Run a function that returns nothing and raises nothing."""
        self._work.put(work)

    async def call(self, work: Callable[[SessionT], T]) -> T:
        """What a function of the session returns, or raises."""
        done: Future[T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return  # who asked has left
            try:
                done.set_result(work(self.session))
            except BaseException as error:  # the caller's, whatever it is
                done.set_exception(error)

        self._work.put(run)
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the thread when what it does now is done."""
        self._work.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            self.session = self._open_session()
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(self.session)
        busy = False
        while self._take(wait=not busy):
            busy = self._step()

    def _take(self, wait: bool) -> bool:
        """Run what was asked for meanwhile; wait for it where there is nothing else to do. False: the end."""
        with suppress(queue.Empty):
            while True:
                work = self._work.get(block=wait)
                if work is None:
                    return False
                work()
                wait = False
        return True
