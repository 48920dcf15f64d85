"""The process in which a chat template runs: it came with a model, and what it does to time and memory nobody knows.

Run as a program by `lime_edge.bundle.templates`, which ends it when it takes too long. Standard input is one JSON
object: `template`, `names`, `date` (ISO, or null for today's), `conversations`: [{"messages", "open"}]. Standard output
is a JSON list with {"text"} or {"error"} for each. Imports nothing of lime_edge, so that it starts fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of address space; where the platform knows no such limit, time alone ends a template
LONGEST = 1 << 22  # characters of a conversation


class Generation(Extension):
    """`{% generation %}`: marks what the assistant said, for training; here it is plain text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's own content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def compile_template(text: str, date: str | None) -> jinja2.Template:
    """Compile as `transformers` does, so that templates written for it mean the same here."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    now = datetime.now() if date is None else datetime.fromisoformat(date)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: now.strftime(layout)
    return environment.from_string(text)


def attempt(work: Callable[[], Any]) -> dict[str, Any]:
    """{"text": what it gives}, or {"error": what it raises}: a template may raise anything."""
    try:
        text = work()
        return {"text": text} if len(text) <= LONGEST else {"error": f"its text has {len(text)} characters"}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 30} GB of memory"}
    except jinja2.TemplateError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def render(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What each conversation becomes."""
    compiled: list[jinja2.Template] = []

    def prepare() -> str:
        compiled.append(compile_template(request["template"], request["date"]))
        return ""

    if fault := attempt(prepare).get("error"):
        return [{"error": fault}] * len(request["conversations"])
    names = request["names"]

    def write(one: dict[str, Any]) -> str:
        return compiled[0].render(messages=one["messages"], add_generation_prompt=one["open"], **names)

    return [attempt(partial(write, one)) for one in request["conversations"]]


def main() -> None:
    """Limit memory, read, render, write."""
    with suppress(ImportError, ValueError, OSError):  # Windows knows none, macOS refuses some
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    found = render(json.loads(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(json.dumps(found).encode("ascii"))


if __name__ == "__main__":
    main()
