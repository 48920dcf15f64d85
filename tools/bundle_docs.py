"""Writes docs/bundle.schema.json and the tables of lime.json in docs/bundle-format.md, from the manifest's types."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec

from lime_edge.bundle.fields import Manifest

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- fields: made by tools/bundle_docs.py -->", "<!-- end of fields -->"


def make_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of lime.json."""
    schema = msgspec.json.schema(Manifest)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lime.json, schema 2"} | schema


def render_schema() -> str:
    """docs/bundle.schema.json."""
    return json.dumps(make_schema(), indent=1) + "\n"


def render_tables() -> str:
    """A table per part of the manifest, the whole first."""
    parts = make_schema()["$defs"]
    order = ["Manifest", *(name for name in parts if name != "Manifest")]
    return "\n".join(_render_part(name, parts[name]) for name in order)


def _render_part(name: str, part: dict[str, Any]) -> str:
    lines = [
        f"#### {name}",
        "",
        *inspect.cleandoc(part["description"]).split("\n"),
        "",
        "| field | type | meaning |",
        "|---|---|---|",
    ]
    required = part.get("required", [])
    for field, facts in part["properties"].items():
        default = "" if field in required else f"; default `{json.dumps(facts.get('default'))}`"
        lines.append(f"| `{field}` | {_render_type(facts)}{default} | {facts.get('description', '')} |")
    return "\n".join(lines) + "\n"


def _render_type(facts: dict[str, Any]) -> str:
    if "$ref" in facts:
        name = facts["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in facts:
        return " or ".join(_render_type(one) for one in facts["anyOf"])
    if "enum" in facts:
        return " or ".join(f"`{json.dumps(value)}`" for value in facts["enum"])
    kind = str(facts.get("type", "anything"))
    if kind == "array":
        return f"list of {_render_type(facts['items'])}{_render_range(facts, 'Items', ' of them')}"
    if kind == "object":
        inner = facts.get("additionalProperties")
        return f"object of {_render_type(inner)}" if isinstance(inner, dict) and inner else "object"
    if kind == "string":
        return f"string{_render_range(facts, 'Length', ' characters')}" if "maxLength" in facts else "string"
    return f"{kind}{_render_range(facts, 'imum', '')}"


def _render_range(facts: dict[str, Any], suffix: str, unit: str) -> str:
    low, high = facts.get(f"min{suffix}"), facts.get(f"max{suffix}")
    if low is None and high is None:
        return ""
    if high is None:
        return f" (at least {low:,}{unit})"
    return f" (at most {high:,}{unit})" if not low else f" ({low:,} to {high:,}{unit})"


def fill_tables(page: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{render_tables()}\n{END}{after}"


if __name__ == "__main__":
    (DOCS / "bundle.schema.json").write_text(render_schema(), encoding="utf-8")
    page = DOCS / "bundle-format.md"
    page.write_text(fill_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
