"""The demo on a tiny model: one section per input, every expert in it, sizes at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import Cli
from test_vectors import make_folder

from lime_edge.bundle.bundle import Bundle

Make = Callable[..., Path]
INPUTS = {"expert0": "word", "expert1": "word", "expert2": "1999", "expert3": "1999", "later": "word"}


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


@pytest.fixture
def examples(tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path) -> Path:
    root = tmp_path / "examples"
    shutil.copytree(tiny_adapter(), root / "adapter")
    make_folder(tiny_adapter(), root / "new_expert", Bundle.open(tiny_bundle(None, tiny_adapter())))
    for name, text in INPUTS.items():
        folder = root / ("new_expert" if name == "later" else "") / "eval"
        folder.mkdir(exist_ok=True)
        line = {"prompt": f"<|im_start|>user\n{text}<|im_end|>\n", "answer": name}
        (folder / f"{name}.jsonl").write_text(json.dumps(line))
    return root


def test_demo_switches_on_the_same_input(lime: Cli, examples: Path, tiny_model: Make, tmp_path: Path) -> None:
    words = ("demo", "--model", tiny_model(), "--examples", examples, "-o", tmp_path / "demo.lime", "--threads", 1)
    done = lime(*words, "--quant", "none", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    rows = {row["expert"]: row for row in facts["rows"]}
    assert list(rows) == list(INPUTS) and rows["later"]["delivered"] and not rows["expert0"]["delivered"]
    bundle = Bundle.open(tmp_path / "demo.lime")
    assert facts["total_bytes"] == bundle.total_bytes and list(facts["expert_bytes"]) == list(bundle.manifest.experts)
    together = facts["together"]
    assert together["skills"] == len(INPUTS) and together["prompt"] == rows["expert0"]["prompt"]
    assert together["tokens_per_s"] > 0 and together["alone_tokens_per_s"] > 0
    assert facts["delivered"][0]["expert"] == "later" and "later" not in facts["expert_bytes"]
    for row in rows.values():
        assert row["tokens_per_s"] > 0 and row["switch_us"] > 0 and row["expected"] == row["expert"]
        said = lime("run", bundle.path, row["prompt"], "--raw", "-e", row["expert"], "--max-new-tokens", 16)
        if row["expert"] != "later":
            assert said.out.strip() == row["answer"], row["expert"]
    assert len({rows[name]["answer"] for name in ("expert0", "expert1", "later")}) == 3  # same input, own answers


def test_demo_ends_with_the_table(lime: Cli, examples: Path, tiny_model: Make, tmp_path: Path) -> None:
    words = ("demo", "--model", tiny_model(), "--examples", examples, "-o", tmp_path / "demo.lime")
    done = lime(*words, "--quant", "int8")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert "bundle" in lines[-1] and "in all, 4 experts of" in lines[-1]
    heads = [i for i, line in enumerate(lines) if line.startswith("input: ")]
    assert [lines[i].strip() for i in heads] == ["input: word", "input: 1999"]
    for column in ("expert", "answer", "tokens/s", "first switch"):
        assert column in lines[heads[0] + 2]
    first = "\n".join(lines[heads[0] : heads[1]])
    assert "expert0" in first and "expert1" in first and "later +" in first and "expert2" not in first
    assert "all 5 skills at 'word' in one pass" in done.out and '"word" --expert all' in done.out
    assert "experts add" in done.out and "installed into the running session" in done.out


def test_demo_without_examples_is_refused(lime: Cli, tmp_path: Path) -> None:
    assert "no such folder" in lime.refuse("demo", "--examples", tmp_path / "none")
