"""The documentation's commands: read from the pages, and made into one script for each page.

Every block of `sh` or `python` is run in the order of its page, in a folder that looks like a checkout after `make
demo`,
unless a comment in the line above says otherwise:

    <!-- not run: WHY -->          it is not
    <!-- run by: tests/FILE.py -->  another test runs it
    <!-- on the device -->          it is run where `scp` copies to
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?:^<!--[ ]*(?P<note>[^\n]*?)[ ]*-->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```", re.M | re.S)
RUN = ("sh", "bash", "python")
NOTES = ("not run: ", "run by: ", "on the device")


@dataclass(frozen=True)
class Block:
    """Some commands of a page: their language, the note above them, the line they begin at."""

    page: Path
    line: int
    language: str
    note: str
    body: str

    @property
    def runs(self) -> bool:
        """Whether the page's script has it."""
        return not self.note or self.note == "on the device"


def list_pages() -> list[Path]:
    """Every page with commands for users: README, the documentation, the examples."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


def read_blocks(page: Path) -> list[Block]:
    """The blocks that are commands, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start("body")].count("\n") + 1, found["language"], found["note"] or "", found["body"])
        for found in BLOCK.finditer(text)
        if found["language"] in RUN
    ]


def write_script(blocks: list[Block], folder: Path) -> str:
    """One bash script that runs the blocks of a page in `folder` and names the block that fails.

    Args:
        folder: the checkout's stand-in; `device` in it is where device blocks run.
    """
    lines = ["set -euo pipefail", f"cd {folder}", "exec < /dev/null"]
    for block in blocks:
        if not block.runs:
            continue
        body = block.body
        if block.language == "python":
            file = folder / f".block-{block.line}.py"
            file.write_text(body, encoding="utf-8")
            body = f"python {file}\n"
        lines.append(f"echo '== {block.page.relative_to(ROOT)}, line {block.line}'")
        lines.append(f"(cd device\n{body})" if block.note else body)
    return "\n".join(lines) + "\n"
