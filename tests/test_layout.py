"""The house: what is packaged, what is loaded when, and docs that say what the code says (arrows: test_arrows.py)."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from lime_edge.cli.app import app
from lime_edge.compiler.formats.families import FAMILIES
from lime_edge.targets.entries import TARGETS

ROOT = Path(__file__).parent.parent
FOLDERS = {"lime_edge": "lime_edge", "exporters": "lime_edge.exporters", "runtimes": "lime_edge.runtimes"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = 12  # entries of lime_edge/ beside __init__.py and py.typed: more would be a heap again


def modules() -> dict[str, Path]:
    """Module name -> file, for every module of the package."""
    found = {}
    for folder, name in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = [name, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


def test_every_package_is_listed() -> None:
    folders = {file.parent for file in modules().values() if file.name == "__init__.py"}
    names = set()
    for folder in folders:
        top, *rest = folder.relative_to(ROOT).parts
        names.add(".".join([FOLDERS[top], *rest]))
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_target_has_both_files() -> None:
    for target in TARGETS.values():
        for file in ("exporters/{}/entry.py", "runtimes/{}/entry.py", "runtimes/{}/health.py"):
            assert (ROOT / file.format(target.folder)).is_file()


def test_the_package_is_a_house_of_few_rooms() -> None:
    names = {path.name for path in (ROOT / "lime_edge").iterdir()} - {"__init__.py", "py.typed", "__pycache__"}
    assert len(names) <= ROOMS, sorted(names)


def test_no_code_asks_for_a_familys_name() -> None:
    """Exporters and oracle read a family's facts (families.py), so that another family is one function."""
    for name, file in modules().items():
        compared = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Compare)]
        words = {inner.value for node in compared for inner in ast.walk(node) if isinstance(inner, ast.Constant)}
        assert not words & set(FAMILIES), f"{name} compares with {words & set(FAMILIES)}"


def test_files_hold_one_idea() -> None:
    for file in modules().values():
        lines = len(file.read_text().splitlines())
        assert lines <= 440, f"{file.relative_to(ROOT)} has {lines} lines"


def test_public_functions_say_what_they_do() -> None:
    for name, file in modules().items():
        tree = ast.parse(file.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(inner for outer in classes for inner in outer.body)]:
            if isinstance(node, ast.FunctionDef) and "overload" in map(ast.unparse, node.decorator_list):
                continue  # a signature
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}: {node.name} has no docstring"


def test_the_library_speaks_of_parameters() -> None:
    """The command line makes options of them (cli/flags.py): who calls the library has typed none."""
    for name, file in modules().items():
        own = "argparse" in file.read_text()  # a program of its own has options of its own
        if own or name.startswith(("lime_edge.cli", "lime_edge.__main__")):
            continue
        tree = ast.parse(file.read_text())
        if any(isinstance(node, ast.Import) and node.names[0].name == "argparse" for node in ast.walk(tree)):
            continue  # a command of its own
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        whole = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        inner = {id(part) for node in whole for part in ast.walk(node) if part is not node}
        alone = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        for text in (ast.unparse(node) for node in [*whole, *alone] if id(node) not in docs | inner):
            flag = re.search(r"(?<![\w-])--[a-z][\w-]*", text)
            command = re.search(r"lime-edge \w+|pip install|export --target|bench --\w+", text)
            words = re.fullmatch(r"'--[a-z][\w-]*'", text)  # a word for another program
            assert not flag or command or words, f"{name}: {flag[0]} in {text}"  # a whole command may be quoted


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_files_named_in_the_docs_exist() -> None:
    for document in documents():
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


def command_options() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}

    def walk(command: object, path: str) -> None:
        options = {o for p in command.params for o in [*p.opts, *p.secondary_opts] if o.startswith("-")}  # type: ignore[attr-defined]
        found[path] = options | {"--help", "-h"}
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{path} {name}")

    walk(typer.main.get_command(app), "lime-edge")
    return found


