"""One thread at a time: engine and cache know no locks, so a second thread is refused instead of bleeding."""

from __future__ import annotations

import threading

from lime_edge.errors import LimeEdgeError

HINT = (
    "open a session per thread (the weights are mapped once), or let the thread that used it last call hand_over() "
    "under a lock of your own"
)


class Owner:
    """The thread that a session belongs to: the first that uses it, until it is handed over."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        """Take a session that nobody has, or refuse another thread's.

        Raises:
            LimeEdgeError: it belongs to another thread.
        """
        if self._thread is not threading.current_thread():
            self._take()

    def _take(self) -> None:
        mine = threading.current_thread()
        with self._lock:
            if self._thread is None:
                self._thread = mine
            elif self._thread is not mine:
                raise LimeEdgeError(
                    f"this session belongs to the thread {self._thread.name!r}, {mine.name!r} may not use it", HINT
                )

    def release(self) -> None:
        """Let the next thread that comes have it. An owner that has ended needs not be asked.

        Raises:
            LimeEdgeError: it belongs to another thread, which still runs.
        """
        if self._thread is not None and self._thread.is_alive():
            self.check()
        self._thread = None
