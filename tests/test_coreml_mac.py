"""What runs on a Mac, as far as a machine without one can tell: choosing Core ML, its calls, the script for Macs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Make
from models import CASES, draw_ids
from oracles import QUANTS
from test_coreml_export import EXACT, build, open_on
from test_variants import ROUTINGS

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.runtimes.coreml import decoder as coreml
from lime_edge.runtimes.coreml.interpreter import Interpreter
from lime_edge.runtimes.coreml.program import read_package

SCRIPT = Path(__file__).parent.parent / "examples" / "ios" / "verify_on_mac.py"


@pytest.fixture(scope="module")
def package(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> Path:
    model, adapter = build(CASES["llama-tied"], tiny_model, tiny_adapter)
    return tiny_bundle(model, adapter, targets=("coreml",), **QUANTS["int4"])


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_on_mac", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend_mac(monkeypatch: pytest.MonkeyPatch, installed: bool = True) -> None:
    monkeypatch.setattr(coreml.sys, "platform", "darwin")
    monkeypatch.setattr(coreml.importlib.util, "find_spec", lambda name: object() if installed else None)


def test_a_mac_takes_core_ml_and_others_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coreml.choose_provider(()) == "interpreter"
    with pytest.raises(LimeEdgeError, match="none of the providers CoreML is available") as caught:
        coreml.choose_provider(("CoreML",))
    assert caught.value.exit_code == 4
    pretend_mac(monkeypatch)
    assert coreml.choose_provider(()) == "CoreML"
    assert coreml.choose_provider(("CoreML:cpu_only", "interpreter")) == "CoreML:cpu_only"
    pretend_mac(monkeypatch, installed=False)
    assert coreml.choose_provider(()) == "interpreter"
    with pytest.raises(LimeEdgeError, match="the package 'coremltools' is not installed") as caught:
        coreml.choose_provider(("CoreML:all",))
    assert caught.value.exit_code == 4 and "lime-edge[coreml]" in caught.value.hint


class FakeModel:
    """coremltools' MLModel on the interpreter: the calls that a Mac would get, with their types checked."""

    made: list[tuple[str, str, str | None]] = []

    def __init__(self, path: str, compute_units: str, function_name: str | None):
        FakeModel.made.append((path, compute_units, function_name))
        self.interpreter = Interpreter(read_package(Path(path)), function_name or "main")

    def make_state(self) -> Any:
        state = self.interpreter.make_state()
        return SimpleNamespace(held=state, read_state=lambda name: state[name].copy(), write_state=state.__setitem__)

    def predict(self, data: dict[str, np.ndarray], state: Any) -> dict[str, np.ndarray]:
        assert {name: array.dtype.name for name, array in data.items()}.items() <= {
            "input_ids": "int32",
            "position": "int32",
            "length": "int32",
            "expert": "float16",
        }.items()
        return self.interpreter.run(data, state.held)


