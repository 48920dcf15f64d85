"""lime-edge verify: it agrees with what is right, and misses what is wrong: vectors, slices, bytes, caches."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from manifests import add_coreml, expert_path, reseal
from models import load_model, load_sites
from test_cli import Cli
from test_session import SESSION_TARGETS
from test_variants import make_prompt_adapter

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.change import add_experts, remove_expert
from lime_edge.bundle.experts import read_expert
from lime_edge.bundle.golden import FILE, choose_columns, read_golden
from lime_edge.bundle.manifest import MANIFEST
from lime_edge.checks.judge import LEAN_SHARE, find_lean, may_lean
from lime_edge.checks.report import MISSED, OK, UNCHECKED, Check, count_results
from lime_edge.checks.tolerance import TOLERANCES, Tolerance
from lime_edge.checks.verify import verify_bundle
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import EXIT_INPUT, EXIT_MISSING, LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.session.decoder import Session
from lime_edge.session.engines import SessionOptions
from lime_edge.session.open import open_any
from lime_edge.session.switching import ExpertSwitch
from lime_edge.targets.devices import find_device

Make = Callable[..., Path]
DATA = "onnx/model.onnx.data"
BLEND = "expert0=0.75,expert1=0.25"
ALL = ("expert0", "expert1", "expert2", "expert3", BLEND, "none")


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


@pytest.fixture(scope="module")
def routed(tiny_bundle: Make, tiny_model: Make, tiny_adapter: Make) -> Make:
    """routed(**options): a bundle of an adapter with soft top-2 routing."""
    return lambda **options: tiny_bundle(adapter=tiny_adapter(tiny_model(), routing={"top_k": 2}), **options)


def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy.lime"))


def find_checks(bundle: Path, *selections: str) -> dict[str, Check]:
    return {check.selection: check for check in verify_bundle(bundle, selections=selections, threads=1).checks}


def vector(bundle: Path, name: str) -> np.ndarray:
    return read_expert(expert_path(bundle, name)).vector


def put_vector(bundle: Path, name: str, changed: np.ndarray) -> None:
    """Another vector under an expert's name, as if the export had stored it so."""
    file = expert_path(bundle, name)
    file.write_bytes(replace(read_expert(file), vector=changed).to_bytes())
    reseal(bundle)


# what is right


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_an_untouched_bundle_passes(routed: Make, quant: str) -> None:
    report = verify_bundle(routed(quant=quant), threads=1)
    limits = TOLERANCES["float32" if quant == "none" else "int8-dynamic"]
    assert [check.selection for check in report.checks] == [*ALL, "routed"]
    assert report.describe()["passed"] and not report.missed, report.missed
    for check in report.checks:
        assert check.error is not None and 0 < check.error < limits.mean / 2, check  # room on a machine unlike this one
        assert check.decisions == 8 and check.agreed >= (8 if quant == "none" else 6), check


@pytest.mark.parametrize("target", SESSION_TARGETS)
def test_every_target_passes(tiny_bundle: Make, target: str) -> None:
    bundle = tiny_bundle() if target == "onnx" else tiny_bundle(targets=("onnx", target))
    report = verify_bundle(bundle, threads=1)
    assert tuple(report.computes) == tuple(Bundle.open(bundle).manifest.targets)
    for name in report.computes:
        assert [check.selection for check in report.checks if check.target == name] == list(ALL)
    assert not report.missed, report.missed


def test_golden_outputs_are_what_transformers_computes(tiny_bundle: Make, tiny_model: Make, tiny_adapter: Make) -> None:
    """Stored by our decoder; compared here with `transformers` and the layers unfolded."""
    golden = read_golden(Bundle.open(tiny_bundle()))
    assert golden is not None and golden.selections == ALL
    expected = golden.outputs["logits"].expected
    unfolded = UnfoldedModel(load_model(tiny_model()), *load_sites(tiny_adapter()))
    for index, mode in enumerate([0, 1, 2, 3, {0: 0.75, 1: 0.25}, None]):
        unfolded.use(mode)
        for call, prompt in enumerate(golden.calls["input_ids"]):
            tokens = expected.best[index, call]
            ids = torch.tensor([[*prompt[0], *tokens[:-1]]])
            logits = unfolded.logits({"input_ids": ids})[0, -golden.steps :].numpy()
            assert logits.argmax(-1).tolist() == tokens.tolist()
            logits -= logits.mean(-1, keepdims=True)
            error = np.abs(logits - expected.values[index, call]).max()  # a small vocabulary is kept whole
            assert error < 1e-4, f"{golden.selections[index]}, prompt {call}: {error}"


