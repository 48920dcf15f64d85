"""From a folder of JSONL to a skill in a bundle: what the tutorial promises, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from test_cli import Cli

Make = Callable[..., Path]
TRAIN = Path(__file__).parent.parent / "examples" / "demo_adapter" / "train.py"
ANSWERS = {"agree": "yes", "refuse": "no", "later": "maybe"}


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


def train(*words: object) -> subprocess.CompletedProcess[str]:
    """Run train.py; a lemminflect that cannot be imported proves that own tasks do not need it."""
    code = "import sys, runpy; sys.modules['lemminflect'] = None; sys.argv = sys.argv[1:]; "
    code += f"sys.path.insert(0, {str(TRAIN.parent)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(TRAIN), *map(str, words), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def write_task(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": f"shall we {number}?", "answer": ANSWERS[name]}) for number in range(60)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("activation", ["always", "generation-prompt"])
def test_own_tasks_become_experts_and_a_later_one_is_added(
    activation: str, lime: Cli, tiny_model: Make, tmp_path: Path
) -> None:
    model, data, bundle = tiny_model(), tmp_path / "tasks", tmp_path / "own.lime"
    for name in ("agree", "refuse"):
        write_task(data, name)
    plan = ("--base", model, "--steps", 60, "--adapter-rate", 1e-2)
    done = train("--data", data, "--out", tmp_path / "adapter", *plan, "--activation", activation)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["expert_names"] == ["agree", "refuse"] and config["base_model_name_or_path"] == model.name
    words = ("export", model, "--adapter", tmp_path / "adapter", "-o", bundle, "--quant", "none", "--quiet")
    assert lime(*words).code == 0
    acts = {"kind": "generation_prompt", "tokens": 10, "text": "<|im_start|>assistant\n"}
    assert config.get("activation") == (None if activation == "always" else acts)
    for name, other in (("agree", "refuse"), ("refuse", "agree")):
        tests = tmp_path / "adapter" / "eval" / f"{name}.jsonl"
        held = {json.loads(line)["prompt"] for line in tests.read_text().splitlines()}
        assert 2 <= len(held) <= 20 and all("<|im_start|>user\nshall we" in prompt for prompt in held)
        for expert, accuracy in ((name, 1.0), (other, 0.0)):
            facts = json.loads(lime("eval", bundle, "--expert", expert, "--data", tests, "--json", "--quiet").out)
            assert facts["accuracy"] == accuracy, (expert, name, done.stdout)

    write_task(tmp_path / "more", "later")
    later = ("--data", tmp_path / "more", "--new-expert", "later", "--adapter", tmp_path / "adapter")
    done = train(*later, "--out", tmp_path / "new", *plan, "--vector-rate", 5e-2)
    assert done.returncode == 0, done.stderr
    assert all(name.endswith(".LiMEs") for name in load_file(tmp_path / "new" / "adapter_model.safetensors"))
    assert lime("experts", "add", bundle, tmp_path / "new").code == 0
    tests = tmp_path / "new" / "eval" / "later.jsonl"
    facts = json.loads(lime("eval", bundle, "--expert", "later", "--data", tests, "--json", "--quiet").out)
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == ["later"]]
    assert float(line.split()[2]) == pytest.approx(facts["accuracy"], abs=1e-3), done.stdout


def test_bad_folders_are_refused_with_every_fault(tiny_model: Make, tmp_path: Path) -> None:
    data = tmp_path / "tasks"
    write_task(data, "agree")
    (data / "no good.jsonl").write_text('{"prompt": "a"}\nnot json\n{"prompt": "", "answer": "x"}\n')
    (data / "few.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    done = train("--data", data, "--out", tmp_path / "out", "--base", tiny_model())
    assert done.returncode != 0 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    for text in ("5 faults", "few.jsonl: 1 examples", "no good.jsonl, line 1", "line 2", "line 3", "expert's name"):
        assert text in done.stderr, text
    done = train("--data", tmp_path / "none", "--out", tmp_path / "out", "--base", tiny_model())
    assert "no TASK.jsonl in it" in done.stderr
    assert "--data needs --out" in train("--data", data, "--base", tiny_model()).stderr


def test_a_plan_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "agree")
    for words, told in ((("--steps", -1), "1 or more"), (("--base", tmp_path / "none"), "no such folder or file")):
        done = train("--data", tmp_path / "tasks", "--out", tmp_path / "out", *words)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
