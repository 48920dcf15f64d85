"""lime-edge run with several experts: one pass, a row of the table for each, the answers of single runs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import Cli

from lime_edge import terminal
from lime_edge.cli.skills import Pass, Skill, asks_for_many, draw_table, read_selections
from lime_edge.errors import LimeEdgeError

Make = Callable[..., Path]
TOKENS = ("--max-new-tokens", 9, "--threads", 1)


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Make) -> Path:
    return tiny_bundle()


def answer_alone(lime: Cli, bundle: Path, prompt: str, expert: str) -> dict:
    return json.loads(lime("run", bundle, prompt, "-e", expert, *TOKENS, "--json").out)


def test_every_answer_is_that_of_a_run_of_its_own(lime: Cli, bundle: Path) -> None:
    for asked, names in (
        ("all", [f"expert{number}" for number in range(4)]),
        ("expert2,none, expert0", ["expert2", "none", "expert0"]),
    ):
        done = lime("run", bundle, "hello", "-e", asked, *TOKENS, "--json")
        assert done.code == 0, done.err
        facts = json.loads(done.out)
        assert [answer["expert"] for answer in facts["answers"]] == names and facts["rows"] == len(names)
        for answer in facts["answers"]:
            alone = answer_alone(lime, bundle, "hello", answer["expert"])
            for key in ("answer", "tokens", "finish_reason"):
                assert answer[key] == alone[key], (answer["expert"], key)
        assert 0 < facts["prompts_s"] + facts["steps_s"] <= facts["seconds"] and facts["nbytes"] > 0
    assert len({answer["answer"] for answer in facts["answers"]}) > 1


def test_the_table_has_a_row_for_each_and_quiet_has_no_notes(lime: Cli, bundle: Path) -> None:
    done = lime("run", bundle, "-", "-e", "all", *TOKENS, text="hello\n")
    assert done.code == 0 and "input: hello" in done.out
    assert "4 skills" in done.err and "rows, caches of" in done.err and "tokens/s together" in done.err
    for number in range(4):
        (row,) = [line for line in done.out.splitlines() if f"expert{number}" in line]
        assert answer_alone(lime, bundle, "hello", f"expert{number}")["finish_reason"] in row
    quiet = lime("run", bundle, "hello", "-e", "all", *TOKENS, "--quiet")
    assert quiet.out.splitlines()[1:] == done.out.splitlines()[1:] and quiet.err == ""
    terminal.be_quiet(False)


def test_the_table_fills_at_a_terminal(lime: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, height=40, highlight=False)
    monkeypatch.setattr(terminal, "out", screen)
    monkeypatch.setattr("lime_edge.cli.skills.PER_SECOND", 1e9)
    assert lime("run", bundle, "hello", "-e", "all", *TOKENS).code == 0
    pictures = screen.file.getvalue().split("input: hello")  # type: ignore[attr-defined]
    assert len(pictures) > 8, "one for every step"
    assert "..." in pictures[1] and "..." not in pictures[-1] and "length" in pictures[-1]


def test_markup_in_answers_is_text() -> None:
    table = draw_table("[bold]x", Pass([Skill("a", text="[red]y[/red] [/]", tokens=1)]))
    screen = Console(file=io.StringIO(), width=80)
    screen.print(table)
    printed = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]x" in printed and "[red]y[/red] [/]" in printed


def test_an_engine_of_one_sequence_answers_one_after_another(
    lime: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", bundle, "hello", "-e", "all", *TOKENS, "--stop", "x", "--json")
    together = json.loads(lime(*words).out)
    monkeypatch.delattr("lime_edge.runtimes.onnx.decoder.OnnxEngine.open_rows")
    done = lime(*words)
    assert "one after another" in done.err
    for one, other in zip(json.loads(done.out)["answers"], together["answers"], strict=True):
        assert {**one, "first_token_ms": 0} == {**other, "first_token_ms": 0}


def test_what_is_wrong_is_refused(lime: Cli, bundle: Path) -> None:
    assert "answers one prompt" in lime.refuse("run", bundle, "-e", "all")
    assert "unknown expert 'exprt1'" in lime.refuse("run", bundle, "x", "-e", "expert0,exprt1")
    for wrong in ("expert0,", "expert0,expert0"):
        assert "a name is missing or there twice" in lime.refuse("run", bundle, "x", "-e", wrong)
    assert "has no routed graph" in lime.refuse("run", bundle, "x", "-e", "expert0,routed")
    long = lime.refuse("run", bundle, "x " * 40, "-e", "all", "--max-length", 16)
    assert "a cache holds 16 tokens" in long


def test_names_that_look_like_lists() -> None:
    assert asks_for_many("all", ["a"]) and asks_for_many("a,b", ["a", "b"])
    assert not asks_for_many("all", ["all"]) and not asks_for_many("a=0.5,b=0.5", ["a"])
    assert not asks_for_many(None, []) and not asks_for_many("a", ["a"])
    assert read_selections("a,none,routed", ["a"]) == ["a", None, "routed"]
    with pytest.raises(LimeEdgeError):
        read_selections("a,,b", [])


def test_interrupted(lime: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupt(rows: object, *words: object) -> object:
        calls.append(words)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return step(rows, *words)  # type: ignore[arg-type]

    from lime_edge.runtimes.onnx.rows import OnnxRows

    step = OnnxRows.step
    monkeypatch.setattr(OnnxRows, "step", interrupt)
    facts = json.loads(lime("run", bundle, "hello", "-e", "all", *TOKENS, "--json").out)
    assert {answer["finish_reason"] for answer in facts["answers"]} <= {"interrupted", "stop"}
    assert any(answer["tokens"] for answer in facts["answers"])