@pytest.mark.parametrize(("name", "quant"), [("bert-lora-cls", "int8"), ("vit-lora-cls", "none")])
def test_encoders(name: str, quant: str, tmp_path: Path, encoder_bundle: Make) -> None:
    bundle = Path(shutil.copytree(encoder_bundle(name, quant=quant), tmp_path / "x.lime"))
    report = verify_bundle(bundle, threads=1)
    assert [check.selection for check in report.checks][-2:] == ["none", "routed"]
    assert not report.missed, report.missed
    put_vector(bundle, "expert_0", vector(bundle, "expert_2"))
    checks = find_checks(bundle, "expert_0", "expert_1")
    assert checks["expert_0"].result == MISSED and "answers like expert_2" in checks["expert_0"].why
    assert checks["expert_1"].result == OK


@pytest.mark.parametrize("options", [{"fold": "expert1"}, {"fold": "expert0", "single": True}])
def test_folds(tiny_bundle: Make, options: dict) -> None:
    checks = verify_bundle(tiny_bundle(**options), threads=1).checks
    assert [check.selection for check in checks] == (["expert0"] if options.get("single") else list(ALL))
    assert {check.result for check in checks} == {OK}


def test_variants_without_an_original_leave_none_out(tiny_bundle: Make, tiny_adapter: Make) -> None:
    checks = find_checks(tiny_bundle(adapter=tiny_adapter(variant="slicefine")))
    assert list(checks) == list(ALL[:-1]) and {check.result for check in checks.values()} == {OK}


def test_virtual_tokens(tiny_bundle: Make, tiny_model: Make, tmp_path: Path) -> None:
    how = {"routing": "auto_topk", "auto_topk": True, "sparse_mode": False, "input_conditioned": True}
    adapter = make_prompt_adapter(tmp_path / "adapter", tiny_model(), **how)
    checks = find_checks(tiny_bundle(tiny_model(), adapter, quant="int8"))
    assert list(checks) == [*ALL[:-1], "routed"] and {check.result for check in checks.values()} == {OK}, checks