def test_the_calls_that_a_mac_gets(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """Two functions, each with a state of its own, behave as one cache; units and function names reach coremltools."""
    model = tiny_model("llama")
    path = tiny_bundle(model, tiny_adapter(model, routing=ROUTINGS["soft"]), targets=("coreml",))
    units = SimpleNamespace(ALL="all units", CPU_ONLY="cpu")
    fake = SimpleNamespace(models=SimpleNamespace(MLModel=FakeModel), ComputeUnit=units)
    ids, answers = draw_ids(9)[0].tolist(), []
    for provider in (EXACT, "CoreML:cpu_only"):
        if provider != EXACT:
            monkeypatch.setitem(sys.modules, "coremltools", fake)
            pretend_mac(monkeypatch)
        session = open_on(path, provider)
        assert session.provider == provider
        session.use("routed")
        rows = [session.logits(ids)]
        session.use("expert1", keep_cache=True)  # reads what the other function wrote
        rows += [session.extend([token]).copy() for token in ids[:3]]
        session.use("routed", keep_cache=True)
        rows.append(session.extend([7]).copy())
        answers.append(np.concatenate(rows))
    np.testing.assert_array_equal(answers[0], answers[1])
    assert [made[1:] for made in FakeModel.made] == [("cpu", "main"), ("cpu", "routed")]


def test_the_script_checks_and_times(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script()
    assert script.main([str(package), "--iterations", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["units"]["interpreter"]
    numbers, times = found["numbers"], found["times"]
    assert found["provider"] == "interpreter" and numbers["checked"] == 6 and not numbers["missed"]
    assert 0 < numbers["mean_error"] < 0.02
    assert set(times) == {"prompt 32", "decode", "switch"} and all(t["p50_ms"] > 0 for t in times.values())
    assert script.main([str(package), "--iterations", "1"]) == 0
    assert "decode" in capsys.readouterr().out


def test_the_script_tells_a_miss(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_expert = coreml.CoremlEngine.set_expert
    monkeypatch.setattr(coreml.CoremlEngine, "set_expert", lambda self, d: set_expert(self, 0 * d))
    assert load_script().main([str(package), "--iterations", "1", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["units"]["interpreter"]["numbers"]["missed"]


@pytest.mark.parametrize(
    "arguments,code,words",
    [
        (["--units", "cpu_only"], 4, "Core ML needs a Mac"),
        (["--units", "gpu"], 2, "unknown: gpu"),
        (["--iterations", "0"], 2, "at least 1"),
        (["--units", "interpreter", "--plan"], 2, "--plan: expected --units with some of all, cpu_and_ne"),
        (["--units", "interpreter", "--benchmarker"], 2, "--benchmarker: expected --units with some of"),
    ],
)
def test_the_scripts_arguments(
    arguments: list[str], code: int, words: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = load_script().main([str(package), *arguments])
    except SystemExit as stop:
        found = stop.code
    assert found == code and words in capsys.readouterr().err


def test_the_script_refuses_to_check_nothing(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No golden outputs, or none that this bundle can be asked for: 2 and a hint, as `lime-edge verify`."""
    script = load_script()
    monkeypatch.setattr(script, "find_obstacle", lambda *_: "removed after the export")
    assert script.main([str(package)]) == 2
    told = capsys.readouterr().err
    assert "nothing could be checked" in told and "expert1: removed after the export" in told and "hint:" in told
    monkeypatch.setattr(script, "read_golden", lambda _: None)
    assert script.main([str(package)]) == 2
    told = capsys.readouterr().err
    assert "holds no golden outputs to compare with" in told and "hint: export the bundle again" in told


def test_the_script_says_what_it_was_given(
    tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, path = load_script(), str(tiny_bundle())
    assert script.main([path]) == 2
    told = capsys.readouterr().err
    assert "expected a bundle for coreml, found onnx" in told and "hint: lime-edge export --target coreml" in told
    manifest = SimpleNamespace(kind="encoder", targets={"coreml": {}})
    monkeypatch.setattr(script.Bundle, "open", lambda *_, **__: SimpleNamespace(manifest=manifest, path=path))
    assert script.main([path]) == 2
    told = capsys.readouterr().err
    assert "holds an encoder: it answers no prompts" in told and "hint: call lime_edge.open" in told


def test_the_script_names_what_it_imports_from_coremltools() -> None:
    """Its names are those of the coremltools that is installed."""
    from coremltools.models.compute_plan import MLComputePlan
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    from coremltools.models.utils import compile_model

    assert callable(compile_model) and callable(MLComputePlan.load_from_path)
    assert callable(MLComputePlan.get_compute_device_usage_for_mlprogram_operation)
    for name in ("benchmark_load", "benchmark_predict"):
        assert callable(getattr(MLModelBenchmarker, name))


def test_exporting_without_coremltools_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that imports it says how to install it; a copy of it, so that the loaded one stays."""
    file = Path(__file__).parent.parent / "exporters" / "coreml" / "graph.py"
    spec = importlib.util.spec_from_file_location("coreml_graph_again", file)
    assert spec and spec.loader
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(LimeEdgeError, match="the package 'coremltools' is not installed") as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert caught.value.exit_code == 4 and "lime-edge[coreml]" in caught.value.hint


def test_a_package_that_coremltools_needs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A coremltools that is there and finds no protobuf: it is not the one that is missing."""
    (tmp_path / "coremltools.py").write_text("import a_package_of_coremltools.part")
    file = Path(__file__).parent.parent / "exporters" / "coreml" / "graph.py"
    spec = importlib.util.spec_from_file_location("coreml_graph_again", file)
    assert spec and spec.loader
    monkeypatch.delitem(sys.modules, "coremltools", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LimeEdgeError, match="the package 'a_package_of_coremltools' is not installed"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_device_needs_numpy_alone(package: Path) -> None:
    """The interpreter reads and runs a package without coremltools, protobuf or torch."""
    import subprocess

    code = (
        "import sys, lime_edge; s = lime_edge.open(sys.argv[1]); s.logits([5, 6, 7]); "
        "sys.exit(bool({'coremltools', 'google.protobuf', 'torch'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(package)], check=True)
    assert Bundle.open(package).manifest.targets["coreml"].providers[0] == "CoreML"
