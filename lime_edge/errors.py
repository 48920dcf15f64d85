"""What the user is told when something is wrong: problem, hint, exit code; several faults at once."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

EXIT_INPUT = 2  # bad command line, bad or damaged input
EXIT_MISMATCH = 3  # a check ran and the numbers missed it
EXIT_MISSING = 4  # an extra, an engine or a device is not there
EXIT_STORAGE = 5  # nothing could be written: read-only, full


LONGEST = 2000  # characters of a line: what is wrong may be a text of any length


def show_plain(text: str) -> str:
    r"""Text that a terminal may print: what is not printable (control characters, marks that turn the direction of
    writing, half characters of a path that is no UTF-8) is spelled out, as \x1b.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _shorten(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


class LimeEdgeError(Exception):
    """A fault the user can mend.

    Args:
        problem: what is wrong, where, what was expected and what was found; one line per fault.
        hint: what to do about it, or empty.
        exit_code: the process exit code of the command line.
    """

    def __init__(self, problem: str, hint: str = "", exit_code: int = EXIT_INPUT):
        self.problem = problem = "\n".join(map(_shorten, show_plain(problem).split("\n")))
        self.hint = hint = show_plain(hint)
        self.exit_code = exit_code
        super().__init__(f"{problem}\n  hint: {hint}" if hint else problem)


class Faults:
    """Collects every fault of one input and raises them together when the block ends.

    with Faults("adapter/", hint="...") as faults:
        faults.add("q_proj.A", expected="(8, 576)", found="(8, 64)")
    """

    def __init__(self, where: str, hint: str = "", most: int = 20):
        self.where = where
        self.hint = hint
        self.most = most
        self.lines: list[str] = []

    def add(self, what: str, expected: object = None, found: object = None) -> None:
        """Note one fault: `what` is wrong; `expected` and `found` where they help."""
        line = what
        if expected is not None:
            line += f": expected {expected}"
        if found is not None:
            line += f"{',' if expected is not None else ':'} found {found}"
        self.lines.append(_shorten(line))

    def __bool__(self) -> bool:
        return bool(self.lines)

    def raise_any(self) -> None:
        """Raise LimeEdgeError naming all faults; do nothing when there are none."""
        if not self.lines:
            return
        shown = self.lines[: self.most]
        if len(self.lines) > self.most:
            shown.append(f"... and {len(self.lines) - self.most} more")
        if len(shown) == 1:
            raise LimeEdgeError(f"{self.where}: {shown[0]}", self.hint)
        count = len(self.lines)
        body = "\n".join(f"  - {line}" for line in shown)
        raise LimeEdgeError(f"{self.where}: {count} faults\n{body}", self.hint)

    def __enter__(self) -> Faults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.raise_any()


def need(module: str, extra: str) -> LimeEdgeError:
    """The error for a missing optional package: names the pip command that brings it."""
    return LimeEdgeError(
        f"the package {module!r} is not installed",
        f"pip install 'lime-edge[{extra}]' (in a clone of the sources: pip install -e '.[{extra}]')",
        EXIT_MISSING,
    )


def suggest(word: str, known: Iterable[str]) -> str:
    """A hint that names what was probably meant, or empty: "did you mean 'movie'?"."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""
