"""Unfolded layers and models against the authors' outputs (fixtures) and against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lime_edge.compiler.formats.authors import split_state
from lime_edge.compiler.maths.layers import LimeLayer
from lime_edge.compiler.maths.prompt_tuning import compute_prompt, route_static, summarize
from lime_edge.compiler.maths.variants import LAYER_VARIANTS, find_variant
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.errors import LimeEdgeError

FIXTURES = Path(__file__).parent / "fixtures" / "conformance"
LAYERS = sorted((FIXTURES / "layers").glob("*.safetensors"))
MODELS = conformance.list_models(FIXTURES)


def assert_all_pass(checks: Iterable[conformance.Check]) -> None:
    checks = list(checks)
    failures = [c for c in checks if not c.ok]
    worst = max(failures, key=lambda c: c.error, default=None)
    assert checks and not failures, f"{len(failures)} of {len(checks)}; worst {worst}"


@pytest.mark.parametrize("path", LAYERS, ids=lambda path: path.stem)
def test_layer_fixture(path: Path) -> None:
    assert_all_pass(conformance.check_layer(path.stem, path))


@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
def test_model_fixture(directory: Path) -> None:
    fixture = conformance.read_model(directory)
    assert_all_pass(conformance.check_model(fixture, conformance.TorchEngine(fixture), 1e-4))


def test_fixtures_cover_every_variant_and_selection() -> None:
    names = " ".join(path.stem for path in LAYERS)
    for word in (
        *LAYER_VARIANTS,
        "embedding",
        "prompt_tuning",
        "soft-topk",
        "hard-topk",
        "sparse-auto-topk",
        "sparse-topk",
        "n3",
        "static",
        "attention",
        "first",
        "last",
        "mean",
    ):
        assert word in names, word


def copy_fixtures(target: Path, layers: Sequence[str] = (), models: Sequence[str] = ()) -> Path:
    for kind, names in (("layers", layers), ("models", models)):
        (target / kind).mkdir(parents=True)
        for name in names:
            source = FIXTURES / kind / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target / kind / name)
    return target


def test_script_fails_on_one_wrong_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [path.name for path in LAYERS[:3]]
    directory = copy_fixtures(tmp_path, names)
    assert conformance.main([str(directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checked"] == 3
    damage(directory / "layers" / names[1], "y", 1e-3)
    assert conformance.main([str(directory), "--json"]) == 1
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["failed"], outcome["failures"][0]["fixture"]) == (1, f"layers/{LAYERS[1].stem}")
    largest = load_file(LAYERS[1])["y"].abs().max().clamp_min(1).item()
    assert outcome["failures"][0]["error"] == pytest.approx(1e-3 / largest, rel=0.1)


@pytest.mark.parametrize("key", ["generated", "pinned_generated.1", "pinned_logits.2", "logits"])
def test_script_fails_on_a_wrong_model_output(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    directory = copy_fixtures(tmp_path, models=["llama-lora-auto"])
    damage(directory / "models" / "llama-lora-auto" / "expected.safetensors", key, 1)
    assert conformance.main([str(directory)]) == 1
    assert f"FAILED models/llama-lora-auto {key}" in capsys.readouterr().out


def test_script_reports_a_crash_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = copy_fixtures(tmp_path, [LAYERS[0].name], ["bert-lora-cls"])
    (directory / "models" / "bert-lora-cls" / "model.safetensors").write_bytes(b"not safetensors")
    assert conformance.main([str(directory)]) == 1
    output = capsys.readouterr().out
    assert "FAILED models/bert-lora-cls run" in output and "checked 2 fixtures" in output


def test_script_refuses_an_empty_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main([str(tmp_path)]) == 2
    assert "found none" in capsys.readouterr().err


def damage(path: Path, key: str, by: float) -> None:
    """Add `by` to one element, metadata kept."""
    with conformance.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[key].view(-1)[-1] += by
    save_file(tensors, path, metadata)


def make_layer(variant: str) -> tuple[LimeLayer, dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    tensors = {
        "LiMEs": torch.randn(3, 6, generator=random),
        "LiME_shared": torch.randn(6, generator=random),
        "gamma": torch.tensor([0.5]),
        "bias": torch.randn(6, generator=random),
    }
    if variant == "slicefine":
        tensors |= {"part_T": torch.randn(2, 5, generator=random), "part_F": torch.randn(4, 5, generator=random)}
    else:
        tensors |= {
            "weight": torch.randn(6, 5, generator=random),
            "A": torch.randn(2, 5, generator=random),
            "B": torch.randn(6, 2, generator=random),
        }
    if variant == "dora":
        tensors["m"] = torch.rand(6, generator=random) + 0.5
    return LimeLayer(find_variant(variant), tensors, 2.0, find_variant(variant).read_routing({})), tensors


def compute_by_matrix(variant: str, t: dict[str, torch.Tensor], x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """One effective weight matrix per expert: independent of base, delta and composition."""
    if variant == "slicefine":
        return x @ torch.cat([p[:2, None] * t["part_T"], t["part_F"]]).T + t["bias"]
    product = 2.0 * t["B"] @ t["A"]
    weight, bias = t["weight"] + p[:, None] * product, t["bias"]
    if variant == "dora":
        n = t["m"] / torch.sqrt(((t["weight"] + product) ** 2).sum(1))
        weight, bias = n[:, None] * weight, n * bias
    return x @ weight.T + bias


@pytest.mark.parametrize("variant", LAYER_VARIANTS)
def test_pinned_and_blended_are_one_matrix(variant: str) -> None:
    layer, tensors = make_layer(variant)
    x = torch.randn(2, 4, 5)
    for mode, weights in ((1, [0, 1, 0]), ({0: 0.75, 2: 0.25}, [0.75, 0, 0.25])):
        layer.use(mode)
        p = torch.tensor(weights, dtype=torch.float) @ tensors["LiMEs"] + 0.5 * tensors["LiME_shared"]
        worst = (layer(x) - compute_by_matrix(variant, tensors, x, p)).abs().max().item()
        assert worst < 1e-5, (variant, mode, worst)
        assert torch.allclose(layer(x[0]), layer(x)[0], atol=1e-6), "(N, D) input"


@pytest.mark.parametrize("variant", LAYER_VARIANTS)
@pytest.mark.parametrize("mode", ["routed", 1])
def test_masked_positions_are_frozen_and_still_move_the_scale(variant: str, mode: Any) -> None:
    layer, tensors = make_layer(variant)
    layer.use(mode)
    x = torch.randn(1, 4, 5)
    x[0, 0] *= 50
    open_output, layer.attention_mask = layer(x), torch.tensor([[0, 1, 1, 1]])
    masked = layer(x)
    assert torch.equal(masked[:, 1:], open_output[:, 1:])
    neutral = torch.ones(6) if variant == "slicefine" else torch.zeros(6)
    frozen = compute_by_matrix(variant, tensors, x, neutral)
    assert torch.allclose(masked[:, 0], frozen[:, 0], rtol=1e-5, atol=1e-4)
    assert (masked[:, 0] - open_output[:, 0]).abs().max() > 0.1
    if mode == "routed":
        layer.attention_mask = None
        assert (layer(x[:, 1:]) - masked[:, 1:]).abs().max() > 1e-3, "padding is part of the scale"


def test_lora_ignores_windows_and_the_others_do_not() -> None:
    assert find_variant("lora").read_routing({"n_gram": 3}).n_gram == 1
    others = [find_variant(name) for name in LAYER_VARIANTS if name != "lora"]
    assert all(variant.read_routing({"n_gram": 3}).n_gram == 3 for variant in others)


def test_prompt_tuning_is_sparse_by_default() -> None:
    assert find_variant("prompt_tuning").read_routing({}).sparse_mode
    assert not find_variant("prompt_tuning").read_routing({"sparse_mode": False}).sparse_mode
    assert not find_variant("dora").read_routing({}).sparse_mode


@pytest.mark.parametrize("rows, axis", [(9, 0), (9, 1)])
def test_split_state_joins_slicefine_parts_along_the_output(rows: int, axis: int) -> None:
    """Also where both parts have the same shape: only the experts' width tells rows from columns."""
    base = torch.randn(rows, 6)
    top, rest = base.split(6 if axis == 0 else 3, dim=axis)
    experts = torch.randn(2, base.shape[axis])
    state = {"m.x.part_T": top, "m.x.part_F": rest, "m.x.LiMEs": experts, "m.xy.weight": base}
    backbone, sites = split_state(state)
    assert torch.equal(backbone["m.x.weight"], base) and torch.equal(backbone["m.xy.weight"], base)
    assert set(sites) == {"m.x"} and set(sites["m.x"]) == {"part_T", "part_F", "LiMEs"}


