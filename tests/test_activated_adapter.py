"""Adapters that act from the generation prompt on, from their configuration to the answers of a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import load_model, load_sites
from test_cli import Cli
from test_importing import LIMIT, make_peft, unfold, worst
from test_variants import make_prompt_adapter
from test_vectors import make_folder

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import Selection
from lime_edge.bundle.fields import Always, FromGenerationPrompt
from lime_edge.bundle.golden import read_golden
from lime_edge.bundle.vectors import read_vectors
from lime_edge.checks.verify import verify_bundle
from lime_edge.compiler.formats.activation import count_header
from lime_edge.compiler.formats.adapter import read_adapter
from lime_edge.compiler.formats.hyper import ImportOptions
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.formats.interchange import export_expert
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.errors import LimeEdgeError
from lime_edge.session.cache import Segment
from lime_edge.session.generate import GenerationOptions

Make = Callable[..., Path]
HEADER = 4
GIVEN = {"kind": "generation_prompt", "tokens": HEADER}
SELECTIONS: dict[str, tuple[Selection, Any]] = {
    "expert0": ("expert0", 0),
    "expert3": ("expert3", 3),
    "blend": ({"expert1": 0.7, "expert2": 0.3}, {1: 0.7, 2: 0.3}),
    "none": (None, None),
}


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Make, model: Path) -> Path:
    return tiny_adapter(model, activation=GIVEN)


def reference(model: Path, adapter: Path, header: int = HEADER) -> UnfoldedModel:
    """transformers' model with unfolded layers."""
    return UnfoldedModel(load_model(model), *load_sites(adapter), header=header)


def draw(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (1, count), generator=torch.Generator().manual_seed(seed))


def test_the_reference_is_a_mask(model: Path, adapter: Path) -> None:
    """Two calls with a cache are one call whose first positions get the frozen output."""
    ids, split = draw(11), reference(model, adapter)
    masked = UnfoldedModel(load_model(model), *load_sites(adapter))
    for _, mode in SELECTIONS.values():
        split.use(mode)
        masked.use(mode)
        for layer in masked.layers.values():
            layer.attention_mask = (torch.arange(11) >= 11 - HEADER)[None]
        with torch.no_grad():
            wanted = masked.model(input_ids=ids).logits
        torch.testing.assert_close(split.logits({"input_ids": ids}), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fold", ["shared", "none", "expert0"])
def test_a_bundle_answers_as_the_unfolded_model(fold: str, model: Path, adapter: Path, tiny_bundle: Make) -> None:
    bundle, unfolded = tiny_bundle(model, adapter, fold=fold), reference(model, adapter)
    always = reference(model, adapter, header=0)
    session, options = lime_edge.open_decoder(bundle, threads=1), GenerationOptions(8, ignore_eos=True)
    assert session.bundle.manifest.activation == FromGenerationPrompt(tokens=HEADER)
    for name, (selection, mode) in SELECTIONS.items():
        for length in (2, HEADER, HEADER + 1, 20):
            ids = draw(length, seed=length)
            session.use(selection)
            unfolded.use(mode)
            always.use(mode)
            wanted = unfolded.logits({"input_ids": ids})[0].numpy()
            found = session.logits(ids[0].tolist())
            np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4, err_msg=f"{name}, {length} tokens")
            acts = selection is not None and length > HEADER
            differs = float((always.logits({"input_ids": ids}) - torch.from_numpy(wanted)).abs().max())
            assert (differs > 0.1) == acts, (name, length, differs)
            tokens = unfolded.generate(ids, 8)[0, length:].tolist()
            assert list(session.generate_ids(ids[0].tolist(), options)) == tokens, name
    prompts = [draw(5 + 3 * number, seed=number)[0].tolist() for number in range(len(SELECTIONS))]
    requests = [(prompt, selection) for prompt, (selection, _) in zip(prompts, SELECTIONS.values(), strict=True)]
    rows: dict[int, list[int]] = {}
    for row, token in session.generate_many_ids(requests, options):
        rows.setdefault(row, []).append(token)
    for row, (prompt, (_, mode)) in enumerate(zip(prompts, SELECTIONS.values(), strict=True)):
        unfolded.use(mode)
        assert rows[row] == unfolded.generate(torch.tensor([prompt]), 8)[0, len(prompt) :].tolist()