def test_a_bundle_without_a_tokenizer(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    export_bundle(
        tiny_model(),
        tiny_adapter(),
        tmp_path / "x.lime",
        CompileOptions(quant="none"),
        find_device("cpu"),
        ExportOptions(tokenizer=False),
    )
    assert not verify_bundle(tmp_path / "x.lime", threads=1).missed


# what is wrong


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_another_experts_vector_is_missed(tiny_bundle: Make, quant: str, tmp_path: Path) -> None:
    bundle = copy(tiny_bundle(quant=quant), tmp_path)
    put_vector(bundle, "expert1", vector(bundle, "expert3"))
    checks = find_checks(bundle)
    assert checks["expert1"].result == MISSED and "answers like expert3" in checks["expert1"].why
    assert checks[BLEND].result == MISSED
    assert {checks[name].result for name in ("expert0", "expert2", "expert3", "none")} == {OK}


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_a_swapped_slice_is_missed(tiny_bundle: Make, quant: str, tmp_path: Path) -> None:
    """One of eight sites: of another expert, or in another site's place."""
    bundle = copy(tiny_bundle(quant=quant), tmp_path)
    sites = [site for site in Bundle.open(bundle).manifest.sites if site.width == 64]
    first, last = sites[0], sites[-1]
    mine, other = vector(bundle, "expert1"), vector(bundle, "expert3")
    foreign = mine.copy()
    foreign[last.offset : last.offset + 64] = other[last.offset : last.offset + 64]
    swapped = mine.copy()
    swapped[first.offset : first.offset + 64] = mine[last.offset : last.offset + 64]
    swapped[last.offset : last.offset + 64] = mine[first.offset : first.offset + 64]
    for changed in (foreign, swapped):
        put_vector(bundle, "expert1", changed)
        check = find_checks(bundle, "expert1")["expert1"]
        assert check.result == MISSED and "logits differ" in check.why, check


@pytest.mark.parametrize("target", SESSION_TARGETS)
def test_a_mixture_leans_towards_what_was_mixed_in(
    tiny_bundle: Make, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40% of an expert's slices are another's: the direction alone tells, whatever the size of the error."""
    options = {} if target == "onnx" else {"targets": ("onnx", target)}
    bundle = copy(tiny_bundle(quant="int4", **options), tmp_path)
    sites = list(Bundle.open(bundle).manifest.sites)
    mixed, other = vector(bundle, "expert1").copy(), vector(bundle, "expert3")
    for site in sites[: round(0.4 * len(sites))]:
        mixed[site.offset : site.offset + site.width] = other[site.offset : site.offset + site.width]
    for compute, limits in TOLERANCES.items():  # nothing else can notice
        monkeypatch.setitem(TOLERANCES, compute, Tolerance(100 * limits.mean, 100.0, 100.0))
    monkeypatch.setattr("lime_edge.checks.judge.LEAN_SHARE", LEAN_SHARE / 100)
    assert not verify_bundle(bundle, (target,), threads=1).missed
    put_vector(bundle, "expert1", mixed)
    checks = {check.selection: check for check in verify_bundle(bundle, (target,), threads=1).checks}
    assert checks["expert1"].why == "leans towards expert3", checks["expert1"]
    assert {checks[name].result for name in ("expert0", "expert2", "expert3", "none")} == {OK}


def test_errors_with_a_direction_lean_and_noise_does_not() -> None:
    random = np.random.default_rng(0)
    expected = random.normal(size=(4, 2, 1, 512))
    expected[3] = expected[0] + 0.05 * random.normal(size=(2, 1, 512))  # too near to be told apart
    noise = 0.12 * random.normal(size=(2, 1, 512))
    assert find_lean(expected[0] + noise, expected, 0, 0.2) is None
    assert find_lean(expected[3], expected, 0, 0.2) is None
    for share, found in ((0.15, None), (0.4, 2)):
        assert find_lean(expected[0] + noise + share * (expected[2] - expected[0]), expected, 0, 0.2) == found
    assert not may_lean("int8-per-token", "routed", 512) and not may_lean("float16", "expert0", 3)
    assert may_lean("float32", "routed", 3) and may_lean("int8-dynamic", "none", 16)


def locate(bundle: Path, ending: str) -> list[tuple[str, int]]:
    """Initializers whose name ends so, with their place in the data file."""
    graph = onnx.load(str(bundle / "onnx" / "model.onnx"), load_external_data=False).graph
    facts = [(t.name, {entry.key: entry.value for entry in t.external_data}) for t in graph.initializer]
    return [(name, int(f.get("offset", 0))) for name, f in facts if f and name.endswith(ending)]


def locate_ends(bundle: Path, ending: str) -> list[tuple[str, int]]:
    """As `locate`, the place after the initializer's last byte."""
    graph = onnx.load(str(bundle / "onnx" / "model.onnx"), load_external_data=False).graph
    entries = [(tensor.name, entry) for tensor in graph.initializer for entry in tensor.external_data]
    lengths = {name: int(entry.value) for name, entry in entries if entry.key == "length"}
    return [(name, offset + lengths[name]) for name, offset in locate(bundle, ending)]


def flip(bundle: Path, place: int, mask: int = 0x08) -> None:
    """Flip bits of one byte of the weights."""
    with (bundle / DATA).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ mask]))


