"""docs/architecture.md names every room, and files and functions that exist."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()
STEPS = re.findall(r"^\|[^|]*\| `([\w/]+\.\w+)` \| (?:`(\w+)`)? ?\|$", TEXT, re.M)
ROOMS = set(re.findall(r"^\| `([\w/]+)/` \|", TEXT, re.M))


def find(path: str) -> Path:
    """A file that the page names, from the root or from lime_edge/."""
    return next(file for file in (ROOT / path, ROOT / "lime_edge" / path) if file.is_file())


def names_in(file: Path) -> set[str]:
    """Functions and classes of a file, inner ones too."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_both_journeys_are_there() -> None:
    assert len(STEPS) >= 40


@pytest.mark.parametrize(("path", "name"), STEPS, ids="{}".format)
def test_a_step_is_where_it_says(path: str, name: str) -> None:
    assert not name or name in names_in(find(path)), f"{path} has no {name}"


def test_every_file_that_is_named_exists() -> None:
    for path in re.findall(r"`([\w/]+\.(?:py|c))`", TEXT):
        assert "/" not in path or find(path), path


def test_every_room_is_named() -> None:
    """Packages, and folders beside them that hold files of their own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in project["tool"]["setuptools"]["packages"]:
        path = package.replace(".", "/")
        path = re.sub(r"^lime_edge/(exporters|runtimes)", r"\1", path)
        assert path in ROOMS, f"docs/architecture.md leaves out {path}/"
    for folder in ROOMS:
        assert (ROOT / folder).is_dir(), folder
    beside = {f"runtimes/{path.name}" for path in (ROOT / "runtimes").iterdir() if path.is_dir()}
    assert {path for path in beside if "__" not in path} <= ROOMS
