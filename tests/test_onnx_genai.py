"""Stock ONNX Runtime GenAI on a bundle's onnx/ directory: the same tokens, experts switched with its own API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import torch
from conftest import Make
from families import FAMILY_CASES
from models import ALL_LINEARS, CASES, EOS, draw_ids, load_model, load_sites
from msgspec import structs
from test_variants import make_prompt_adapter

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.change import add_experts, remove_expert
from lime_edge.bundle.companions import encode_onnx_adapter
from lime_edge.bundle.experts import Expert
from lime_edge.bundle.fields import DecoderFacts, Manifest
from lime_edge.bundle.golden import FILE as GOLDEN
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.exporters.onnx.genai import CONFIG, describe_config
from lime_edge.session.generate import GenerationOptions
from lime_edge.targets.devices import find_device
from lime_edge.targets.entries import OnnxOptions

LENGTH, NEW = 12, 16  # beyond the windows of CASES
IDS = draw_ids(LENGTH, seed=3)[0].tolist()
GENAI = ("genai",)
MODELS = {**CASES, **FAMILY_CASES}
FAMILIES = (
    *("llama-tied", "llama-yarn", "mistral-window", "qwen2-sliding", "qwen3", "smollm3"),
    *("gemma2", "phi3", "cohere2"),
)


@pytest.fixture(autouse=True)
def _as_genai_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions without our operators, which GenAI has not: in a quantized model their rounding may move a token."""
    monkeypatch.setenv("LIME_EDGE_OPERATORS", "0")


class Stock:
    """onnxruntime-genai as its users call it: a model, its adapters, one generator a sequence."""

    def __init__(self, bundle: Path):
        self.model = og.Model(str(bundle / "onnx"))
        self.adapters = og.Adapters(self.model)
        self.names = sorted(file.stem for file in (bundle / "onnx").glob("*.onnx_adapter"))
        for name in self.names:
            self.adapters.load(str(bundle / "onnx" / f"{name}.onnx_adapter"), name)

    def open(self, name: str | None, ids: Sequence[int] = IDS) -> og.Generator:
        """A generator that has read the prompt."""
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(ids) + NEW)
        generator = og.Generator(self.model, parameters)
        if name is not None:
            generator.set_active_adapter(self.adapters, name)
        generator.append_tokens(np.array(ids, np.int32))
        return generator

    def answer(self, name: str | None, ids: Sequence[int] = IDS) -> list[int]:
        """Greedy tokens, up to NEW or the end of the text."""
        generator = self.open(name, ids)
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def answer_with_session(bundle: Path, name: str | None) -> list[int]:
    session = lime_edge.open_decoder(bundle, threads=1)
    if name is not None:
        session.use(None if name == "none" else name)
    return list(session.generate_ids(IDS, GenerationOptions(NEW)))


def answer_with_transformers(unfolded: UnfoldedModel, name: str) -> list[int]:
    """Greedy tokens of `transformers` with its layers unfolded, the whole sequence each time."""
    unfolded.use(None if name == "none" else int(name.removeprefix("expert")))
    sequence = list(IDS)
    while len(sequence) < LENGTH + NEW and (len(sequence) == LENGTH or sequence[-1] != EOS):
        sequence.append(int(unfolded.logits({"input_ids": torch.tensor([sequence])})[0, -1].argmax()))
    return sequence[LENGTH:]


def build(name: str, tiny_model: Make, tiny_adapter: Make, **changes: Any) -> tuple[Path, Path]:
    case = CASES[name]
    model = tiny_model(case.family, **case.changes)
    return model, tiny_adapter(model, targets=case.targets, shared=case.shared, **changes)