def test_a_flipped_byte_of_a_float_weight_is_missed(tiny_bundle: Make, tmp_path: Path) -> None:
    """The exponent of one weight of each matrix, the manifest's hash made to fit: the numbers alone must notice."""
    bundle = copy(tiny_bundle(), tmp_path)
    places = locate(bundle, "proj.weight")
    assert len(places) == 8
    for name, offset in places:
        flip(bundle, offset + 3)
        reseal(bundle)
        missed = verify_bundle(bundle, selections=("expert0", "none"), threads=1).missed
        assert len(missed) == 2, name
        flip(bundle, offset + 3)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_flipped_byte_of_a_scale_is_missed(tiny_bundle: Make, quant: str, tmp_path: Path) -> None:
    bundle = copy(tiny_bundle(quant=quant), tmp_path)
    for name, end in locate_ends(bundle, "proj.scales"):  # the first scale of gate may only close one gate for good
        flip(bundle, end - 1, 0x40)
        reseal(bundle)
        check = find_checks(bundle, "none")["none"]
        assert check.result == MISSED, name
        flip(bundle, end - 1, 0x40)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_damaged_matrix_of_codes_is_missed(tiny_bundle: Make, quant: str, tmp_path: Path) -> None:
    bundle = copy(tiny_bundle(quant=quant), tmp_path)
    name, offset = locate(bundle, "o_proj.codes")[0]
    for place in range(offset, offset + 512):
        flip(bundle, place, 0x88)
    reseal(bundle)
    assert find_checks(bundle, "none")["none"].result == MISSED, name


def test_any_flipped_byte_is_missed_by_its_hash(tiny_bundle: Make, tmp_path: Path, lime: Cli) -> None:
    bundle = copy(tiny_bundle(quant="int4"), tmp_path)
    flip(bundle, locate(bundle, "o_proj.codes")[0][1], 0x01)
    assert f"{DATA}: sha256" in lime.refuse("verify", bundle)


