"""Writes the Swift library's copy of docs/bundle.schema.json: one string, so that no app has to find a resource.

python tools/swift_schema.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FILE = ROOT / "runtimes" / "swift" / "Sources" / "LimeEdge" / "BundleSchema.swift"
FOR_PEOPLE = ("title", "description")


def render() -> str:
    """The file's text: the schema without what is for people, a definition a line."""
    schema = json.loads((ROOT / "docs" / "bundle.schema.json").read_text(encoding="utf-8"))
    lines = [f"{json.dumps(name)}: {json.dumps(prune(rule))}" for name, rule in schema.pop("$defs").items()]
    head = json.dumps(prune(schema))[:-1]
    body = head + ', "$defs": {\n' + ",\n".join(lines) + "\n}}"
    assert json.loads(body)["$ref"] == schema["$ref"]
    return f'/// docs/bundle.schema.json; written by tools/swift_schema.py.\nlet bundleSchema = #"""\n{body}\n"""#\n'


def prune(rule: Any) -> Any:
    """A rule without its titles and descriptions; properties of these names stay."""
    if not isinstance(rule, dict):
        return [prune(one) for one in rule] if isinstance(rule, list) else rule
    kept = {name: value for name, value in rule.items() if name not in FOR_PEOPLE or not isinstance(value, str)}
    return {
        name: {key: prune(one) for key, one in value.items()} if name == "properties" else prune(value)
        for name, value in kept.items()
        if name != "default"
    } | ({"default": rule["default"]} if "default" in rule else {})


def main() -> None:
    """Write the file, or with --check compare it."""
    if "--check" in sys.argv[1:]:
        sys.exit(FILE.read_text(encoding="utf-8") != render())
    FILE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