@pytest.mark.parametrize(
    "variant, mode, word",
    [
        ("dora", None, "switched off"),
        ("slicefine", None, "switched off"),
        ("lora", 3, "below 3"),
        ("lora", -1, "below 3"),
        ("lora", {0: 0.5}, "sum to 1"),
        ("lora", {0: 0.5, 7: 0.5}, "found 7"),
        ("lora", "route", "'routed'"),
    ],
)
def test_modes_that_do_not_exist_are_refused(variant: str, mode: Any, word: str) -> None:
    layer = make_layer(variant)[0]
    with pytest.raises(LimeEdgeError, match=word):
        layer.use(mode)


def build(name: str) -> tuple[conformance.ModelFixture, Any, dict[str, Any]]:
    fixture = conformance.read_model(FIXTURES / "models" / name)
    backbone, sites = split_state(load_file(fixture.directory / "model.safetensors"))
    return fixture, conformance.build_backbone(fixture, backbone).eval(), sites


@pytest.mark.parametrize("name", ["llama-lora-auto", "qwen2-lora-soft", "llama-lora_fa", "bert-lora-cls"])
def test_none_is_the_original_model_and_restore_brings_it_back(name: str) -> None:
    fixture, model, sites = build(name)
    with torch.no_grad():
        original = model(**fixture.inputs).logits
    unfolded = UnfoldedModel(model, sites, fixture.hyper)
    assert (unfolded.logits(fixture.inputs) - original).abs().max() > 1e-3
    unfolded.use(None)
    assert torch.equal(unfolded.logits(fixture.inputs), original)
    unfolded.use(0)
    with torch.no_grad():
        assert torch.equal(unfolded.restore()(**fixture.inputs).logits, original)


