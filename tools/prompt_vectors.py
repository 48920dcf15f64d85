"""Write tests/vectors/prompts.json: conversations and what they become (docs/prompts.md), for every language's tests.

    python tools/prompt_vectors.py [--check]

The expected texts are the templates' own, as jinja2 renders them; the templates are those of tests/test_chat.py.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from chat_templates import NAMES, REDUCIBLE  # noqa: E402

from lime_edge.bundle.templates import render_all  # noqa: E402
from lime_edge.compiler.formats.chat import draw_conversation, list_pieces, reduce_text  # noqa: E402

FILE = ROOT / "tests" / "vectors" / "prompts.json"
COUNT = 12  # conversations a template


def make_vectors() -> list[dict[str, Any]]:
    """One entry a template: the reduced form as lime.json holds it, and conversations."""
    entries = []
    for name, template in REDUCIBLE.items():
        prompts, draw = reduce_text(template, NAMES), random.Random(1)
        pieces = [piece for piece in list_pieces(template, NAMES.values()) if len(piece) < 40]
        talks = [draw_conversation(draw, prompts, pieces, prompts.order == "any") for _ in range(COUNT)]
        cases = [
            {"turns": [[m["role"], m["content"]] for m in talk.messages], "open": talk.open, "text": rendered.text}
            for talk, rendered in zip(talks, render_all(template, NAMES, talks), strict=True)
        ]
        entries.append({"name": name, "prompts": msgspec.to_builtins(prompts), "cases": cases})
    return entries


def to_text() -> str:
    """One line a conversation."""
    blocks = []
    for entry in make_vectors():
        cases = ",\n".join(f"   {json.dumps(case)}" for case in entry["cases"])
        head = f'{json.dumps("name")}: {json.dumps(entry["name"])},\n  "prompts": {json.dumps(entry["prompts"])}'
        blocks.append(f' {{{head},\n  "cases": [\n{cases}\n  ]}}')
    return "[\n" + ",\n".join(blocks) + "\n]\n"


def main() -> None:
    """Write the file, or with --check compare it."""
    text = to_text()
    if "--check" in sys.argv[1:]:
        sys.exit(FILE.read_text(encoding="utf-8") != text)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
