"""docs/add-a-target.md, done: its blocks make a target in a copy of the package, and the command line works with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_arrows import ROOT, copy_package, lint

Make = Callable[..., Path]
PAGE = (ROOT / "docs" / "add-a-target.md").read_text()
BLOCKS = re.findall(r"<!-- not run: [^\n]*; file: (\S+) -->\n```python\n(.*?)```", PAGE, re.S)
ENTRY = "lime_edge/targets/entries.py"
ASK = """
import sys, lime_edge
session = lime_edge.open_decoder(sys.argv[1], target="echo")
session.use(session.experts[1])
print(session.logits([5, 7, 9]).argmax(-1), session.logits([5]).max())
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lime_edge as it is installed, and the echo in it: nothing that was there changes but the entry."""
    folder = tmp_path_factory.mktemp("house")
    copy_package(folder)
    for name, text in BLOCKS:
        file = folder / (name if name.startswith("lime_edge/") else f"lime_edge/{name}")
        if name == ENTRY:
            file.write_text(file.read_text().replace("\nDEFAULT = ", f"\n{text}\nDEFAULT = "))
        else:
            assert not file.exists(), f"{name} is there already"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
    return folder


def run(house: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`lime-edge` of that folder."""
    code = f"import sys, lime_edge; assert lime_edge.__file__.startswith({str(house)!r}), lime_edge.__file__; "
    code += "from lime_edge.cli.app import main; sys.exit(main())"
    paths = os.pathsep.join([str(house), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, cwd=house)


def test_a_target_is_two_folders_and_an_entry() -> None:
    files = [name for name, _ in BLOCKS]
    assert ENTRY in files and files.count(ENTRY) == 1 and len(files) == 8
    assert {Path(name).parent.as_posix() for name in files if name != ENTRY} == {"exporters/echo", "runtimes/echo"}


def test_its_arrows_point_down(house: Path) -> None:
    done = lint(house)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_line_has_its_option(house: Path) -> None:
    done = run(house, "export", "--help")
    assert "--loudness" in done.stdout and "Echo: the logit" in " ".join(done.stdout.split()), done.stdout
    assert "echo" in run(house, "doctor", "--json").stdout


def test_it_is_exported_opened_run_and_caught(
    house: Path, tiny_model: Make, tiny_adapter: Make, tmp_path: Path
) -> None:
    """A bundle for two targets; the session answers with the echo; verify says that PyTorch answers otherwise."""
    model, bundle = tiny_model(), tmp_path / "toy.lime"
    words = ["export", model, "--adapter", tiny_adapter(model), "-o", bundle, "--quant", "none", "--quiet"]
    done = run(house, *words, "--target", "onnx", "--loudness", 3)
    assert done.returncode == 2 and "--loudness: only --target echo reads it" in done.stderr, done.stderr
    done = run(house, *words, "--target", "onnx,echo", "--loudness", -1)
    assert done.returncode == 2 and "--loudness: expected more than 0, found -1.0" in done.stderr, done.stderr
    assert not bundle.exists()
    done = run(house, *words, "--target", "onnx,echo", "--loudness", 3)
    assert done.returncode == 0, done.stderr
    facts = json.loads((bundle / "lime.json").read_text())["targets"]
    assert [one["target"] for one in facts] == ["onnx", "echo"]
    assert facts[1]["report"] == {"joke": "the weights are left out"} and facts[1]["providers"] == ["echo"]
    assert "echo" in run(house, "inspect", bundle).stdout
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(bundle)],
        env=os.environ | {"PYTHONPATH": str(house)},
        capture_output=True,
        text=True,
        cwd=house,
    )
    assert done.stdout.split() == ["[5", "7", "9]", "3.0"], done.stdout + done.stderr
    done = run(house, "run", bundle, "hello", "--target", "echo", "--max-new-tokens", 4, "--raw", "--json")
    assert done.returncode == 0, done.stderr
    done = run(house, "verify", bundle, "--target", "echo")
    assert done.returncode == 3 and "checks missed" in done.stderr, done.stdout + done.stderr
    assert run(house, "verify", bundle, "--target", "onnx").returncode == 0


def test_without_it_the_bundle_is_refused(house: Path, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    """A device whose lime_edge knows no echo says so, in words."""
    import lime_edge
    from lime_edge.errors import LimeEdgeError

    model, bundle = tiny_model(), tmp_path / "toy.lime"
    words = ["export", model, "--adapter", tiny_adapter(model), "-o", bundle, "--quant", "none", "--target", "echo"]
    done = run(house, *words)
    assert done.returncode == 0, done.stderr
    with pytest.raises(LimeEdgeError, match="echo"):
        lime_edge.open_decoder(bundle)
