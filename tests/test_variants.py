"""Every variant and every selection, exported: pinned and routed equal the unfolded reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import ALL_LINEARS, draw_ids, load_model, load_sites
from safetensors.torch import load_file, save_file

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.adapter_checks import name_selection
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths.layers import Mode, fix_weights
from lime_edge.compiler.maths.prompt_tuning import compute_prompt, prepend_prompt, route_conditioned, route_static
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.maths.variants import find_variant
from lime_edge.compiler.model.decoder import Cache, DecoderModule
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions

Make = Callable[..., Path]
VARIANTS = ("lora", "lora_fa", "dora", "slicefine")
ROUTINGS: dict[str, dict[str, Any]] = {
    "soft": {"top_k": 2},
    "hard": {"top_k": 3, "soft_topk": False, "temperature": 0.5},
    "auto": {"auto_topk": True, "auto_topk_threshold": 0.6, "soft_topk_temperature": 0.2, "gamma_routing": 0.7},
    "sparse-1": {"top_k": 1, "sparse_mode": True},
    "sparse-2": {"top_k": 2, "sparse_mode": True, "n_gram": 2},
    "sparse-auto": {"top_k": 2, "sparse_mode": True, "auto_topk": True, "temperature": 0.3},
    "windows": {"top_k": 2, "n_gram": 3, "gamma_routing": 0.0},
    "adapted": {"top_k": 2, "gamma_routing": 1.0},
}
IDS = draw_ids(13, seed=5)[0].tolist()
NEW = 8


def build(tiny_model: Make, tiny_adapter: Make, **changes: Any) -> tuple[Path, Path]:
    model = tiny_model("qwen2")
    return model, tiny_adapter(model, **({"rank": 6, "experts": 5, "shared": True} | changes))


def unfold(model: Path, adapter: Path) -> UnfoldedModel:
    return UnfoldedModel(load_model(model), *load_sites(adapter))


def assert_close(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    worst = float((np.abs(found - wanted) / (1e-4 + 1e-4 * np.abs(wanted))).max())
    assert worst <= 1, f"{what}: error is {worst:.3g} times the tolerance"


def check_session(session: Session, reference: UnfoldedModel, what: str) -> None:
    """Routed prompt, then token by token; every expert and a blend pinned; and what routing changes."""
    names = session.experts
    modes: dict[Any, Mode] = {"routed": "routed", names[0]: 0, names[3]: 3}
    seen = []
    for selection, mode in modes.items():
        session.use(selection)
        reference.use(mode)
        wanted = reference.logits({"input_ids": torch.tensor([IDS])})[0].numpy()
        assert_close(session.logits(IDS), wanted, f"{what}, {selection}")
        seen.append(wanted)
        tokens = reference.generate(torch.tensor([IDS]), NEW)[0].tolist()[len(IDS) :]
        found = list(session.generate_ids(IDS, GenerationOptions(NEW, ignore_eos=True)))
        assert found == tokens, f"{what}, {selection}"
    assert np.abs(seen[0] - seen[1]).max() > 0.01, "routing must matter, or this proves nothing"


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_variants(variant: str, routing: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(tiny_model, tiny_adapter, variant=variant, routing=ROUTINGS[routing])
    reference = unfold(model, adapter)
    check_session(lime_edge.open_decoder(tiny_bundle(model, adapter), threads=1), reference, f"{variant}, {routing}")


@pytest.mark.parametrize("fold", ["none", "expert1"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_folds_do_not_matter(variant: str, fold: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(tiny_model, tiny_adapter, variant=variant, routing=ROUTINGS["auto"])
    session = lime_edge.open_decoder(tiny_bundle(model, adapter, fold=fold), threads=1)
    check_session(session, unfold(model, adapter), f"{variant}, fold {fold}")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_embedding_sites(
    family: str, variant: str, tied: bool, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """The table folds; a tied head keeps the old one; a family's constants are in the layers."""
    constants = {"embedding_multiplier": 3.0, "logits_scaling": 1.7, "attention_multiplier": 0.4}
    changes = constants | {"residual_multiplier": 0.6} if family == "granite" else {}
    model = tiny_model(family, tie_word_embeddings=tied, **changes)
    targets = ("embed_tokens", "q_proj", "o_proj")
    adapter = tiny_adapter(model, variant=variant, routing=ROUTINGS["auto"], targets=targets, rank=6, shared=True)
    for fold in ("shared", "expert1"):
        session = lime_edge.open_decoder(tiny_bundle(model, adapter, fold=fold), threads=1)
        check_session(session, unfold(model, adapter), f"{variant}, tied {tied}, fold {fold}")
    session = lime_edge.open_decoder(tiny_bundle(model, adapter, fold="expert2", single=True), threads=1)
    reference = unfold(model, adapter)
    reference.use(2)
    wanted = reference.logits({"input_ids": torch.tensor([IDS])})[0].numpy()
    assert_close(session.logits(IDS), wanted, f"{variant}, single")


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "down_proj"), ALL_LINEARS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gaps_between_sites(
    variant: str, targets: tuple[str, ...], tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    model, adapter = build(tiny_model, tiny_adapter, variant=variant, routing=ROUTINGS["soft"], targets=targets)
    session = lime_edge.open_decoder(tiny_bundle(model, adapter), threads=1)
    check_session(session, unfold(model, adapter), f"{variant}, {targets}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_oracle_routes_too(variant: str, tiny_model: Make, tiny_adapter: Make) -> None:
    model, adapter = build(tiny_model, tiny_adapter, variant=variant, routing=ROUTINGS["windows"])
    compiled = compile_checkpoint(read_checkpoint(model, adapter), CompileOptions(quant="none"))
    module, reference, cache = DecoderModule(compiled), unfold(model, adapter), Cache()
    reference.use("routed")
    wanted = reference.logits({"input_ids": torch.tensor([IDS])})[0].numpy()
    assert_close(module(torch.tensor([IDS]), None, cache)[0].numpy(), wanted, f"{variant}, torch")
    tokens = reference.generate(torch.tensor([IDS]), NEW)[0].tolist()[len(IDS) :]
    assert module.greedy(torch.tensor([IDS]), None, NEW) == tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_expert(variant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(tiny_model, tiny_adapter, variant=variant, routing=ROUTINGS["soft"])
    session = lime_edge.open_decoder(tiny_bundle(model, adapter, fold="expert2", single=True), threads=1)
    reference = unfold(model, adapter)
    reference.use(2)
    wanted = reference.logits({"input_ids": torch.tensor([IDS])})[0].numpy()
    assert_close(session.logits(IDS), wanted, f"{variant}, single")
    with pytest.raises(LimeEdgeError, match="`single`"):
        session.use("routed")


@pytest.mark.parametrize("variant", VARIANTS)
def test_blends_and_none(variant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(tiny_model, tiny_adapter, variant=variant)
    session, reference = lime_edge.open_decoder(tiny_bundle(model, adapter), threads=1), unfold(model, adapter)
    session.use({"expert0": 0.7, "expert4": 0.3})
    reference.use({0: 0.7, 4: 0.3})
    wanted = reference.logits({"input_ids": torch.tensor([IDS])})[0].numpy()
    assert_close(session.logits(IDS), wanted, f"{variant}, blend")
    if variant in ("dora", "slicefine"):
        with pytest.raises(LimeEdgeError, match=f"a {variant} adapter cannot be switched off"):
            session.use(None)
    else:
        session.use(None)
        original = load_model(model)(torch.tensor([IDS])).logits[0].detach().numpy()
        assert_close(session.logits(IDS), original, f"{variant}, none")
    with pytest.raises(LimeEdgeError, match="no routed graph"):
        session.use("routed")


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_quantized_routing_is_near(
    quant: str, variant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """As near as quantized pinned experts are: routing adds no error of its own."""
    model, adapter = build(tiny_model, tiny_adapter, variant=variant, routing=ROUTINGS["soft"])
    session, reference = (
        lime_edge.open_decoder(tiny_bundle(model, adapter, quant=quant), threads=1),
        unfold(model, adapter),
    )
    errors = {}
    for selection, mode in (("expert0", 0), ("routed", "routed")):
        session.use(selection)
        reference.use(mode)
        wanted = reference.logits({"input_ids": torch.tensor([IDS])})[0].numpy()
        errors[selection] = float(np.sqrt(np.mean((session.logits(IDS) - wanted) ** 2)) / wanted.std())
    assert errors["routed"] < max(2.5 * errors["expert0"], 0.05), errors


def test_a_routed_prompt_is_not_chunked(
    tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = build(tiny_model, tiny_adapter, routing=ROUTINGS["soft"])
    session = lime_edge.open_decoder(tiny_bundle(model, adapter), threads=1)
    session.use("routed")
    whole = session.logits(IDS)
    monkeypatch.setattr("lime_edge.session.chunks.CHUNK", 4)
    assert np.array_equal(session.logits(IDS), whole)
    with pytest.raises(LimeEdgeError, match="routed: 2 tokens after a cache of 13"):
        session.extend([5, 6])
    session.extend([5])
    first = list(session.generate_ids(IDS, GenerationOptions(3, ignore_eos=True)))
    again = list(session.generate_ids(IDS, GenerationOptions(3, ignore_eos=True), keep_cache=True))
    assert first == again  # nothing is kept: the whole prompt is routed anew


def test_routed_and_pinned_do_not_disturb_each_other(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(tiny_model, tiny_adapter, routing=ROUTINGS["auto"])
    session = lime_edge.open_decoder(tiny_bundle(model, adapter), threads=1)
    wanted = {}
    for selection in ("routed", "expert1", "expert2"):
        session.use(selection)
        wanted[selection] = session.logits(IDS).copy()
    for selection in ("expert1", "routed", "expert2", "routed", "expert1"):
        session.use(selection)
        assert session.cache == ()
        assert np.array_equal(session.logits(IDS), wanted[selection]), selection


def test_installed_experts_are_never_routed_to(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(tiny_model, tiny_adapter, routing=ROUTINGS["soft"])
    path = tiny_bundle(model, adapter)
    session = lime_edge.open_decoder(path, threads=1)
    session.use("routed")
    before = session.logits(IDS).copy()
    session.install(path / "experts" / "expert1.safetensors", name="later")
    assert np.array_equal(session.logits(IDS), before)


def test_both_graphs_share_one_weight_file(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(tiny_model, tiny_adapter, routing=ROUTINGS["auto"])
    plain, _ = build(tiny_model, tiny_adapter)
    files = Bundle.open(tiny_bundle(model, adapter, quant="int8")).manifest.files
    alone = Bundle.open(tiny_bundle(plain, tiny_adapter(plain, rank=6, experts=5, shared=True), quant="int8")).manifest
    assert {"onnx/model.onnx", "onnx/routed.onnx", "onnx/model.onnx.data"} <= set(files)
    extra = files["onnx/model.onnx.data"].size - alone.files["onnx/model.onnx.data"].size
    assert extra < 0.5 * alone.files["onnx/model.onnx.data"].size, "only the bank is new"


# prompt tuning


def make_prompt_adapter(directory: Path, model: Path, **changes: Any) -> Path:
    """A prompt tuning adapter: 5 virtual tokens, 4 experts, loud enough to hear."""
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    width = json.loads((model / "config.json").read_text())["hidden_size"]
    tensors = {
        "prompt_base": draw(5, width),
        "prompt_delta": draw(5, width),
        "LiMEs": 1 + 0.5 * draw(4, width),
        "LiME_shared": draw(width),
        "gamma": torch.tensor([0.3]),
        "input_proj": draw(width, width) / width**0.5,
    }
    config = {
        "peft_type": "LIME",
        "variant": "prompt_tuning",
        "target_modules": ["prompt"],
        "r": 5,
        "lora_alpha": 1.0,
        "num_experts": 4,
        "expert_names": [f"expert{i}" for i in range(4)],
        "use_shared_lime": True,
    } | changes
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"prompt.{name}": tensor for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def prompt_logits(model: Path, adapter: Path, mode: Mode) -> np.ndarray:
    """`transformers` fed with embeddings: the virtual tokens of `prompt_tuning`, then the prompt's."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    own = {n.removeprefix("prompt."): t for n, t in load_file(adapter / "adapter_model.safetensors").items()}
    own["input_proj.weight"] = own.pop("input_proj")
    theirs = load_model(model)
    embeds = theirs.get_submodule("model.embed_tokens")(torch.tensor([IDS])).detach()
    routing = find_variant("prompt_tuning").read_routing(config)
    if not isinstance(mode, str):
        assert mode is not None
        weights = fix_weights(mode, 4)
        assert weights is not None
    elif config["input_conditioned"]:
        weights = route_conditioned(own, routing, config["input_conditioning_mode"], embeds, None)
    else:
        weights = route_static(own, routing)
    whole, _ = prepend_prompt(compute_prompt(own, weights), embeds, None)
    with torch.no_grad():
        return theirs(inputs_embeds=whole).logits[0, 5:].numpy()


@pytest.mark.parametrize("conditioning", ["static", "mean", "first", "last", "attention"])
@pytest.mark.parametrize("routing", ["sparse-2", "auto", "soft", "windows"])
def test_prompt_tuning(conditioning: str, routing: str, tiny_model: Make, tmp_path: Path, tiny_bundle: Make) -> None:
    model = tiny_model("llama")
    hyper = {"sparse_mode": False} | ROUTINGS[routing]
    name = name_selection(RoutingConfig(**hyper))
    how: dict[str, Any] = {"input_conditioned": conditioning != "static"}
    how |= {"input_conditioning_mode": conditioning} if conditioning != "static" else {}
    adapter = make_prompt_adapter(tmp_path / "adapter", model, routing=name, **hyper, **how)
    compiled = compile_checkpoint(read_checkpoint(model, adapter), CompileOptions(quant="none"))
    module, outputs = DecoderModule(compiled), []
    for fold in ("shared", "expert1"):
        session = lime_edge.open_decoder(tiny_bundle(model, adapter, fold=fold), threads=1)
        for selection, mode in (("routed", "routed"), ("expert0", 0), ("expert3", 3)):
            session.use(selection)
            wanted = prompt_logits(model, adapter, mode)
            assert_close(session.logits(IDS), wanted, f"{conditioning}, {routing}, {fold}, {selection}")
            outputs.append(wanted)
        one_by_one = [session.logits(IDS[:5])[-1].copy(), *(session.extend([t])[-1].copy() for t in IDS[5:])]
        assert_close(np.stack(one_by_one), wanted[4:], f"{conditioning}, {routing}, token by token")
    assert_close(module(torch.tensor([IDS]), None)[0].numpy(), outputs[0], f"{conditioning}, {routing}, torch")
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01 and np.abs(outputs[1] - outputs[2]).max() > 0.01


@pytest.mark.parametrize("head_dim", [16, 24])
def test_prompt_tuning_sessions(head_dim: int, tiny_model: Make, tmp_path: Path, tiny_bundle: Make) -> None:
    """The virtual tokens take cache, survive a kept prefix, and cannot be switched off; rotation fused or apart."""
    model = tiny_model("llama", head_dim=head_dim)
    adapter = make_prompt_adapter(tmp_path / "adapter", model, input_conditioned=False)
    session = lime_edge.open_decoder(tiny_bundle(model, adapter), threads=1)
    assert session.max_length == 64 - 5
    with pytest.raises(LimeEdgeError, match="cannot be switched off"):
        session.use(None)
    session.use({"expert0": 0.5, "expert2": 0.5})
    assert_close(session.logits(IDS), prompt_logits(model, adapter, {0: 0.5, 2: 0.5}), "blend")
    options = GenerationOptions(4, ignore_eos=True)
    first = list(session.generate_ids(IDS, options))
    longer = IDS + first[:2]
    kept = list(session.generate_ids(longer, options, keep_cache=True))
    assert kept[:2] == first[2:4] and kept == list(session.generate_ids(longer, options))
    single = lime_edge.open_decoder(tiny_bundle(model, adapter, fold="expert2", single=True), threads=1)
    assert_close(single.logits(IDS), prompt_logits(model, adapter, 2), "single")
    wrong = tiny_model("llama", hidden_size=32)
    with pytest.raises(LimeEdgeError, match="site prompt: H: expected 32, found 64"):
        tiny_bundle(wrong, adapter)
