"""Whose turn it is: a running generation notices that something else used its cache."""

from __future__ import annotations

from lime_edge.errors import LimeEdgeError


class Turn:
    """Counts what changes a session's cache or expert; a generation compares before it goes on."""

    def __init__(self) -> None:
        self._count, self._by = 0, ""

    def disturb(self, by: str) -> int:
        """Note a change, and which method made it; returns its number."""
        self._count, self._by = self._count + 1, by
        return self._count

    def begin(self) -> int:
        """A generation begins: that ends any other. Returns what `check` takes."""
        return self.disturb("another generation")

    def check(self, turn: int) -> None:
        """Go on only if nothing happened since that turn began.

        Raises:
            LimeEdgeError: what happened.
        """
        if turn != self._count:
            raise LimeEdgeError(
                f"this generation was disturbed by {self._by}: cache or expert are no longer its own",
                "let it end, or leave it, before the session is used otherwise; a second session runs beside it",
            )
