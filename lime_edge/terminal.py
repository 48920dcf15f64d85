"""What the command line prints: tables, progress bars, sizes; JSON where asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lime_edge.errors import show_plain

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_quiet = False


def be_quiet(wanted: bool = True) -> None:
    """From now on no progress bars and no notes; results, warnings and errors stay."""
    global _quiet
    _quiet = wanted


def is_quiet() -> bool:
    """Whether progress and notes were unwanted."""
    return _quiet


def note(text: str) -> None:
    """One remark on standard error, plain text; nothing when quiet."""
    if not _quiet:
        err.print(show_plain(text), markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """One result on standard output: plain text, whatever names and paths in it hold."""
    out.print(show_plain(text), markup=False, soft_wrap=True)


def warn(text: str, hint: str = "") -> None:
    """A warning on standard error, plain text."""
    body = escape(text) + (f"\n  hint: {escape(hint)}" if hint else "")
    err.print(f"[bold yellow]warning:[/bold yellow] {body}", soft_wrap=True)


def show_size(count: float) -> str:
    """Bytes for people: 92.2 kB, 96.3 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def show_hash(digest: str) -> str:
    """A sha256 in a table: whole where the terminal is wide enough, else its first 16 digits (`--json` has all)."""
    return digest if out.width >= 100 else digest[:16]


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=1))


def print_table(title: str, columns: dict[str, str], rows: list[list[str]]) -> None:
    """A table. Everything in it is plain text. columns: header -> "left" or "right"."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for header, justify in columns.items():
        table.add_column(header, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)


@contextmanager
def show_steps() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error, one per named step; yields (step, done, total) -> None."""
    bars, tasks = _progress(), dict[str, Any]()

    def update(step: str, done: int, total: int) -> None:
        bars.start()  # once: bars without a step would leave an empty line
        if step not in tasks:
            tasks[step] = bars.add_task(step, total=total)
        bars.update(tasks[step], completed=done, total=total)

    try:
        yield update
    finally:
        bars.stop()


@contextmanager
def show_count(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """One progress bar on standard error; yields done -> None."""
    with show_steps() as update:
        yield lambda done: update(label, done, total)


@contextmanager
def show_wait(text: str) -> Iterator[None]:
    """A spinner on standard error while something opens; nothing when quiet."""
    if _quiet:
        yield
        return
    with err.status(escape(text)):
        yield


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),  # an estimate from the pace so far
        console=err,
        transient=not err.is_terminal,
        disable=_quiet,
    )


def escape(text: str) -> str:
    """Text to put between markup: its own square brackets are none, and what is not printable is spelled out."""
    from rich.markup import escape as escape_markup

    return escape_markup(show_plain(text))
