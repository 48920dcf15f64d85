"""The Swift package as far as Python sees it: its copy of the schema, its files, what its script says is missing.

The package itself is compiled and tested by `make test-swift`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SWIFT = ROOT / "runtimes" / "swift"
sys.path.insert(0, str(ROOT / "tools"))

import swift_schema  # noqa: E402


def test_the_schema_is_that_of_the_docs() -> None:
    assert swift_schema.FILE.read_text(encoding="utf-8") == swift_schema.render(), "run tools/swift_schema.py"


def test_the_schema_keeps_what_is_checked() -> None:
    text = swift_schema.render().split('#"""\n', 1)[1].rsplit('\n"""#', 1)[0]
    full = json.loads((ROOT / "docs" / "bundle.schema.json").read_text(encoding="utf-8"))

    def count(rule: object, word: str) -> int:
        nodes = rule.values() if isinstance(rule, dict) else rule if isinstance(rule, list) else []
        own = word in rule if isinstance(rule, dict) else False
        return own + sum(count(node, word) for node in nodes)

    for word in (
        "pattern",
        "required",
        "enum",
        "minimum",
        "maximum",
        "default",
        "maxItems",
        "additionalProperties",
        "$ref",
    ):
        assert count(json.loads(text), word) == count(full, word), word


def test_the_package_compiles_the_operators_that_python_does() -> None:
    sources = set(re.findall(r"runtimes/onnx/operators/(\w+\.c)", (ROOT / "pyproject.toml").read_text()))
    package = (ROOT / "Package.swift").read_text()
    assert set(re.findall(r'"(\w+\.c)"', package)) == sources
    assert "unsafeFlags" not in package, "SwiftPM takes no package with them as a dependency"


@pytest.mark.skipif(os.geteuid() == 0, reason="root would make it")
def test_without_root_the_script_says_what_is_missing(tmp_path: Path) -> None:
    asked = {**os.environ, "LIME_EDGE_SWIFT_CHROOT": str(tmp_path / "none")}
    found = subprocess.run([SWIFT / "chroot.sh", "make"], env=asked, capture_output=True, text=True, timeout=60)
    assert found.returncode == 4 and "only root can make one" in found.stderr


@pytest.mark.parametrize("tool", ["debootstrap", "unshare"])
def test_a_missing_tool_is_named(tmp_path: Path, tool: str) -> None:
    for name in ("bash", "env", "dirname", "id", "mkdir", "rm", "sed", "debootstrap", "unshare"):
        target = next(
            (Path(place) / name for place in ("/usr/bin", "/bin", "/usr/sbin") if (Path(place) / name).exists()), None
        )
        if name != tool:
            (tmp_path / name).symlink_to(target or "/bin/true")
    (tmp_path / "id").unlink()
    (tmp_path / "id").write_text("#!/usr/bin/env bash\necho 0\n")
    (tmp_path / "id").chmod(0o755)
    asked = {"PATH": str(tmp_path), "LIME_EDGE_SWIFT_CHROOT": str(tmp_path / "none")}
    found = subprocess.run(
        ["/bin/bash", SWIFT / "chroot.sh", "make"], env=asked, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 4 and f"{tool} is missing" in found.stderr, found.stderr
    assert not (tmp_path / "none").exists()


def test_what_calls_core_ml_has_core_mls_own_names() -> None:
    """The declarations that the compiler checks our calls against, by selectors that pyobjc and NativeScript know."""
    table = json.loads((ROOT / "tests" / "vectors" / "coreml_selectors.json").read_text())
    known = {(call["class"], call["swift"]) for call in table["calls"]}
    text = (SWIFT / "Tests" / "Stubs" / "CoreML.swift").read_text()
    parts = re.split(r"^(?:open class|public protocol) (\w+)", text, flags=re.M)
    declared = set()
    for owner, body in zip(parts[1::2], parts[2::2], strict=True):
        for name in re.findall(r"\bvar (\w+)", body):
            declared.add((owner, name))
        for name, arguments in re.findall(
            r"\b(?:func )?(\w+)(?:<R>)?\(((?:[^()]|\([^()]*\))*)\)(?: async)?(?: re?throws| throws)?(?: ->| \{)", body
        ):
            labels = [
                one.split()[0].rstrip(":")
                for one in re.split(r", (?=\w+[ :])", re.sub(r"\([^()]*\)", "", arguments))
                if one.strip()
            ]
            if name not in ("fatalError", "body"):
                declared.add((owner, f"{name}({''.join(label + ':' for label in labels)})"))
    own = {
        (owner if owner != "MLDictionaryFeatureProvider" or name.startswith("init") else "MLFeatureProvider", name)
        for owner, name in declared
    }
    assert own == known
    for name, cases in table["enums"].items():
        body = text.split(f"public enum {name}", 1)[1].split("}", 1)[0]
        told = {case.lower(): int(number, 0) for case, number in re.findall(r"case (\w+) = (\w+)", body)}
        assert told == {case.lower(): number for case, number in cases.items()}, name
    assert all(call["sources"] for call in table["calls"])
