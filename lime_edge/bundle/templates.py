"""Chat templates, rendered at arm's length: in a process of their own that is ended when it takes too long."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lime_edge.bundle import render

START, EACH = 10.0, 0.02  # seconds for everything, and more for each conversation
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages ({"role", "content"} each), and whether the assistant's turn is to be opened after them."""

    messages: Sequence[Message]
    open: bool = True


@dataclass(frozen=True)
class Rendered:
    """The text, or why there is none."""

    text: str = ""
    error: str = ""


def render_all(
    template: str, names: Mapping[str, str], conversations: Sequence[Conversation], date: str | None = None
) -> list[Rendered]:
    """Each conversation as a template writes it.

    Args:
        names: of special tokens, which templates use as variables. date: what the template takes for today, ISO.
    Returns:
        One for each conversation. A template that hangs, takes too much memory or ends its process has none.
    """
    asked = [{"messages": list(one.messages), "open": one.open} for one in conversations]
    try:
        request = json.dumps({"template": template, "names": dict(names), "date": date, "conversations": asked})
    except (TypeError, ValueError, RecursionError) as error:
        return [Rendered(error=f"messages are no plain data: {error}")] * len(asked)
    limit = START + EACH * len(asked)
    command = [sys.executable, "-P", str(Path(render.__file__))]
    try:
        done = subprocess.run(command, input=request.encode(), capture_output=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return [Rendered(error=f"it did not end within {limit:.0f} seconds")] * len(asked)
    except OSError as error:
        return [Rendered(error=f"no process to run it in: {error}")] * len(asked)
    try:
        return [Rendered(one.get("text", ""), plain(one.get("error", ""))) for one in json.loads(done.stdout)]
    except ValueError:
        last = next(iter(reversed(done.stderr.decode(errors="replace").splitlines())), "")
        return [Rendered(error=plain(f"its process ended with code {done.returncode} {last}"))] * len(asked)


def plain(error: str) -> str:
    """One line of what a template says, which may be anything."""
    return "".join(letter if letter.isprintable() else " " for letter in error).strip()[:300]