def test_commands_in_the_docs_exist() -> None:
    """Every `lime-edge ...` line in a code block names a real command and real options."""
    known = command_options()
    checked = 0
    for document in documents():
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", document.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].removeprefix("$ ").split()
                if not words or words[0] != "lime-edge":
                    continue
                path, rest = "lime-edge", words[1:]
                while rest and f"{path} {rest[0]}" in known:
                    path, rest = f"{path} {rest[0]}", rest[1:]
                assert path != "lime-edge" or (rest and rest[0].startswith("-")), f"{document.name}: {line}"
                for word in rest:
                    if word.startswith("-") and not re.fullmatch(r"-?\d.*", word):
                        assert word.split("=")[0] in known[path], f"{document.name}: {line}: {word}"
                checked += 1
    assert checked >= 5


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in documents():
        for name in re.findall(r"`make ([a-z0-9-]+)`|^make ([a-z0-9-]+)", document.read_text(), re.M):
            assert (name[0] or name[1]) in targets, f"{document.name}: make {name}"


def loaded_by(module: str) -> set[str]:
    """Names of the modules outside the standard library that importing one loads, in a fresh process."""
    code = f"import sys; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names}


def test_importing_lime_edge_loads_next_to_nothing() -> None:
    """numpy and what reads bundles wait for the first `open`: `import lime_edge` stays as fast as it was."""
    assert loaded_by("lime_edge") <= {"lime_edge", "lime_edge.errors"}


def test_hosted_ci_runs_the_steps_of_the_script() -> None:
    (steps,) = re.findall(r"set -- (.*)", (ROOT / ".ci" / "run").read_text())
    (matrix,) = re.findall(r"step: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert matrix.split(", ") == steps.split()
    assert set(steps.split()) <= set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize(
    "module",
    [
        "lime_edge.session.decoder",
        "lime_edge.runtimes.onnx.decoder",
        "lime_edge.runtimes.coreml.decoder",
        "lime_edge.runtimes.coreai.decoder",
        "lime_edge.bench.measure",
        "lime_edge.checks.verify",
        "lime_edge.cli.app",
    ],
)
def test_a_device_loads_no_torch(module: str) -> None:
    """What import-linter proves of the lines of the sources, seen in a process: also what is imported by name."""
    assert not {name.split(".")[0] for name in loaded_by(module)} & {"torch", "transformers", "onnx", "optimum"}


def test_the_readmes_numbers_are_the_measured_ones() -> None:
    facts = json.loads((ROOT / "docs" / "benchmarks-2-cores.json").read_text())
    (run,) = [one for one in facts["scaling"] if one["model"] == "smollm2"]
    rows = {(row["method"], row["experts"]): row for row in run["rows"]}
    readme = (ROOT / "README.md").read_text()
    for label, method in (("LiME experts, rank 8", "lime"), ("LoRA adapters, rank 64", "lora")):
        row = rows[method, 100]
        cells = [f"{row[key] / 1e6:,.0f} MB" for key in ("bytes", "rss_bytes")] + [f"{row['switch_us']['p95']:.0f} us"]
        assert f"| {label} | {' | '.join(cells)} |" in readme, f"README: {label}: expected {cells}"
    copies = rows["copies", 100]
    wanted = [
        f"| {copies['bytes'] / 1e6:,.0f} MB |",
        f"one loaded: {copies['rss_bytes'] / 1e6:.0f} MB",
        f"{copies['switch_us']['p95'] / 1e3:.0f} ms",
    ]
    assert all(text in readme for text in wanted), f"README: copies: expected {wanted}"
    decoded = {run["threads"]: run["rows"] for run in facts["decode"] if run["model"] == "smollm2"}
    for label, name, base in (
        ("LiME, pinned", "ours-pinned", "ours-merged"),
        ("LiME, routed over 8", "ours-routed", "ours-merged"),
        ("LoRA, rank 8, in llama.cpp", "llama-lora", "llama"),
        ("LoRA, rank 8, in ONNX Runtime GenAI", "genai-lora", "genai"),
    ):
        times = [(own[name]["decode_ms"], own[base]["decode_ms"]) for own in (decoded[1], decoded[2])]
        cells = [f"{mine:.2f} ms, {mine / plain:.2f}" for mine, plain in times]
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| {label}")]
        assert line.endswith(f"| {' | '.join(cells)} |"), f"README: {line}: expected {cells}"
