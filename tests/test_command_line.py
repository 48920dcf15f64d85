"""How command lines are read: given twice, misspelled, piped in, by name of the hub; and python -m lime_edge."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from test_cli import Cli

from lime_edge import terminal
from lime_edge.bundle.bundle import Bundle
from lime_edge.cli.app import app
from lime_edge.cli.flags import FLAGS, translate

Make = Callable[..., Path]


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


@pytest.fixture
def bundle(tiny_bundle: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle(quant="int4"), tmp_path / "tiny.lime"))


def test_an_option_given_twice_is_refused(lime: Cli, tiny_adapter: Make, bundle: Path, tmp_path: Path) -> None:
    words = ("export", tmp_path, "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime", "--adapter", tmp_path)
    assert "--adapter takes one value, 2 were given hint: keep one of them" in lime.refuse(*words)
    assert "--expert takes one value" in lime.refuse("run", bundle, "x", "-e", "expert0", "--expert", "expert1")
    assert "--name takes one value" in lime.refuse("experts", "blend", bundle, "x", "--name", "a", "--name", "b")
    assert lime("run", bundle, "x", "--stop", "a", "--stop", "b", "--max-new-tokens", 2).code == 0


def test_what_was_meant_is_said(lime: Cli, bundle: Path) -> None:
    assert "lime-edge run has no option --exper hint: did you mean '--expert'" in lime.refuse("run", bundle, "--exper")
    assert "no such command 'inspekt'" in lime.refuse("inspekt") and "'inspect'" in lime.refuse("inspekt")
    assert "here it is called run: lime-edge run --help" in lime.refuse("chat", bundle)
    assert "unknown expert 'exprt1' hint: did you mean 'expert1'" in lime.refuse("run", bundle, "x", "-e", "exprt1")
    assert "missing argument 'BUNDLE' hint: lime-edge run --help" in lime.refuse("run")
    assert "unexpected extra argument" in lime.refuse("inspect", bundle, "more")
    assert "'--seed'" in lime.refuse("run", bundle, "--seed", "one")


def test_what_is_not_there_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, lime_edge.cli.app as app\n"
        "try: app.main()\n"
        "finally: print('torch was imported' if 'torch' in sys.modules else 'no torch')"
    )
    words = ["export", str(tmp_path / "none"), "--adapter", str(tmp_path / "nor"), "-o", "x.lime"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode != 0 and lines[0] == "error: export: 2 faults", done.stderr
    assert str(tmp_path / "none") in done.stderr and str(tmp_path / "nor") in done.stderr
    assert done.stdout == "no torch\n" and not (tmp_path / "x.lime").exists()


def test_a_table_fits_a_narrow_terminal(bundle: Path) -> None:
    fingerprint = json.loads((bundle / "lime.json").read_text())["backbone"]["fingerprint"]
    for columns, shown in (("80", fingerprint[:16] + " "), ("160", fingerprint)):
        words = [sys.executable, "-m", "lime_edge", "inspect", str(bundle)]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"COLUMNS": columns})
        row = next(line for line in done.stdout.splitlines() if "fingerprint" in line)
        assert shown in row, row


def test_help_is_not_an_error(lime: Cli) -> None:
    for words in ((), ("experts",)):
        done = lime(*words)
        assert "error" not in done.err and "Usage: lime-edge" in done.out + done.err


def test_a_name_on_the_hub_gets_the_command_to_download_it(lime: Cli, tiny_adapter: Make, tmp_path: Path) -> None:
    words = ("--adapter", tiny_adapter(), "-o", tmp_path / "x.lime")
    error = lime.refuse("export", "HuggingFaceTB/SmolLM2-135M", *words)
    assert "hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M" in error
    assert "hf download" not in lime.refuse("export", tmp_path / "none", *words)


def test_several_targets_behind_commas(lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    words = ("export", tiny_model(), "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime", "--quant", "int8")
    assert "found 'toaster'" in lime.refuse(*words, "--target", "onnx,toaster")
    assert lime(*words, "--target", "onnx, onnx", "--quiet").code == 0
    assert list(Bundle.open(tmp_path / "x.lime").manifest.targets) == ["onnx"]


def test_export_says_what_it_took_and_quiet_says_nothing(
    lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path
) -> None:
    words = ("export", tiny_model(), "--adapter", tiny_adapter(), "--quant", "int8")
    loud = lime(*words, "-o", tmp_path / "a.lime")
    assert re.search(r"^exported in \d+ s, [\d.]+ [MG]B of memory at the peak$", loud.out, re.M), loud.out
    facts = json.loads(lime(*words, "-o", tmp_path / "b.lime", "--json").out)["export"]
    assert 0 < facts["seconds"] < 600 and 50e6 < facts["peak_rss_bytes"] < 100e9
    quiet = lime(*words, "-o", tmp_path / "c.lime", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert loud.err and Bundle.open(tmp_path / "c.lime").total_bytes == Bundle.open(tmp_path / "a.lime").total_bytes
    assert lime("inspect", tmp_path / "c.lime").out, "quiet stays with the command that asked for it"


def test_bars_estimate_what_is_left() -> None:
    from rich.progress import TimeRemainingColumn

    with terminal._progress() as bars:
        assert any(isinstance(column, TimeRemainingColumn) for column in bars.columns)


def test_standard_input_stands_for_a_file(lime: Cli, bundle: Path, tmp_path: Path) -> None:
    line = json.dumps({"prompt": "say it", "answer": "it"})
    done = lime("eval", bundle, "--data", "-", "--json", text=line)
    assert json.loads(done.out)["count"] == 1 and json.loads(done.out)["data"] == "-", done.err
    empty = lime("eval", bundle, "--data", "-", text="")
    assert empty.code == 2 and "standard input (-) is empty" in empty.err
    shutil.copy(bundle / "experts" / "expert0.safetensors", tmp_path / "new.safetensors")
    with (tmp_path / "new.safetensors").open("rb") as piped:
        added = subprocess.run(
            [sys.executable, "-m", "lime_edge", "experts", "add", str(bundle), "-", "--name", "piped", "--json"],
            stdin=piped,
            capture_output=True,
            text=True,
        )
    assert json.loads(added.stdout)["added"] == ["piped"], added.stderr
    assert "piped" in Bundle.open(bundle, verify=True).manifest.experts


def test_everything_that_prints_facts_prints_json(lime: Cli, bundle: Path, tmp_path: Path) -> None:
    """Every command has --json, but `serve`, which answers over HTTP; the small ones print what they did."""
    group = typer.main.get_command(app)
    experts = group.commands["experts"].commands  # type: ignore[attr-defined]
    commands = {name: one for name, one in group.commands.items() if name not in ("experts", "serve")} | experts  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert "--json" in [option for parameter in command.params for option in parameter.opts], name
    one, two = Bundle.open(bundle).manifest.experts[:2]
    made = json.loads(lime("experts", "blend", bundle, f"{one}=0.5,{two}=0.5", "--name", "mix", "--json").out)
    gone = json.loads(lime("experts", "remove", bundle, "mix", "--json").out)
    assert made["added"] == gone["removed"] == ["mix"] and set(made["experts"]) - set(gone["experts"]) == {"mix"}


def test_python_m_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "lime_edge", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("lime-edge ")
    failed = subprocess.run([sys.executable, "-m", "lime_edge", "inspect", "no"], capture_output=True, text=True)
    assert failed.returncode == 2 and "no such bundle" in failed.stderr


def complete(line: str, cwd: Path) -> list[str]:
    """What bash is offered for a line whose last word is unfinished."""
    env = os.environ | {
        "_LIME_EDGE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from lime_edge.cli import main; main()"],
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd,
    )
    return done.stdout.split()


def test_the_shell_completes_commands_options_and_experts(bundle: Path) -> None:
    assert set(complete("lime-edge in", bundle.parent)) == {"inspect"}
    assert "--expert" in complete("lime-edge run tiny.lime --exp", bundle.parent)
    assert complete("lime-edge run tiny.lime --expert expert1", bundle.parent) == ["expert1"]
    assert "none" in complete("lime-edge run tiny.lime --expert n", bundle.parent)
    assert complete("lime-edge export m --target onnx,corem", bundle.parent) == ["onnx,coreml"]


def test_parameters_are_told_as_options() -> None:
    assert translate("`quant`: expected int4") == "--quant: expected int4"
    assert (
        translate('pass `force=True` or `fold="movie"`, `tokenizer=False`')
        == "pass --force or --fold movie, --no-tokenizer"
    )
    assert translate("`unheard_of` stays") == "`unheard_of` stays"
    group = typer.main.get_command(app)
    commands = [*group.commands.values(), *group.commands["experts"].commands.values()]  # type: ignore[attr-defined]
    known = {o for c in commands for p in getattr(c, "params", ()) for o in [*p.opts, *p.secondary_opts]}
    assert not set(FLAGS.values()) - known, "an option that no command has"


def test_what_a_newcomer_typed_is_refused_in_words(lime: Cli, bundle: Path, tmp_path: Path) -> None:
    name = Bundle.open(bundle).manifest.experts[0]
    assert "the prompt is empty" in lime.refuse("run", bundle, "", "--expert", name)
    assert "all stands alone" in lime.refuse("run", bundle, "x", "--expert", f"all,{name}")
    file = tmp_path / "README.md"
    file.write_text("text")
    assert "not a bundle: it is a file" in lime.refuse("inspect", file)
    assert "no such file" in lime.refuse("bench", bundle, "--hosts", tmp_path / "no.toml")


def test_output_that_nothing_fits_into_is_said(bundle: Path) -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "lime_edge", "experts", "list", str(bundle), "--json"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5 and done.stderr.startswith("error: standard output: No space left"), done.stderr


def test_a_reader_that_leaves_is_no_fault(bundle: Path) -> None:
    for words in (("experts", "list", str(bundle), "--json"), ("inspect", str(bundle))):
        command = [sys.executable, "-m", "lime_edge", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            told = process.stderr.read()
        assert process.returncode == 141 and not told, (words, told)


def test_ctrl_c_while_commands_are_imported_leaves_no_trace(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "class Break:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'lime_edge.cli.app': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Break())\n"
        "from lime_edge.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130 and not done.stderr, done.stderr


def test_what_failed_leaves_no_folder_behind(lime: Cli, tiny_adapter: Make, tmp_path: Path) -> None:
    empty = tmp_path / "model"
    empty.mkdir()
    lime.refuse("export", empty, "--adapter", tiny_adapter(), "-o", tmp_path / "no" / "such" / "x.lime")
    assert not (tmp_path / "no").exists()


def test_bytes_that_are_no_text_are_told_so(bundle: Path) -> None:
    words = [sys.executable, "-m", "lime_edge", "run", str(bundle), "-"]
    done = subprocess.run(words, input=b"\xff\xfe", capture_output=True)
    assert done.returncode == 2 and b"standard input (-) is no UTF-8" in done.stderr, done.stderr