@pytest.mark.check
@pytest.mark.parametrize("target", ["executorch", "coreml"])
def test_other_targets_follow_it(target: str, model: Path, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """The expert, and where there is routing the program, changes between two calls on one cache."""
    adapter = tiny_adapter(model, activation=GIVEN, routing={"top_k": 2})
    session = lime_edge.open_decoder(tiny_bundle(model, adapter, targets=(target,)), target=target, threads=1)
    unfolded = reference(model, adapter)
    for selection, mode in (("expert0", 0), ({"expert1": 0.7, "expert2": 0.3}, {1: 0.7, 2: 0.3}), ("routed", "routed")):
        session.use(selection)
        unfolded.use(mode)
        for length in (3, 12):
            ids = draw(length, seed=length)
            wanted = unfolded.generate(ids, 6)[0, length:].tolist()
            assert list(session.generate_ids(ids[0].tolist(), GenerationOptions(6, ignore_eos=True))) == wanted
        assert session.cache[0].selection == "none"


def test_a_routed_header(model: Path, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """Routing weighs the header, in one call of its own."""
    adapter = tiny_adapter(model, activation=GIVEN, routing={"top_k": 2, "gamma_routing": 0.3})
    session = lime_edge.open_decoder(tiny_bundle(model, adapter), threads=1)
    unfolded = reference(model, adapter)
    session.use("routed")
    for length in (3, 15):
        ids = draw(length, seed=length)
        wanted = unfolded.generate(ids, 8)[0, length:].tolist()
        assert list(session.generate_ids(ids[0].tolist(), GenerationOptions(8, ignore_eos=True))) == wanted
    assert [segment.selection for segment in session.cache] == ["none", "routed"]
    assert session.cache[0] == Segment("none", 15 - HEADER)
    assert not verify_bundle(session.bundle.path).missed


def test_golden_outputs_and_verify_follow_it(model: Path, adapter: Path, tiny_bundle: Make, tmp_path: Path) -> None:
    """A bundle that forgot it has other answers, and verify says so."""
    bundle = Path(shutil.copytree(tiny_bundle(model, adapter, quant="int8"), tmp_path / "b.lime"))
    golden = read_golden(Bundle.open(bundle))
    assert golden is not None and golden.calls["input_ids"].shape[-1] > HEADER
    report = verify_bundle(bundle)
    assert not report.missed and {check.selection for check in report.checks} >= {"expert0", "none"}
    from lime_edge.session import decoder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "find_header", lambda _: 0)
        assert verify_bundle(bundle).missed


def test_stock_genai_is_refused(lime: Cli, model: Path, adapter: Path, tmp_path: Path) -> None:
    """Its adapters act on every token."""
    words = (
        "export",
        model,
        "--adapter",
        adapter,
        "-o",
        tmp_path / "out.lime",
        "--quant",
        "none",
        "--companion",
        "genai",
    )
    assert "GenAI's adapters act on every token" in lime.refuse(*words, "--quiet")
    assert not (tmp_path / "out.lime").exists()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("sometimes", 'activation: expected "always" or'),
        ({"kind": "generation_prompt"}, "tokens"),
        ({"kind": "generation_prompt", "tokens": 0}, ">= 1"),
        ({"kind": "never"}, "never"),
        ({"kind": "generation_prompt", "tokens": 3, "test": "x"}, "test"),
        (3, "activation: expected dict or str, found 3"),
    ],
    ids=str,
)
def test_what_is_no_activation_is_refused(given: Any, why: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(LimeEdgeError, match=why):
        read_adapter(write(adapter, tmp_path / "a", activation=given))


def write(adapter: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an adapter with another configuration."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_always_may_be_said(adapter: Path, tmp_path: Path) -> None:
    for number, given in enumerate(("always", {"kind": "always"})):
        read = read_adapter(write(adapter, tmp_path / str(number), activation=given))
        assert read.activation == Always() and count_header(read) == 0


@pytest.mark.parametrize("variant", ["dora", "slicefine"])
def test_what_cannot_be_switched_off_is_refused(variant: str, model: Path, tiny_adapter: Make) -> None:
    with pytest.raises(LimeEdgeError, match=f"activation: a {variant} adapter cannot be switched off"):
        read_adapter(tiny_adapter(model, variant=variant, activation=GIVEN))


def test_prompt_tuning_is_refused(model: Path, tmp_path: Path) -> None:
    made = make_prompt_adapter(tmp_path / "prompt", model)
    with pytest.raises(LimeEdgeError, match="a prompt_tuning adapter cannot be switched off"):
        read_adapter(write(made, tmp_path / "a", activation=GIVEN))


def test_the_text_has_as_many_tokens_as_it_says(model: Path, adapter: Path, tmp_path: Path, tiny_bundle: Make) -> None:
    text = "<|im_start|>assistant\n"
    count = len(lime_edge.open_decoder(tiny_bundle(model, adapter)).codec.encode(text))
    right = write(adapter, tmp_path / "right", activation=GIVEN | {"tokens": count, "text": text})
    made = Bundle.open(tiny_bundle(model, right)).manifest
    assert made.activation == FromGenerationPrompt(tokens=count, text=text)
    wrong = write(adapter, tmp_path / "wrong", activation=GIVEN | {"tokens": count + 1, "text": text})
    with pytest.raises(LimeEdgeError, match=f"expected {count + 1} tokens, found {count}"):
        tiny_bundle(model, wrong)


def test_a_later_expert_must_act_alike(model: Path, adapter: Path, tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle(model, adapter))
    assert [one.name for one in read_vectors(make_folder(adapter, tmp_path / "alike", bundle), bundle)] == ["later"]

    def forget(config: dict[str, Any], tensors: Mapping[str, Any]) -> None:
        del config["activation"]

    with pytest.raises(LimeEdgeError, match="activation: expected from the prompt's last 4 tokens on, found always"):
        read_vectors(make_folder(adapter, tmp_path / "other", bundle, forget), bundle)


# other formats


def test_an_activated_lora_of_peft_is_imported_where_it_is_said(tmp_path: Path) -> None:
    """peft's own logits, whose adapter acts from its invocation tokens on, here the prompt's last three."""
    base, directory, ids, wanted = make_peft(tmp_path, alora_invocation_tokens=[9, 10, 11], task_type="CAUSAL_LM")
    with pytest.raises(LimeEdgeError, match="alora_invocation_tokens: 3 tokens from which on it acts"):
        import_checkpoint(directory, tmp_path / "out", ImportOptions(model=base))
    said = {"activation": {"kind": "generation_prompt", "tokens": 3}}
    import_checkpoint(directory, tmp_path / "out", ImportOptions(model=base, hyper=said))
    adapter = read_checkpoint(base, tmp_path / "out/adapter").adapter
    assert count_header(adapter) == 3
    model = unfold(transformers.LlamaForCausalLM.from_pretrained(base), adapter)
    model.use(0)
    always = model.logits({"input_ids": ids})
    model.header = 3
    assert worst(wanted, model.logits({"input_ids": ids})) <= LIMIT < worst(wanted, always)


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_it_leaves_as_no_plain_lora(form: str, model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(LimeEdgeError, match="act from the generation prompt on"):
        export_expert(adapter, "expert0", form, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
