"""A terminal recording, made by a script: commands typed into a real terminal, what came back and when.

    tools/record_demo.py build/demo.lime        writes docs/pictures/demo.cast (asciinema's format) and demo.svg

The picture is an SVG that plays by itself: every piece of output appears when it came.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import sys
import tempfile
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLUMNS, PROMPT = 92, "$ "
KEY, PAUSE, LONGEST = 0.05, 0.8, 300.0  # seconds: between keys, before a line is typed, for one answer
STEPS = (  # what is typed, and what the terminal says when it is done
    ("lime-edge run build/demo.lime patent --expert plural", PROMPT),
    ("lime-edge run build/demo.lime patent --expert past", PROMPT),
    ("lime-edge run build/demo.lime        # a chat: one session, the model is loaded once", "] > "),
    ("patent", "] > "),
    ("/expert gerund", "] > "),
    ("patent", "] > "),
    ("/expert question", "] > "),
    ("That queen sees my kettle in the morning.", "] > "),
    ("/expert passive", "] > "),
    ("That queen sees my kettle in the morning.", "] > "),
    ("/expert tomorrow", "] > "),
    ("1982-04-11", "] > "),
    ("/quit", PROMPT),
)
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x07")
Event = tuple[float, str]


class Terminal:
    """A shell in a pseudo-terminal, and what it said with the seconds since the start."""

    def __init__(self, folder: Path):
        self.events: list[Event] = []
        self._begin = time.monotonic()
        child, self._file = pty.fork()
        if child == 0:
            os.chdir(folder)
            kept = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "LD_", "HOME"))}
            path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
            own = {"PATH": path, "PS1": PROMPT, "TERM": "dumb", "COLUMNS": str(COLUMNS), "LC_ALL": "C.UTF-8"}
            os.execve("/bin/sh", ["sh"], kept | own)
        self._child = child

    def type(self, line: str) -> None:
        """Type a line as a person does, and press return."""
        time.sleep(PAUSE)
        for key in line:
            os.write(self._file, key.encode())
            self._listen(KEY)
        os.write(self._file, b"\n")

    def wait_for(self, mark: str, since: int = 0) -> None:
        """Listen until what was said after the event `since` has a line end in it and ends with `mark`."""
        deadline = time.monotonic() + LONGEST
        while True:
            said = "".join(text for _, text in self.events[since:])
            if said.endswith(mark) and ("\n" in said or not since):
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"no {mark!r} after {LONGEST} seconds: {said[-300:]!r}")
            self._listen(0.1)

    def _listen(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([self._file], [], [], left)[0]:
                text = CODES.sub("", os.read(self._file, 65536).decode(errors="replace"))
                if text:
                    self.events.append((time.monotonic() - self._begin, text))

    def close(self) -> None:
        """End the shell."""
        os.write(self._file, b"exit\n")
        os.waitpid(self._child, 0)
        os.close(self._file)


def record(bundle: Path, steps: Sequence[tuple[str, str]] = STEPS) -> list[Event]:
    """Type every step into a shell beside `build/demo.lime`, and listen."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "build").mkdir()
        (Path(place) / "build" / "demo.lime").symlink_to(bundle.resolve())
        terminal = Terminal(Path(place))
        terminal.wait_for(PROMPT)
        for line, mark in steps:
            terminal.type(line)
            terminal.wait_for(mark, len(terminal.events))
        terminal.close()
    return terminal.events


def write_cast(events: Sequence[Event], rows: int) -> str:
    """asciicast, version 2."""
    head = {"version": 2, "width": COLUMNS, "height": rows, "title": "lime-edge: one model, many skills"}
    lines = [json.dumps(head), *(json.dumps([round(when, 3), "o", text]) for when, text in events)]
    return "\n".join(lines) + "\n"


def lay_out(events: Sequence[Event]) -> list[tuple[float, int, int, str]]:
    """(seconds, row, column, text) of every piece, with line ends, backspaces and long lines as a terminal has them."""
    pieces: list[tuple[float, int, int, str]] = []
    row = column = 0
    for when, text in events:
        for part in re.split(r"(\r\n|\r|\n|\x08)", text):
            if part in ("\r\n", "\n"):
                row, column = row + 1, 0
            elif part == "\r":
                column = 0
            elif part == "\x08":
                column = max(0, column - 1)
            while part and part[0] not in "\r\n\x08":
                piece, part = part[: COLUMNS - column], part[COLUMNS - column :]
                pieces.append((when, row, column, piece))
                column += len(piece)
                if part:
                    row, column = row + 1, 0
    return pieces


def draw(events: Sequence[Event]) -> str:
    """The recording as an SVG that plays: pieces appear one after another, and stay."""
    pieces, size, width, height = lay_out(events), 13, 7.83, 18
    rows = max(row for _, row, _, _ in pieces) + 1
    box = (COLUMNS * width + 24, rows * height + 44)
    texts = []
    for when, row, column, text in pieces:
        if not text.strip():
            continue
        x, y = 12 + column * width, 46 + row * height
        texts.append(
            f'<text x="{x:.1f}" y="{y}" style="animation-delay:{when:.2f}s" textLength="{len(text) * width:.1f}" '
            f'xml:space="preserve">{escape(text)}</text>'
        )
    style = (
        f"text{{font:{size}px ui-monospace,monospace;fill:#e6e6e6;opacity:0;animation:show .01s forwards}}"
        "@keyframes show{to{opacity:1}}@media (prefers-reduced-motion:reduce){text{opacity:1;animation:none}}"
    )
    dots = "".join(
        f'<circle cx="{18 + 18 * n}" cy="16" r="5" fill="{c}"/>'
        for n, c in enumerate(("#c0504d", "#d9a832", "#4f9153"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {box[0]:.0f} {box[1]:.0f}" role="img">\n'
        f"<title>A terminal: lime-edge answers one input with several experts</title>\n<style>{style}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#1d2126"/>{dots}\n' + "\n".join(texts) + "\n</svg>\n"
    )


def main() -> None:
    """Record a bundle and write both files."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "pictures"
    events = record(Path(sys.argv[1]))
    rows = max(row for _, row, _, _ in lay_out(events)) + 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.cast").write_text(write_cast(events, rows), encoding="utf-8")
    (folder / "demo.svg").write_text(draw(events), encoding="utf-8")


if __name__ == "__main__":
    main()
