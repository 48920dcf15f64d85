"""The site builds without a warning; its pictures are what their scripts draw; its numbers the measured ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
import typer
from doc_pages import list_pages

from lime_edge.cli.app import app

Make = Callable[..., Path]
ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def tools() -> ModuleType:
    """tools/ on the path, as its scripts have it."""
    sys.path.insert(0, str(ROOT / "tools"))
    import pictures

    return pictures


# the site


class Page(HTMLParser):
    """What a page refers to, and the anchors it has."""

    def __init__(self, text: str):
        super().__init__()
        self.references: list[str] = []
        self.anchors: set[str] = set()
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if anchor := given.get("id") or given.get("name"):
            self.anchors.add(anchor)
        for name in ("src", "href"):
            if (value := given.get(name)) and (tag != "link" or given.get("rel") in ("stylesheet", "icon")):
                self.references.append(value)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.check
def test_the_site_builds_without_a_warning_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {file: Page(file.read_text()) for file in tmp_path.rglob("*.html")}
    names = {str(file.relative_to(tmp_path)) for file in pages}
    assert {"index.html", "tutorial.html", "devices/raspberry_pi.html", "comparison.html"} <= names
    for file, page in pages.items():
        if file.name == "404.html":
            continue
        for reference in page.references:
            parts = urlsplit(reference)
            if parts.scheme in ("http", "https", "mailto", "data", "javascript"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            where = f"{file.relative_to(tmp_path)}: {reference}"
            assert target.exists() or target.with_suffix(".html").exists(), where
            if parts.fragment and target in pages:
                assert parts.fragment in pages[target].anchors, where
    for file in pages:
        for mark in ("not run:", "run by: tests", "on the device -->"):
            assert mark not in " ".join(pages[file].text), f"{file.name}: a note for the tests is shown to readers"


def test_every_page_is_in_the_navigation_or_comes_last() -> None:
    """What a hook adds has a source, and what mkdocs.yml lists exists."""
    listed = set(re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    source = (ROOT / "tools" / "site_pages.py").read_text()
    brought = dict(re.findall(r'"(devices/[\w.-]+)": "([\w/.-]+)"', source))
    assert all((ROOT / file).is_file() for file in brought.values())
    for page in listed:
        assert page in brought or (ROOT / "docs" / page).is_file(), page
    assert {page for page in brought if page.endswith(".md")} <= listed


# the words

SPAN = re.compile(r"`([^`\n]+)`")
FOREIGN = {
    "--version",
    "--help",
    "--install-completion",
    "--use_cuda",
    "--loudness",
}  # of no command, or of another program


def read_prose() -> dict[str, str]:
    """Every page for users without its blocks of code."""
    return {
        str(page.relative_to(ROOT)): re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for page in list_pages()
    }


def list_commands() -> dict[str, set[str]]:
    """ "run" and "experts add" -> their options."""
    group: Any = typer.main.get_command(app)
    found = {}
    for name, one in group.commands.items():
        inner = {f"{name} {sub}": command for sub, command in getattr(one, "commands", {}).items()}
        for words, command in ({name: one} | inner).items():
            found[words] = {
                flag for parameter in command.params for flag in [*parameter.opts, *parameter.secondary_opts]
            }
    return found


def test_sentences_name_commands_and_options_that_exist() -> None:
    commands = list_commands()
    scripts = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    theirs = {flag for script in scripts for flag in re.findall(r'"(--[a-z-]+)"', script.read_text())}
    own = set().union(*commands.values())
    for page, text in read_prose().items():
        for span in SPAN.findall(text):
            options = re.findall(r"(?<!\S)--[a-z][\w-]*", span)
            if span.startswith("lime-edge "):
                words = [word for word in span.split()[1:] if not word.startswith("-")]
                name = " ".join(words[:2]) if " ".join(words[:2]) in commands else " ".join(words[:1])
                assert not words or words[0].isupper() or "|" in span or name in commands, f"{page}: {span}"
                assert set(options) <= commands.get(name, own) | FOREIGN, f"{page}: {span}"
            elif span.startswith("--"):
                assert set(options) <= own | theirs | FOREIGN, f"{page}: {span}"


def test_sentences_name_targets_of_make_that_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page, text in read_prose().items():
        for target in re.findall(r"`make ([a-z0-9-]+)`", text):
            assert target in targets, f"{page}: make {target}"


def test_readme_names_what_is_installed() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["onnx"]]
    names = ", ".join(re.match(r"[\w-]+", line)[0] for line in lines)  # type: ignore[index]
    assert f"with `[onnx]`: {names};" in readme


# the pictures


def test_the_drawings_are_what_their_script_draws(tools: ModuleType, tmp_path: Path) -> None:
    folder = ROOT / "docs" / "pictures"
    assert (folder / "fold.svg").read_text() == tools.draw_fold(), "run tools/pictures.py"
    texts = [node.text or "" for node in ElementTree.fromstring(tools.draw_fold()).iter(f"{SVG}text")]
    assert any(text.startswith("y = W x + p") for text in texts) and any("W' x + d" in text for text in texts)
    tools.draw_skills(tmp_path / "skills.svg")
    for file in (folder / "skills.svg", tmp_path / "skills.svg"):
        said = " ".join(node.text or "" for node in ElementTree.parse(file).iter(f"{SVG}text"))
        for size in ("107", "1,567", "9,060", "3,190"):
            assert size in said, f"{file.name}: {size}"


def test_the_comparisons_tables_are_the_measured_ones(tools: ModuleType) -> None:
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert page == tools.write_tables(page), "run tools/pictures.py"
    assert page.count("<!-- table: ") == 2 and "| LiME experts, rank 8 | 100 | 107 MB |" in page
    decoded = {
        run["threads"]: run["rows"]
        for run in json.loads(tools.MEASURED.read_text())["decode"]
        if run["model"] == "smollm2"
    }

    def ratios(own: str, base: str) -> list[float]:
        return [decoded[n][own]["decode_ms"] / decoded[n][base]["decode_ms"] for n in (1, 2)]

    for own, base, text in (
        ("ours-pinned", "ours-merged", "takes {:.2f} (1 thread) to {:.2f} times (2 threads)"),
        ("llama-lora", "llama", "{:.2f} to {:.2f} in llama.cpp"),
        ("genai-lora", "genai", "{:.2f} to {:.2f} in ONNX Runtime GenAI"),
    ):
        assert text.format(*ratios(own, base)) in " ".join(page.split()), (own, ratios(own, base))


def test_a_recording_holds_what_was_typed_and_answered(tools: ModuleType, tiny_bundle: Make) -> None:
    import record_demo

    steps = (
        ("lime-edge run build/demo.lime hi --raw --max-new-tokens 4 --threads 1", record_demo.PROMPT),
        ("lime-edge run build/demo.lime --max-new-tokens 4 --threads 1", "] > "),
        ("hi", "] > "),
        ("/expert expert1", "] > "),
        ("/quit", record_demo.PROMPT),
    )
    events = record_demo.record(tiny_bundle(quant="int4"), steps)
    said = "".join(text for _, text in events)
    for typed, _ in steps:
        assert typed.split()[0] in said
    assert "[expert0] > hi" in said and "now expert1" in said and "\x1b" not in said and "Traceback" not in said
    times = [when for when, _ in events]
    assert times == sorted(times)
    head, *lines = [json.loads(line) for line in record_demo.write_cast(events, 30).splitlines()]
    assert head["version"] == 2 and "".join(line[2] for line in lines) == said
    drawing = ElementTree.fromstring(record_demo.draw(events))
    shown = " ".join(node.text or "" for node in drawing.iter(f"{SVG}text"))
    assert "expert1" in shown and "using" in shown


def test_the_shipped_recording_is_of_the_demo() -> None:
    """What stands on the first page: every expert that is asked answers, and nothing failed."""
    text = (ROOT / "docs" / "pictures" / "demo.cast").read_text()
    said = "".join(json.loads(line)[2] for line in text.splitlines()[1:])
    for answer in ("patents", "patented", "patenting", "Does that queen see my kettle", "1982-04-12"):
        assert answer in said, answer
    assert "error" not in said and "Traceback" not in said
    ElementTree.parse(ROOT / "docs" / "pictures" / "demo.svg")
