"""`--on adb`: against a FAKE of adb's server (fake_adb.py); the app is played by Python, and by Kotlin's library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_adb import SERIAL, FakePhone, serve

from lime_edge.bench.tables import flatten

Make = Callable[..., Path]
HERE = Path(__file__).parent
KOTLIN = HERE.parent / "runtimes" / "kotlin"
IN_PYTHON = [sys.executable, str(HERE / "simulated_app.py")]
QUICK = ("--prompt-tokens", "6", "--gen-tokens", "3", "--repeat", "2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakePhone]:
    with serve(tmp_path_factory.mktemp("phone") / "phone", IN_PYTHON) as running:
        yield running


@pytest.fixture
def phone(server: FakePhone) -> Iterator[FakePhone]:
    """The phone, as it should be; afterwards nothing half-made is on it."""
    server.state, server.cut_after, server.pushed = "device", None, 0
    for name, text in (("app.json", json.dumps(IN_PYTHON)), ("thermal", "0"), ("free", "9000000")):
        (server.folder / name).write_text(text)
    yield server


def find_half_made(phone: FakePhone) -> list[str]:
    left = [path.name for path in phone.place("/data/local/tmp").iterdir()]
    left += [path.name for path in (phone.app / "files").rglob("*") if path.name.endswith((".partial", ".old"))]
    return left + [path.name for path in (phone.app / "files").glob("*.json")]


def bench(phone: FakePhone, bundle: Path, *words: str) -> dict[str, Any]:
    done = phone.run("bench", str(bundle), *QUICK, "--on", "adb", "--json", *words)
    assert done.returncode == 0, done.stderr
    assert find_half_made(phone) == []
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_phone_answers_with_the_same_schema(phone: FakePhone, tiny_bundle: Make) -> None:
    bundle = tiny_bundle()
    (phone.folder / "thermal").write_text("3")
    document = bench(phone, bundle, "--expert", "expert1", "--threads", "1")
    here = phone.run("bench", str(bundle), *QUICK, "--json")
    assert {key for key in flatten(document) if not key.startswith("device.")} | {"device"} == set(
        flatten(json.loads(here.stdout))
    )
    assert document["machine"]["board"] == "simulated app", "it came from the app"
    assert document["expert"] == "expert1" and document["bundle"] == str(bundle)
    extras = json.loads((phone.folder / "extras.json").read_text())
    numbers = {"prompt_tokens": "6", "gen_tokens": "3", "repeat": "2", "threads": "1"}
    name = bundle.name.removesuffix(".lime")
    assert extras == numbers | {"expert": "expert1", "bundle": name, "output": extras["output"]}
    assert document["throttled"] == ["thermal status severe"]
    copied = phone.app / "files" / "bundles" / f"{name}.lime"
    for file in bundle.rglob("*"):
        if file.is_file():
            assert (copied / file.relative_to(bundle)).read_bytes() == file.read_bytes(), file
    assert document["device"]["sent_bytes"] == phone.pushed > document["bundle_bytes"]
    phone.pushed = 0
    (phone.folder / "thermal").write_text("0")
    again = bench(phone, bundle)
    assert again["device"]["sent_bytes"] == phone.pushed == 0, "the second run pushes nothing"
    assert again["throttled"] == []


def test_only_what_changed_is_pushed(phone: FakePhone, tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle(), tmp_path / "own.lime"))
    bench(phone, bundle)
    copied = phone.app / "files" / "bundles" / "own.lime"
    (copied / "onnx" / "model.onnx").write_bytes(b"cut short")
    phone.pushed = 0
    bench(phone, bundle)
    size = (bundle / "onnx" / "model.onnx").stat().st_size
    assert size <= phone.pushed < size + 8000, "the file, and lists of what is where"
    assert (copied / "onnx" / "model.onnx").read_bytes() == (bundle / "onnx" / "model.onnx").read_bytes()
    bench(phone, bundle, "--clean")
    assert not copied.exists()


def test_faults_are_told_and_leave_nothing(phone: FakePhone, tiny_bundle: Make) -> None:
    bundle = tiny_bundle()

    def refuse(*words: str, code: int, text: str) -> None:
        done = phone.run(*words)
        assert done.returncode == code and text in done.stderr, f"{done.returncode} {done.stderr}"
        assert not done.stdout
        assert find_half_made(phone) == []

    run = ("bench", str(bundle), *QUICK)
    refuse(*run, "--on", "adb:OTHER", code=4, text=f"no phone OTHER that answers: found {SERIAL} (device)")
    refuse(*run, "--on", "adb", "--depth", "4", code=2, text="one bundle and one prompt length")
    refuse("verify", str(bundle), "--on", "adb", code=2, text="no verify, run")
    (phone.folder / "free").write_text("100")
    refuse(*run, "--on", "adb", code=4, text="storage: expected")
    (phone.folder / "free").write_text("9000000")
    refuse(*run, "--on", "adb", "--expert", "nobody", code=2, text="the app's benchmark failed")
    (phone.folder / "app.json").write_text(json.dumps(["/bin/false"]))
    refuse(*run, "--on", "adb", code=5, text="the app ended without a document")
    phone.state = "unauthorized"
    refuse(*run, "--on", "adb", code=4, text="unauthorized")


def test_a_cable_pulled_out_while_pushing(phone: FakePhone, tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle(), tmp_path / "pulled.lime"))
    phone.cut_after = 100_000
    done = phone.run("bench", str(bundle), *QUICK, "--on", "adb")
    assert done.returncode == 4 and "the phone was lost while bringing" in done.stderr
    assert not (phone.app / "files" / "bundles" / "pulled.lime").exists(), "no half bundle"
    phone.cut_after, phone.state = None, "device"
    bench(phone, bundle)


def test_doctor_names_what_a_phone_lacks(phone: FakePhone) -> None:
    assert phone.run("doctor", "--on", "adb").returncode == 0
    hosts = phone.folder / "hosts.toml"
    hosts.write_text('[[device]]\nname = "mine"\naddress = "adb"\npackage = "another.app"\n')
    done = phone.run("doctor", "--hosts", str(hosts), "--json")
    (found,) = json.loads(done.stdout)["devices"]
    assert done.returncode == 4 and found["name"] == "mine"
    (bad,) = [one for one in found["findings"] if one["state"] == "bad"]
    assert bad["found"] == "another.app is not installed"


@pytest.mark.check
@pytest.mark.skipif(not (shutil.which("mvn") and shutil.which("java")), reason="needs a JDK and Maven")
def test_kotlins_benchmark_stands_for_the_activity(phone: FakePhone, tiny_bundle: Make, tmp_path: Path) -> None:
    """The library's own BenchmarkRequest, which the activity calls, on the JVM with the real ONNX Runtime."""
    sources = tmp_path / "runtimes" / "kotlin"
    shutil.copytree(KOTLIN, sources, ignore=shutil.ignore_patterns("target"))
    goal = "dependency:build-classpath"
    maven = ["mvn", "-B", "-ntp", "-q", "-pl", "core,onnx,app", "-am", "compile", goal, "-Dmdep.outputFile=target/path"]
    (tmp_path / "docs").mkdir()
    shutil.copy(KOTLIN.parent.parent / "docs" / "bundle.schema.json", tmp_path / "docs")  # a resource of the jar
    text = (sources / "pom.xml").read_text().replace("    <module>../../examples/android/check</module>\n", "")
    (sources / "pom.xml").write_text(text)
    built = subprocess.run(maven, cwd=sources, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:]
    folders = [str(sources / name / "target" / "classes") for name in ("app", "core", "onnx")]
    jars = (sources / "onnx" / "target" / "path").read_text().split(os.pathsep)
    path = os.pathsep.join([*folders, *(jar for jar in jars if jar.endswith(".jar"))])
    app = ["java", "-cp", path, str(HERE / "SimulatedApp.java")]
    (phone.folder / "app.json").write_text(json.dumps(app))
    bundle = tiny_bundle()
    document = bench(phone, bundle, "--expert", "expert1")
    assert document["machine"]["python"].startswith("none: "), "no Python measured it"
    assert document["expert"] == "expert1" and document["decode_tokens_per_s"] > 0
    here = json.loads(phone.run("bench", str(bundle), *QUICK, "--json").stdout)
    assert set(document) == set(here)
    assert set(document["runs"][0]) == set(here["runs"][0])
    for key in ("machine", "spread", "rounds", "memory", "state"):
        assert set(document[key]) == set(here[key]), key
    (phone.folder / "app.json").write_text(json.dumps(app))
    refused = phone.run("bench", str(bundle), *QUICK, "--on", "adb", "--expert", "nobody")
    assert refused.returncode == 2 and "the app's benchmark failed" in refused.stderr