@pytest.mark.parametrize("fold", ["shared", "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_transformers(
    name: str, fold: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """Every expert and the original model; without an adapter, what was folded."""
    case = MODELS[name]
    untied = {"tie_word_embeddings": False} if name == "gemma2" else {}  # tied, it repeats the last token, whoever asks
    model = tiny_model(case.family, **{**case.changes, **untied})
    adapter = tiny_adapter(model, targets=case.targets, shared=case.shared)
    unfolded = UnfoldedModel(load_model(model), *load_sites(adapter))
    stock = Stock(tiny_bundle(model, adapter, fold=fold, companions=GENAI))
    assert stock.names == ["expert0", "expert1", "expert2", "expert3", "none"]
    answers = {expert: stock.answer(expert) for expert in stock.names}
    for expert, found in answers.items():
        assert found == answer_with_transformers(unfolded, expert), f"{name}, fold {fold}, {expert}"
    assert len(set(map(tuple, answers.values()))) == len(answers), "the experts answer differently"
    assert (stock.answer(None) == answers["none"]) == (fold == "none")


@pytest.mark.parametrize("variant", ["dora", "slicefine"])
def test_variants_that_cannot_be_switched_off(
    variant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """There is no adapter of the original model; SliceFine's neutral vector is ones."""
    model = tiny_model("llama")
    adapter = tiny_adapter(model, targets=(*ALL_LINEARS, "embed_tokens"), variant=variant, experts=3)
    unfolded = UnfoldedModel(load_model(model), *load_sites(adapter))
    stock = Stock(tiny_bundle(model, adapter, companions=GENAI))
    assert stock.names == ["expert0", "expert1", "expert2"]
    answers = [stock.answer(expert) for expert in stock.names]
    assert answers == [answer_with_transformers(unfolded, expert) for expert in stock.names]
    assert len(set(map(tuple, answers))) == 3


@pytest.mark.parametrize("options", [{"quant": "int4"}, {"quant": "int8"}, {"quant": "int4", "fold": "expert1"}])
def test_quantized_tokens_equal_the_sessions(options: dict[str, Any], tiny_bundle: Make) -> None:
    bundle = tiny_bundle(companions=GENAI, **options)
    stock = Stock(bundle)
    for name in stock.names:
        assert stock.answer(name) == answer_with_session(bundle, name), f"{options}, {name}"
    if "fold" in options:
        assert stock.answer(None) == stock.answer("expert1")


def test_a_single_expert_needs_no_adapter(tiny_bundle: Make) -> None:
    bundle = tiny_bundle(fold="expert1", single=True, companions=GENAI)
    stock = Stock(bundle)
    assert stock.names == []
    assert stock.answer(None) == answer_with_session(bundle, None)


def test_switching_in_the_middle(tiny_bundle: Make) -> None:
    """One generator, four adapters in turn: what a session does with keep_cache=True."""
    bundle = tiny_bundle(companions=GENAI)
    session, stock = lime_edge.open_decoder(bundle, threads=1), Stock(bundle)
    generator = stock.open("expert0")
    session.use("expert0")
    logits: np.ndarray | None = session.logits(IDS, keep=1)
    found: list[int] = []
    wanted: list[int] = []
    for name in ("expert0", "expert2", "none", "expert3"):
        generator.set_active_adapter(stock.adapters, name)
        session.use(None if name == "none" else name, keep_cache=True)
        for _ in range(3):
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
            logits = session.extend(wanted[-1:]) if logits is None else logits
            wanted.append(int(logits[-1].argmax()))
            logits = None  # a token is run when the next one is asked for
    assert found == wanted and EOS not in found


def test_text_goes_through_the_bundles_tokenizer(tiny_bundle: Make) -> None:
    """Which is stored once: the config points at it."""
    bundle = tiny_bundle(companions=GENAI)
    tokenizer, codec = og.Tokenizer(og.Model(str(bundle / "onnx"))), lime_edge.open_decoder(bundle).codec
    messages = [{"role": "user", "content": "What is it? Tell me, please."}]
    prompt = codec.render_chat(messages)
    assert tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True) == prompt
    assert tokenizer.encode(prompt).tolist() == codec.encode(prompt)
    assert list(tokenizer.eos_token_ids) == [EOS]
    assert not list((bundle / "onnx").glob("tokenizer*"))


def test_experts_that_come_and_go(tiny_bundle: Make, tmp_path: Path) -> None:
    """An expert added on a device gets its adapter, a replaced one a new one; a removed one loses it."""
    bundle = shutil.copytree(tiny_bundle(companions=GENAI), tmp_path / "x.lime")
    bank = Bundle.open(bundle).open_bank()
    mixed = bank.mix({"expert0": 1.5, "expert1": -0.5})
    add_experts(bundle, [Expert("late", mixed, bank.adapter_id)])
    add_experts(bundle, [Expert("expert2", mixed, bank.adapter_id)], replace=True)
    remove_expert(bundle, "expert3")
    files = Bundle.open(bundle, verify=True).manifest.companions["genai"].experts
    assert sorted(files) == ["expert0", "expert1", "expert2", "late", "none"]
    stock = Stock(bundle)
    new = Path(files["expert2"]).stem
    assert stock.names == sorted(Path(file).stem for file in files.values()) and new.startswith("expert2-")
    for name in files:
        assert stock.answer(Path(files[name]).stem) == answer_with_session(bundle, name), name
    assert stock.answer("late") == stock.answer(new) != stock.answer("expert0")


def test_only_when_asked_for(tiny_bundle: Make) -> None:
    """A bundle holds nothing for GenAI by itself, and the same bytes where it does."""
    plain, asked = Bundle.open(tiny_bundle()), Bundle.open(tiny_bundle(companions=GENAI))
    assert plain.manifest.companions == {} and list(asked.manifest.companions) == ["genai"]
    more = asked.manifest.files.keys() - plain.manifest.files.keys()
    adapters = {f"onnx/{name}.onnx_adapter" for name in (*asked.manifest.experts, "none")}
    assert more == {"onnx/genai.onnx", f"onnx/{CONFIG}"} | adapters, "all of them have a hash"
    other = {name for name, entry in plain.manifest.files.items() if asked.manifest.files[name] != entry}
    assert other <= {GOLDEN}, "torch may sum in another order"
    assert replace_companions(asked.manifest) == replace_companions(plain.manifest)


def replace_companions(manifest: Manifest) -> Manifest:
    """Without what a companion adds and what two exports never share."""
    return structs.replace(manifest, companions={}, files={}, manifest_sha256="0" * 64, export=None)


def test_what_genai_cannot_run_is_refused(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    """Virtual tokens are an input that it knows nothing of; nothing is written. Without it the bundle is whole."""
    model, output = tiny_model("llama"), tmp_path / "x.lime"
    prompt = make_prompt_adapter(tmp_path / "adapter", model, input_conditioned=False)
    compiling, cpu = CompileOptions(quant="none"), find_device("cpu")
    wanted = ExportOptions(companions=GENAI)
    half = replace(wanted, target_options={"onnx": OnnxOptions("float16")})
    for adapter, options, problem in (
        (prompt, wanted, "GenAI cannot run a prompt-tuning adapter"),
        (tiny_adapter(model), half, "needs `activations=float32`, found float16"),
        (tiny_adapter(model), replace(wanted, companions=("llama",)), "`companion`: expected genai, found 'llama'"),
        (
            tiny_adapter(model),
            replace(wanted, targets=("executorch",)),
            "expected none with target executorch, found 'genai'",
        ),
    ):
        with pytest.raises(LimeEdgeError, match=problem):
            export_bundle(model, adapter, output, compiling, cpu, options)
        assert not output.exists()
    export_bundle(model, prompt, output, compiling, cpu, ExportOptions())
    bank = Bundle.open(output).open_bank()
    add_experts(output, [Expert("late", bank.vector("expert0"), bank.adapter_id)])
    assert sorted(file.name for file in (output / "onnx").iterdir()) == ["model.onnx", "model.onnx.data"]


def test_a_model_without_an_end_token(tiny_bundle: Make, tmp_path: Path) -> None:
    """GenAI goes on to its max_length."""
    bundle = shutil.copytree(tiny_bundle(companions=GENAI), tmp_path / "x.lime")
    manifest = Bundle.open(bundle).manifest
    config = describe_config(manifest.backbone, DecoderFacts(heads=4, kv_heads=2, head_dim=16), 1, has_tokenizer=True)
    (bundle / "onnx" / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert len(Stock(bundle).answer("expert0")) == NEW
    assert config["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 1


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 46080])
def test_adapter_bytes_are_those_of_onnxruntime(count: int, tmp_path: Path) -> None:
    residual = np.random.default_rng(count).normal(size=count).astype(np.float32)
    wanted, file = ort.AdapterFormat(), tmp_path / "wanted.onnx_adapter"
    wanted.set_adapter_version(1)
    wanted.set_model_version(1)
    wanted.set_parameters({"expert": ort.OrtValue.ortvalue_from_numpy(residual[None])})
    wanted.export_adapter(str(file))
    assert encode_onnx_adapter(residual) == file.read_bytes()