def test_generate_is_transformers_generate() -> None:
    fixture, model, sites = build("llama-lora-sparse")
    unfolded, ids = UnfoldedModel(model, sites, fixture.hyper), fixture.inputs["input_ids"]
    unfolded.use(2)
    theirs = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert unfolded.generate(ids, 8).tolist() == theirs.tolist()


def test_padding_reaches_the_sites_only_on_request() -> None:
    fixture, model, sites = build("bert-lora-cls")
    mask = torch.ones_like(fixture.inputs["input_ids"])
    mask[:, -3:] = 0
    inputs, outputs = {**fixture.inputs, "attention_mask": mask}, {}
    for asked in (False, True):
        unfolded = UnfoldedModel(model, sites, fixture.hyper, mask_padding=asked)
        for mode in (0, "routed"):
            unfolded.use(mode)
            outputs[asked, mode] = unfolded.logits(inputs)
        model = unfolded.restore()
    # Nobody attends to masked positions, and the classifier reads token 0. Routed, they still move
    # the scale of the second block's sites.
    assert torch.allclose(outputs[True, 0], outputs[False, 0], atol=1e-6)
    assert (outputs[True, "routed"] - outputs[False, "routed"]).abs().max() > 1e-5


def test_an_embedding_site_unties_the_head() -> None:
    fixture, model, _ = build("llama-lora-auto")
    ids, table = fixture.inputs["input_ids"], model.get_input_embeddings().weight.detach().clone()
    site = {"A": torch.randn(2, 64), "B": torch.randn(256, 2), "LiMEs": torch.randn(3, 64)}
    hyper = {"variant": "lora_fa", "alpha": 2.0, "pad_token_id": int(ids[0, 0])}
    unfolded = UnfoldedModel(model, {"model.embed_tokens": site}, hyper)
    unfolded.use(1)
    expected = table + site["LiMEs"][1] * (site["B"] @ site["A"])
    expected[ids[0, 0]] = table[ids[0, 0]]
    found = unfolded.layers["model.embed_tokens"](ids)
    assert torch.allclose(found, F.embedding(ids, expected), atol=1e-5)
    assert torch.equal(model.lm_head.weight, table)


def test_sites_that_do_not_fit_are_all_named() -> None:
    fixture, model, sites = build("llama-lora-auto")
    first, second = list(sites)[:2]
    wrong = {first: {}, second + "x": sites[second], "model.norm": sites[second]}
    with pytest.raises(LimeEdgeError) as fault:
        UnfoldedModel(model, wrong, fixture.hyper)
    for name in wrong:
        assert name in fault.value.problem


def test_static_prompt_is_one_table_per_expert() -> None:
    path = next(path for path in LAYERS if "static" in path.stem)
    tensors = load_file(path)
    p = tensors["LiMEs"][1] + tensors["gamma"] * tensors["LiME_shared"]
    pinned = compute_prompt(tensors, torch.eye(tensors["LiMEs"].shape[0])[1])
    assert torch.allclose(pinned, tensors["prompt_base"] + tensors["prompt_delta"] * p, atol=1e-6)
    with conformance.safe_open(path, "pt") as file:
        routing = find_variant("prompt_tuning").read_routing(json.loads(file.metadata()["lime"]))
    routed = compute_prompt(tensors, route_static(tensors, routing))
    assert torch.allclose(routed, tensors["output_embeds"][0, : routed.shape[0]], atol=1e-5)


def test_summaries_by_hand() -> None:
    embeds = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert summarize(embeds, mask, "mean").tolist() == [[0.5, 1.0]]
    assert summarize(embeds, mask, "first").tolist() == [[1.0, 0.0]]
    assert summarize(embeds, mask, "last").tolist() == [[0.0, 2.0]]
    assert summarize(embeds, None, "last").tolist() == [[9.0, 9.0]]
    query = torch.tensor([10 / 3, 11 / 3])  # the mean sees padding, the weights do not
    weights = torch.softmax(torch.stack([embeds[0, 0] @ query, embeds[0, 1] @ query]), 0)
    expected = weights[0] * embeds[0, 0] + weights[1] * embeds[0, 1]
    assert torch.allclose(summarize(embeds, mask, "attention")[0], expected, atol=1e-5)
    with pytest.raises(LimeEdgeError, match="median"):
        summarize(embeds, mask, "median")
