"""The command line as a user meets it: answers, tables, JSON, and one clear error per fault."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from manifests import add_coreml, reseal
from safetensors.numpy import load_file, save_file

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import Expert, read_expert
from lime_edge.bundle.staging import write_file
from lime_edge.checks.inspect import describe_making
from lime_edge.cli import app as cli
from lime_edge.errors import LimeEdgeError

Make = Callable[..., Path]


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str


class Cli:
    """Runs the entry point in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *words: object, text: str | None = None) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["lime-edge", *map(str, words)])
        if text is not None:
            self.monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        self.capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self.capsys.readouterr()
        return Done(code, out, err)

    def refuse(self, *words: object, code: int = 2) -> str:
        """Run a command that must fail with that code and one error; returns the error."""
        done = self(*words)
        assert done.code == code, done
        assert done.err.count("error:") == 1, done.err
        assert "Traceback" not in done.err
        return " ".join(done.err.split())


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


@pytest.fixture
def bundle(tiny_bundle: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle(quant="int4"), tmp_path / "tiny.lime"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [{"prompt": "is it good?", "answer": "yes", "labels": ["yes", "no"]}, {"prompt": "say it", "answer": "it"}]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


# what works


def test_export_then_run(lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    out = tmp_path / "x.lime"
    done = lime("export", tiny_model(), "--adapter", tiny_adapter(), "-o", out, "--quant", "int8", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["quantization"]["quant"] == "int8" and facts["total_bytes"] == Bundle.open(out).total_bytes
    again = lime("run", out, "hello", "--max-new-tokens", 5)
    assert again.code == 0 and again.out.endswith("\n")
    assert lime("run", out, "hello", "--max-new-tokens", 5).out == again.out
    assert "already exists" in lime.refuse("export", tiny_model(), "--adapter", tiny_adapter(), "-o", out)
    assert lime("export", tiny_model(), "--adapter", tiny_adapter(), "-o", out, "--force").code == 0


def test_run_takes_an_expert_a_blend_and_none(lime: Cli, bundle: Path) -> None:
    one, two = Bundle.open(bundle).manifest.experts[:2]
    answers = {
        e: lime("run", bundle, "hello", "--raw", "-e", e, "--max-new-tokens", 8).out
        for e in (one, two, f"{one}=0.5,{two}=0.5", "none")
    }
    assert len(set(answers.values())) >= 3, answers


def test_run_says_when_the_cache_cut_the_answer(lime: Cli, bundle: Path) -> None:
    options = ("--raw", "--max-new-tokens", 40)
    cut = lime("run", bundle, "hello", *options, "--max-length", 24)
    assert cut.code == 0 and "cut short: the cache of 24 tokens is full" in cut.err, cut
    assert "cut short" not in lime("run", bundle, "hello", *options, "--max-length", 128).err


@pytest.mark.parametrize("options", [{}, {"quant": "int8"}, {"quant": "int4"}, {"fold": "expert1"}])
def test_verify_agrees_on_this_machine(lime: Cli, tiny_bundle: Make, options: dict[str, str]) -> None:
    done = lime("verify", tiny_bundle(**options), "--threads", 1)
    assert done.code == 0 and "onnx on CPUExecutionProvider: 6 checked, 6 as PyTorch computed them" in done.out, done


def test_chat_switches_inside_the_conversation(lime: Cli, bundle: Path) -> None:
    one, two = Bundle.open(bundle).manifest.experts[:2]
    text = f"hi\n/cache\n/expert {two}\n/cache\nhi\n/cache\n/expert nobody\n/experts\n/what\n/quit\n"
    done = lime("run", bundle, "-e", one, "--max-new-tokens", 3, "--max-length", 64, text=text)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) >= 2
    lines = done.err.splitlines()
    assert lines[0].startswith(f"using {one}; ")
    lines = [line for line in lines[1:] if not line.startswith("(cut short after 3 tokens")]
    assert len(done.err.splitlines()) - len(lines) == 3, "a line at the top, and one for each answer that was cut"
    assert lines[0].startswith(f"{one}: ") and lines[1].startswith(f"now {two}")
    assert lines[2] == "empty" and lines[3].startswith(f"{two}: ")
    assert "unknown expert 'nobody'" in done.err and "unknown command '/what'" in done.err


def test_inspect_shows_what_is_there(lime: Cli, bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    facts = json.loads(lime("inspect", bundle, "--json").out)
    assert facts["backbone"]["fingerprint"] == manifest.backbone.fingerprint
    assert facts["adapter_id"] == manifest.adapter_id and facts["default"] == manifest.experts[0]
    assert [e["name"] for e in facts["experts"]] == list(manifest.experts)
    assert facts["sum_h"] == sum(site["width"] for site in facts["sites"])
    text = lime("inspect", bundle, "--sites", "--verify").out
    assert f"all {len(manifest.files)} files are as they were written (sha256)" in text
    assert json.loads(lime("inspect", bundle, "--verify", "--json").out)["verified"] is True
    assert "verified" not in facts and "golden outputs" in text
    assert "operators here" in text and "functions run compiled" in text, "built without the operators?"
    assert "as they were written" not in lime("inspect", bundle).out
    for word in (manifest.backbone.fingerprint, manifest.sites.sites[0].name, manifest.experts[0], "int4 symmetric"):
        assert word in text


def test_inspect_says_what_a_target_was_made_for(lime: Cli, bundle: Path) -> None:
    assert describe_making(Bundle.open(bundle).manifest.targets["onnx"]) == ""
    add_coreml(bundle)
    reseal(bundle, lambda body: body["targets"][1].update(routed="routed"))
    rows = {line.split()[1]: line for line in lime("inspect", bundle).out.splitlines() if line.startswith("│ ")}
    assert "cache 1024, prompts 32/128, iOS18, all" in rows["coreml"] and "│ yes" in rows["coreml"], rows["coreml"]
    assert "│ no" in rows["onnx"], rows["onnx"]


def test_experts_are_listed_blended_added_and_removed(lime: Cli, bundle: Path, tmp_path: Path) -> None:
    one, two = Bundle.open(bundle).manifest.experts[:2]
    assert lime("experts", "blend", bundle, f"{one}=0.25,{two}=0.75", "--name", "mix").code == 0
    mixed = read_expert(bundle / "experts" / "mix.safetensors")
    first, second = (read_expert(bundle / "experts" / f"{n}.safetensors").vector.astype(np.float64) for n in (one, two))
    np.testing.assert_allclose(mixed.vector, 0.25 * first + 0.75 * second, rtol=1e-3, atol=1e-4)
    shutil.copy(bundle / "experts" / "mix.safetensors", tmp_path / "new.safetensors")
    assert "opens with" not in lime("experts", "remove", bundle, "mix").err
    assert lime("experts", "add", bundle, tmp_path / "new.safetensors", "--name", "again").code == 0
    names = [row["name"] for row in json.loads(lime("experts", "list", bundle, "--json").out)]
    assert names == [*Bundle.open(bundle, verify=True).manifest.experts] and names[-1] == "again"
    assert "again" in lime("experts", "list", bundle).out
    opened = Bundle.open(bundle).manifest.default
    told = lime("experts", "remove", bundle, opened).err
    assert f"the bundle opened with {opened!r}; now it opens with {Bundle.open(bundle).manifest.default!r}" in told


def test_eval_counts_and_compares(lime: Cli, bundle: Path, data: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    done = lime("eval", bundle, "--data", data, "--json", "--against", bundle, "--answers", answers)
    facts = json.loads(done.out)
    assert facts["count"] == 2 and facts["accuracy"] in (0.0, 0.5, 1.0)
    assert facts["same_answers"] == 1.0 and facts["other_accuracy"] == facts["accuracy"]
    given = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sum(line["correct"] for line in given) == facts["accuracy"] * 2
    assert given[0]["given"] in ("yes", "no")
    assert json.loads(lime("eval", bundle, "--data", data, "--json", "--limit", 1).out)["count"] == 1
    assert "accuracy" in lime("eval", bundle, "--data", data).out


def test_bench_prints_its_schema(lime: Cli, bundle: Path) -> None:
    words = ("bench", bundle, "--prompt-tokens", 8, "--gen-tokens", 4, "--repeat", 2, "--threads", 1)
    facts = json.loads(lime(*words, "--json").out)
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_ms", "peak_rss_bytes", "load_ms"):
        assert facts[key] > 0, key
    assert 0 < facts["switch_us"]["p50"] <= facts["switch_us"]["p95"] <= facts["switch_us"]["p99"]
    assert "switch p50 / p95 / p99" in lime(*words).out


COMMANDS = (
    "",
    "export",
    "import",
    "run",
    "inspect",
    "eval",
    "demo",
    "bench",
    "experts",
    "experts blend",
    "experts export",
    "experts profile",
)


@pytest.mark.parametrize("words", COMMANDS)
def test_help_is_there(lime: Cli, words: str) -> None:
    done = lime(*words.split(), "--help")
    assert done.code == 0 and "Usage: lime-edge" in done.out


def test_help_and_run_import_no_torch() -> None:
    code = "import sys; from lime_edge import cli; sys.argv = ['lime-edge', '--help']\n"
    code += "try: cli.main()\nexcept SystemExit: pass\n"
    code += "bad = {'torch', 'transformers', 'onnxruntime', 'onnx'} & set(sys.modules)\n"
    code += "sys.exit(str(bad) if bad else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# what is refused


def test_damaged_bundles_are_refused(lime: Cli, bundle: Path) -> None:
    graph = bundle / "onnx" / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    assert "onnx/model.onnx: size in bytes" in lime.refuse("run", bundle, "x")
    graph.write_bytes(bytes(len(whole)))
    assert "onnx/model.onnx: sha256" in lime.refuse("inspect", bundle, "--verify")
    assert "onnx/model.onnx: sha256" in lime.refuse("run", bundle, "x")
    reseal(bundle)
    assert "ONNX Runtime cannot load it" in lime.refuse("run", bundle, "x")
    graph.write_bytes(whole)
    reseal(bundle)
    expert = next((bundle / "experts").iterdir())
    expert.write_bytes(expert.read_bytes()[:-8])
    assert f"experts/{expert.name}: size in bytes" in lime.refuse("run", bundle, "x")


def test_bad_experts_are_refused(lime: Cli, bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    good = read_expert(bundle / "experts" / f"{manifest.experts[0]}.safetensors")
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    with_nan = good.vector.copy()
    with_nan[7] = np.nan
    cases = {
        "length: expected": Expert("new", good.vector[:-1], good.adapter_id),
        "NaN or infinite": Expert("new", with_nan, good.adapter_id),
        "adapter_id: expected": Expert("new", good.vector, "0" * 64),
        "already": good,
    }
    for message, expert in cases.items():
        (tmp_path / "new.safetensors").write_bytes(expert.to_bytes())
        error = lime.refuse("experts", "add", bundle, tmp_path / "new.safetensors")
        assert message in error or (message == "already" and "exists already" in error)
    (tmp_path / "new.safetensors").write_bytes(good.to_bytes()[:-3])
    assert "bytes of numbers: expected" in lime.refuse("experts", "add", bundle, tmp_path / "new.safetensors")
    assert "no such expert file" in lime.refuse("experts", "add", bundle, tmp_path / "none.safetensors")
    assert before == {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def test_unknown_names_are_refused_with_the_known(lime: Cli, bundle: Path, data: Path) -> None:
    known = ", ".join(Bundle.open(bundle).manifest.experts)
    for words in (("run", bundle, "x", "-e", "nobody"), ("eval", bundle, "--data", data, "-e", "nobody")):
        assert f"unknown expert 'nobody' hint: installed experts: {known}" in lime.refuse(*words)
    assert "sum to 0.5" in lime.refuse("run", bundle, "x", "-e", f"{known.split(',')[0]}=0.5")
    assert "unknown expert" in lime.refuse("experts", "remove", bundle, "nobody")
    assert "found 'coreball'" in lime.refuse("run", bundle, "x", "--target", "coreball")


def test_bad_export_options_are_refused(lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    words = ("export", tiny_model(), "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime")
    for more, message in (
        (("--quant", "int3"), "--quant: expected none, int8, int4, found 'int3'"),
        (("--group-size", 24), "power of two"),
        (("--fold", "nobody"), "--fold: expected shared, none or an expert's name, found 'nobody'"),
        (("--single",), "--single: needs an expert's name in --fold"),
        (("--device", "toaster"), "--device: expected cpu"),
        (("--target", "toaster"), "target: expected onnx"),
        (("--rounding", "down"), "--rounding: expected"),
        (("--keep-int8", "tail"), "--keep-int8: expected none or some of"),
    ):
        error = lime.refuse(*words, *more)
        assert message in error and "hint: " in error
        assert list(tmp_path.iterdir()) == []


def test_an_unknown_fold_is_refused_before_the_model_is_read(
    lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lime_edge.compiler import kinds
    from lime_edge.export import pipeline

    monkeypatch.setattr(pipeline, "read_checkpoint", lambda *_: pytest.fail("the model was read"))
    for kind in kinds.KINDS:
        monkeypatch.setattr(pipeline, "find_kind", lambda _, kind=kind: kind)
        words = ("export", tiny_model(), "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime", "--fold", "nobody")
        assert "--fold: expected shared, none or an expert's name, found 'nobody'" in lime.refuse(*words)
        assert "hint: experts of this adapter: expert0, expert1" in lime.refuse(*words)


def test_what_is_no_adapter_is_named_in_one_message(
    lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path
) -> None:
    fixture = Path(__file__).parent / "fixtures" / "conformance" / "models" / "llama-lora-auto"

    def refuse(adapter: Path) -> str:
        return lime.refuse("export", tiny_model(), "--adapter", adapter, "-o", tmp_path / "x.lime")

    assert "a whole checkpoint and not an adapter hint: lime-edge import CHECKPOINT" in refuse(fixture)
    encoder = Path(shutil.copytree(fixture.with_name("bert-lora-cls"), tmp_path / "encoder"))
    config = json.loads((encoder / "config.json").read_text()) | {"architectures": ["BertForSequenceClassification"]}
    (encoder / "config.json").write_text(json.dumps(config))
    for whole, what in ((fixture, "a backbone"), (encoder, "a model")):
        error = lime.refuse("export", whole, "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime")
        assert f"holds a whole checkpoint of the LiME authors' code, not {what} hint: lime-edge import" in error
    folder = Path(shutil.copytree(tiny_adapter(), tmp_path / "folder"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    shutil.copy(fixture / "model.safetensors", weights)
    assert "holds a whole checkpoint of the LiME authors' code, not an adapter hint: lime-edge import" in refuse(folder)
    save_file({f"{name}.lora_A.weight": tensor for name, tensor in tensors.items()}, weights)
    assert f"holds a PEFT LoRA, not a LiME adapter hint: lime-edge import {folder} -o" in refuse(folder)
    save_file({name: tensor for name, tensor in tensors.items() if name.endswith(".LiMEs")}, weights)
    error = refuse(folder)
    assert "holds expert vectors alone" in error and f"hint: lime-edge experts add BUNDLE {folder}" in error


def test_an_adapter_for_another_model_is_refused(
    lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path
) -> None:
    other = tiny_model(hidden_size=32)
    error = lime.refuse("export", other, "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime")
    assert "does not fit" in error and "(H, D): expected (32, 32), found (64, 64)" in error and "faults" in error
    adapter = Path(shutil.copytree(tiny_adapter(), tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_fingerprint"] = "0" * 64
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    error = lime.refuse("export", tiny_model(), "--adapter", adapter, "-o", tmp_path / "x.lime")
    assert "base_fingerprint: expected 0000" in error
    assert not (tmp_path / "x.lime").exists()


def test_all_faults_of_a_model_are_reported_at_once(
    lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    names = sorted(name for name in tensors if name.endswith("proj.weight"))
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]][:-1]
    tensors[names[2]] = np.full_like(tensors[names[2]], np.nan)
    tensors["model.extra.weight"] = np.ones(3, np.float32)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, model / "model.safetensors")
    error = lime.refuse("export", model, "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime")
    for message in (
        "4 faults",
        f"tensor {names[0]} is missing",
        f"tensor {names[1]}: expected",
        f"{names[2]} holds NaN",
        "model.extra.weight is not part of a llama model",
    ):
        assert message in error
    (model / "model.safetensors").write_bytes(b"x" * 20)
    assert "not a readable safetensors file" in lime.refuse(
        "export", model, "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime"
    )
    (model / "model.safetensors").unlink()
    assert "model.safetensors is missing" in lime.refuse(
        "export", model, "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime"
    )


def test_models_we_cannot_build_are_refused(lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    words = ("export", model, "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime")
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "model_type: gpt2 is not supported: an older design" in lime.refuse(*words)
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert "hidden_act: expected silu or gelu or" in lime.refuse(*words)
    (model / "config.json").write_text("{")
    assert "config.json: not a readable JSON file" in lime.refuse(*words)
    assert "no such file or directory" in lime.refuse("export", tmp_path / "no", *words[2:])
    (tmp_path / "fake.gguf").write_bytes(b"not gguf")
    assert "not a GGUF file" in lime.refuse("export", tmp_path / "fake.gguf", *words[2:])


def test_a_missing_tokenizer_is_refused(lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    (model / "tokenizer.json").unlink()
    words = ("export", model, "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime")
    assert "tokenizer.json is missing" in lime.refuse(*words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert lime(*words, "--no-tokenizer").code == 0
    assert "the tokenizer is missing" in lime.refuse("run", tmp_path / "x.lime", "hello")


def test_bad_evaluation_data_is_refused(lime: Cli, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "x"}\nnot json\n{"prompt": "x", "answer": "z", "labels": ["a"]}\n')
    error = lime.refuse("eval", bundle, "--data", file)
    assert "3 faults" in error and "line 1" in error and "line 2" in error and "one of ['a']" in error
    file.write_text("")
    assert "no examples" in lime.refuse("eval", bundle, "--data", file)
    file.write_text('{"prompt": "x", "answer": "ab", "labels": ["ab", "ab"]}')
    assert "do not differ in their first token" in lime.refuse("eval", bundle, "--data", file)


# storage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 200 kB."""
    yield from mount(tmp_path / "disk", "size=200k")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    yield from mount(tmp_path / "disk", "ro")


def mount(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_leaves_nothing(lime: Cli, tiny_model: Make, tiny_adapter: Make, small_disk: Path) -> None:
    words = ("export", tiny_model(), "--adapter", tiny_adapter(), "-o", small_disk / "x.lime", "--quant", "none")
    assert "the disk is full" in lime.refuse(*words, code=5)
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    (small_disk / "lime.json").write_bytes(b"old")
    with pytest.raises(LimeEdgeError, match="the disk is full"):
        write_file(small_disk / "lime.json", bytes(300_000))
    assert {p.name: p.read_bytes() for p in small_disk.iterdir()} == {"lime.json": b"old"}


def test_a_read_only_place_is_refused(lime: Cli, tiny_model: Make, tiny_adapter: Make, read_only: Path) -> None:
    words = ("export", tiny_model(), "--adapter", tiny_adapter(), "-o", read_only / "x.lime")
    assert "the file system is read-only" in lime.refuse(*words, code=5)


# encoders


def test_an_encoder_is_exported_and_opened(lime: Cli, tmp_path: Path) -> None:
    from lime_edge.session.encoder import EncoderSession

    fixture = Path(__file__).parent / "fixtures" / "conformance" / "models" / "bert-lora-cls"
    assert lime("import", fixture, "-o", tmp_path / "imported").code == 0
    out = tmp_path / "bert.lime"
    backbone, adapter = tmp_path / "imported" / "backbone", tmp_path / "imported" / "adapter"
    done = lime("export", backbone, "--adapter", adapter, "-o", out, "--quant", "none", "--no-tokenizer")
    assert done.code == 0 and "BertForSequenceClassification" in done.out, done
    session = lime_edge.open(out, threads=1)
    assert isinstance(session, EncoderSession)
    expected = load_file(fixture / "expected.safetensors")
    inputs = {name.removeprefix("in."): value for name, value in expected.items() if name.startswith("in.")}
    session.use("routed")
    np.testing.assert_allclose(session.run(**inputs)["logits"], expected["logits"], atol=1e-3)
    assert "holds an encoder" in lime.refuse("run", out, "hello")