def test_a_cache_that_is_lost_between_tokens_is_missed(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = Session.extend

    def forget(self: Session, ids: list[int], keep: int = 1) -> np.ndarray:
        self.reset()
        return extend(self, ids, keep)

    monkeypatch.setattr(Session, "extend", forget)
    report = verify_bundle(tiny_bundle(quant="int4"), threads=1)
    assert len(report.missed) == len(report.checks)


def test_another_folded_reference_is_missed(tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = copy(tiny_bundle(quant="int4"), tmp_path)
    shutil.copy(tiny_bundle(fold="expert1") / "reference.safetensors", bundle)
    reseal(bundle)
    assert {check.result for check in verify_bundle(bundle, threads=1).checks} == {MISSED}


def test_a_graph_that_cannot_be_loaded_is_missed(tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = copy(tiny_bundle(quant="int4"), tmp_path)
    (bundle / "onnx" / "model.onnx").write_bytes(b"nothing")
    reseal(bundle)
    (check,) = verify_bundle(bundle, threads=1).checks
    assert (check.selection, check.result) == ("all", MISSED) and "cannot load it" in check.why


# what cannot be said


def test_experts_that_came_later_are_not_checked(tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = copy(tiny_bundle(quant="int4"), tmp_path)
    expert = read_expert(expert_path(bundle, "expert2"))
    add_experts(bundle, [replace(expert, name="later")])
    add_experts(bundle, [replace(expert, name="expert1")], replace=True)
    remove_expert(bundle, "expert3")
    assert Bundle.open(bundle, verify=True).manifest.added == ("later", "expert1")
    checks = find_checks(bundle)
    for name in ("later", "expert1", BLEND):
        assert checks[name].result == UNCHECKED and "came after the export" in checks[name].why
    assert checks["expert3"].why == "expert3: removed after the export"
    with pytest.raises(LimeEdgeError, match="nothing could be checked: onnx, later: came after the export"):
        verify_bundle(bundle, selections=("later",))
    assert {checks[name].result for name in ("expert0", "expert2", "none")} == {OK}


def test_a_target_without_routing_says_so(routed: Make, tmp_path: Path) -> None:
    bundle = copy(routed(quant="int4"), tmp_path)
    reseal(bundle, lambda body: body["targets"][0].update(routed=None))
    check = find_checks(bundle, "none", "routed")["routed"]
    assert (check.result, check.why) == (UNCHECKED, "this target has no routed graph")


def test_a_cache_too_short_for_the_prompts(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "max_length", 15)
    with pytest.raises(LimeEdgeError, match="its cache holds 15 tokens, 16 are needed") as error:
        verify_bundle(tiny_bundle(quant="int4"), threads=1)
    assert (error.value.exit_code, error.value.hint) == (EXIT_INPUT, "export with `max_seq_len=16` or more")


def test_a_static_cache_too_short_for_the_prompts(
    tiny_model: Make, tiny_adapter: Make, tmp_path: Path, lime: Cli
) -> None:
    words = ("--target", "executorch", "--quant", "none", "--max-seq-len", 7, "-o", tmp_path / "x.lime")
    assert lime("export", tiny_model(), "--adapter", tiny_adapter(), *words).code == 0
    error = lime.refuse("verify", tmp_path / "x.lime", code=EXIT_INPUT)
    assert "its cache holds 7 tokens, 16 are needed hint: export with --max-seq-len 16 or more" in error


def test_an_engine_that_fails_is_missed(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Non-zero status code\nmore")

    monkeypatch.setattr(Session, "extend", fail)
    checks = verify_bundle(tiny_bundle(quant="int4"), threads=1).checks
    assert {(check.result, check.why) for check in checks} == {(MISSED, "RuntimeError: Non-zero status code")}


def test_an_engine_that_fails_inside_a_session_says_so(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Non-zero status code\nmore")

    monkeypatch.setattr("lime_edge.runtimes.onnx.decoder.OnnxEngine.feed", fail)
    checks = verify_bundle(tiny_bundle(quant="int4"), threads=1).checks
    why = "onnx: the engine failed: RuntimeError: Non-zero status code"
    assert {(check.result, check.why) for check in checks} == {(MISSED, why)}


def test_a_missing_engine(tiny_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out where others can be checked; an error where it was asked for, or where nothing is left."""
    bundle = copy(tiny_bundle(quant="int4"), tmp_path)
    add_coreml(bundle)
    opening = open_any

    def refuse(bundle: Bundle, target: str, options: SessionOptions) -> ExpertSwitch:
        if target == "coreml":
            raise lime_edge.errors.need("coremltools", "coreml")
        return opening(bundle, target, options)

    monkeypatch.setattr("lime_edge.checks.verify.open_any", refuse)
    checks = [check for check in verify_bundle(bundle, threads=1).checks if check.target == "coreml"]
    assert [(check.selection, check.result) for check in checks] == [("all", UNCHECKED)]
    assert checks[0].why == "the package 'coremltools' is not installed"
    with pytest.raises(LimeEdgeError) as error:
        verify_bundle(bundle, targets=("coreml",))
    assert error.value.exit_code == EXIT_MISSING

    def drop_onnx(body: dict[str, Any]) -> None:
        body["targets"].pop(0)
        body["companions"].clear()

    reseal(bundle, drop_onnx)
    with pytest.raises(LimeEdgeError, match="could be checked: coreml, all: the package 'coremltools'") as error:
        verify_bundle(bundle)
    assert error.value.exit_code == EXIT_MISSING


def test_what_is_refused(tiny_bundle: Make, tmp_path: Path, lime: Cli) -> None:
    bundle = copy(tiny_bundle(quant="int4"), tmp_path)
    assert "holds no executorch artifact hint: it holds onnx" in lime.refuse("verify", bundle, "--target", "executorch")
    assert "target: expected onnx" in lime.refuse("verify", bundle, "--target", "toaster")
    error = lime.refuse("verify", bundle, "-e", "nobody")
    assert "no golden outputs for 'nobody' hint: there are some for expert0" in error
    before = (bundle / MANIFEST).read_bytes()
    reseal(bundle, lambda body: body["targets"][0].update(compute="analog"))
    assert "Invalid enum value 'analog' - at `$.targets[0].compute`" in lime.refuse("verify", bundle)
    (bundle / MANIFEST).write_bytes(before)
    (bundle / FILE).write_bytes(b"x" * (bundle / FILE).stat().st_size)
    reseal(bundle)
    assert "not readable" in lime.refuse("verify", bundle)
    reseal(bundle, lambda body: body["files"].pop(FILE))
    error = lime.refuse("verify", bundle, code=EXIT_INPUT)
    assert "holds no golden outputs to compare with hint: export the bundle again" in error


# the commands


def test_inspect_tells_which_targets_route(routed: Make, tiny_bundle: Make, lime: Cli) -> None:
    for bundle, word in ((routed(quant="int4"), "yes"), (tiny_bundle(quant="int4"), "no")):
        row = next(line for line in lime("inspect", bundle).out.splitlines() if "│ onnx" in line)
        assert f"│ {word}" in row, row


def test_the_command(tiny_bundle: Make, tmp_path: Path, lime: Cli) -> None:
    bundle = copy(tiny_bundle(quant="int4"), tmp_path)
    done = lime("verify", bundle, "--threads", 1)
    assert done.code == 0, done.err
    assert "onnx on CPUExecutionProvider: 6 checked, 6 as PyTorch computed them" in done.out
    assert "(int8-dynamic: error at most 0.1, worst 0.25)" in done.out
    done = lime("verify", bundle, "--target", "onnx", "-e", "expert1", "-e", BLEND, "-e", "none", "--json")
    report = json.loads(done.out)
    assert report["passed"] and [check["selection"] for check in report["checks"]] == ["expert1", BLEND, "none"]
    assert report["targets"]["onnx"]["compute"] == "int8-dynamic"
    put_vector(bundle, "expert1", vector(bundle, "expert3"))
    error = lime.refuse("verify", bundle, "--threads", 1, code=3)
    assert "2 of 6 checks missed - onnx, expert1: logits differ" in error
    done = lime("verify", bundle, "--json")
    assert done.code == 3 and not json.loads(done.out)["passed"]


def test_the_summary_counts_what_was_checked(tiny_bundle: Make, tmp_path: Path, lime: Cli) -> None:
    bundle = copy(tiny_bundle(quant="int4"), tmp_path)
    remove_expert(bundle, "expert3")
    done = lime("verify", bundle, "--threads", 1)
    assert done.code == 0 and ": 5 checked, 5 as PyTorch computed them, 1 not checked (" in done.out, done
    assert count_results([Check("coreml", "all", UNCHECKED)]) == "not checked"
    assert count_results([Check("coreml", "all", MISSED)]) == "not as PyTorch computed it"
    assert count_results([Check("onnx", "none", MISSED)]) == "1 checked, 0 as PyTorch computed them"


def test_a_device_verifies_without_torch(tiny_bundle: Make) -> None:
    blocked = "import sys; sys.modules.update(torch=None, transformers=None, onnx=None); "
    code = blocked + "from lime_edge.cli.app import main; main()"
    words = [sys.executable, "-c", code, "verify", str(tiny_bundle(quant="int4")), "--threads", "1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "6 checked, 6 as PyTorch computed them" in done.stdout, done.stderr


def test_golden_outputs_are_small() -> None:
    """16 experts, a blend, none and routed of SmolLM2-135M; a hundred experts cost no more than the budget."""
    for selections, most in ((19, 400_000), (100, 1_600_000)):
        rows = selections * 2 * 4
        columns = choose_columns(49152, rows)
        assert len(set(columns.tolist())) == len(columns) >= 64 and columns.max() < 49152
        assert rows * (len(columns) + 3) * 4 < most


def test_the_weights_are_hashed_once(
    tiny_model: Make, tiny_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    hashing = CompiledModel._weight_hash.func  # type: ignore[attr-defined]

    def count(self: CompiledModel) -> str:
        counted.append(1)
        return hashing(self)

    monkeypatch.setattr(CompiledModel._weight_hash, "func", count)
    out = tmp_path / "x.lime"
    export_bundle(tiny_model(), tiny_adapter(), out, CompileOptions(quant="none"), find_device("cpu"), ExportOptions())
    manifest = Bundle.open(out).manifest
    assert manifest.quantization.weight_hash == manifest.targets["onnx"].weight_hash
    assert len(counted) == 1
