"""The adapter directory: faults come all at once, and the documented fields are the fields in code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lime_edge.compiler.formats.adapter import build_adapter, read_adapter, write_adapter
from lime_edge.compiler.formats.adapter_checks import FIELDS, SELECTIONS, name_selection
from lime_edge.compiler.formats.hyper import KNOWN, TRAINING
from lime_edge.compiler.maths.fold import run_folded
from lime_edge.compiler.maths.layers import LimeLayer
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.maths.variants import LAYER_VARIANTS, VARIANTS, find_variant
from lime_edge.errors import LimeEdgeError

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs/adapter-format.md").read_text()
FIXTURES = Path(__file__).parent / "fixtures/conformance"
SITES = ("layers.0.q", "layers.0.v")
E, H, D, R = 3, 6, 5, 2


def make_config(variant: str = "lora", **changes: Any) -> dict[str, Any]:
    config = {
        "peft_type": "LIME",
        "variant": variant,
        "target_modules": ["q", "v"],
        "r": R,
        "lora_alpha": 4,
        "num_experts": E,
        "expert_names": ["a", "b", "c"],
        "use_shared_lime": True,
    }
    return config | changes


def make_tensors(variant: str = "lora") -> dict[str, torch.Tensor]:
    shapes = {
        "A": (R, D),
        "B": (H, R),
        "m": (H,),
        "part_T": (R, D),
        "LiMEs": (E, H),
        "LiME_shared": (H,),
        "gamma": (1,),
    }
    parts = [*find_variant(variant).parts, "LiMEs", "LiME_shared", "gamma"]
    random = torch.Generator().manual_seed(0)
    return {f"{site}.{part}": torch.randn(*shapes[part], generator=random) for site in SITES for part in parts}


def save(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize("variant", LAYER_VARIANTS)
def test_what_is_written_is_read(variant: str, tmp_path: Path) -> None:
    tensors = make_tensors(variant)
    config = make_config(variant, routing="sparse_topk", sparse_mode=True, top_k=3, n_gram=4, training={"steps": 1})
    write_adapter(tmp_path, config, tensors)
    adapter = read_adapter(tmp_path)
    assert adapter.routing_config == find_variant(variant).read_routing({"sparse_mode": True, "top_k": 3, "n_gram": 4})
    assert adapter.scale == 2.0
    for site in SITES:
        found = adapter.sites[site].tensors()
        assert found.keys() == {name.rpartition(".")[2] for name in tensors}
        for part, tensor in found.items():
            assert torch.equal(tensor, tensors[f"{site}.{part}"]), part
        vectors = tensors[f"{site}.LiMEs"] + tensors[f"{site}.gamma"] * tensors[f"{site}.LiME_shared"]
        assert torch.allclose(adapter.sites[site].vectors(), vectors)
        assert adapter.sites[site].weight_shape == (H, D)


@pytest.mark.parametrize("variant", LAYER_VARIANTS)
def test_a_site_joined_with_its_weight_folds_to_the_unfolded_layer(variant: str) -> None:
    """`join` gives folding what the documented assembly says, SliceFine's rows included."""
    adapter = build_adapter(make_config(variant), make_tensors(variant), "test")
    site = adapter.sites[SITES[0]]
    weight, bias, x = torch.randn(H, D), torch.randn(H), torch.randn(2, 3, D)
    own = site.tensors() | {"bias": bias}
    own |= {"part_F": weight[R:]} if variant == "slicefine" else {"weight": weight}
    layer = LimeLayer(find_variant(variant), own, adapter.scale, adapter.routing_config)
    layer.use(1)
    p_ref = site.vectors().mean(0)
    folded = find_variant(variant).fold_linear(site.join(weight, bias), p_ref, adapter.scale)
    residual = site.vectors()[1] - find_variant(variant).reference_of(p_ref)
    assert torch.allclose(run_folded(folded, x, residual), layer(x), atol=1e-4)


@pytest.mark.parametrize("variant", LAYER_VARIANTS)
def test_embedding_shapes(variant: str) -> None:
    """The layer fixtures' embeddings fit; the same tensors called a linear layer do not."""
    layer = load_file(FIXTURES / f"layers/embedding-{variant}-soft-topk.safetensors")
    tensors = {f"words.{part}": layer[part] for part in [*find_variant(variant).parts, "LiMEs", "LiME_shared", "gamma"]}
    config = make_config(
        variant,
        target_modules=["words"],
        r=6 if variant == "slicefine" else 3,
        num_experts=4,
        expert_names=list("abcd"),
        embedding_modules=["words"],
        pad_token_id=0,
    )
    site = build_adapter(config, tensors, "test").sites["words"]
    assert site.embedding and site.weight_shape == (None if variant == "lora" else 30, 16)
    if variant != "lora":  # whose A (r, H) and B (H, r) a square linear layer could have as well
        with pytest.raises(LimeEdgeError):
            build_adapter(config | {"embedding_modules": []}, tensors, "test")


def break_config(config: dict[str, Any]) -> None:
    config |= {"colour": 1, "peft_type": "LORA", "top_k": True, "temperature": -1.0, "n_gram": 0}
    config |= {"expert_names": ["a", "a", "../x", "none"], "license": 3}


def break_tensors(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["layers.0.q.A"]
    tensors["layers.0.q.m"] = torch.zeros(H)
    tensors["stray"] = torch.zeros(1)
    tensors["layers.0.v.B"] = torch.zeros(H, R + 1)
    tensors["layers.0.v.LiMEs"][1, 2] = float("nan")
    tensors["layers.0.v.gamma"] = torch.zeros(1, dtype=torch.int32)


def test_all_faults_of_both_files_come_at_once(tmp_path: Path) -> None:
    config, tensors = make_config(), make_tensors()
    break_config(config)
    break_tensors(tensors)
    with pytest.raises(LimeEdgeError) as error:
        read_adapter(save(tmp_path, config, tensors))
    wanted = (
        "unknown field 'colour'",
        "peft_type: expected LIME, found LORA",
        "top_k: expected int, found True",
        "temperature",
        "n_gram",
        "expert_names: expected 3 names, found 4",
        "expert_names are not unique",
        "'../x' is not a valid expert name",
        "'none' is reserved",
        "license: expected str or null, found 3",
        "layers.0.q.A is missing",
        "unknown tensor 'layers.0.q.m'",
        "unknown tensor 'stray'",
        "layers.0.v.B: expected (6, 2), found (6, 3)",
        "layers.0.v.LiMEs holds NaN",
        "layers.0.v.gamma: expected floating point",
    )
    missing = [text for text in wanted if text not in error.value.problem]
    assert not missing, f"{missing} not in {error.value.problem}"
    assert "docs/adapter-format.md" in error.value.hint


@pytest.mark.parametrize("name", [name for name, (_, required) in FIELDS.items() if required])
def test_a_missing_field_is_named_beside_other_faults(name: str, tmp_path: Path) -> None:
    config = make_config(colour=1)
    del config[name]
    with pytest.raises(LimeEdgeError) as error:
        read_adapter(save(tmp_path, config, make_tensors()))
    assert f"field {name!r} is missing" in error.value.problem and "colour" in error.value.problem


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"variant": "prefix"}, "variant: expected lora or"),
        ({"r": 0}, "r: expected at least 1"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"target_modules": [1]}, "target_modules"),
        ({"routing": "auto_topk"}, "routing: expected pinned, or soft_topk"),
        ({"routing": "soft_topk", "top_k": 4}, "top_k: expected at most num_experts, 3"),
        ({"embedding_modules": 3}, "embedding_modules: expected list"),
        ({"auto_topk_threshold": 2.0}, "at most 1"),
    ],
)
def test_values_out_of_range(change: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    with pytest.raises(LimeEdgeError) as error:
        read_adapter(save(tmp_path, make_config(**change), make_tensors()))
    assert wanted in error.value.problem


@pytest.mark.parametrize("part", ["A", "B", "m", "LiMEs", "LiME_shared", "gamma"])
@pytest.mark.parametrize("shape", [(), (7,), (7, 7), (2, 2, 2)])
def test_any_wrong_shape_is_a_fault_and_never_a_crash(part: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = make_tensors("dora") | {f"layers.0.q.{part}": torch.zeros(shape)}
    with pytest.raises(LimeEdgeError, match="layers.0.q"):
        read_adapter(save(tmp_path, make_config("dora"), tensors))


@pytest.mark.parametrize("damage", ["no-directory", "no-config", "not-json", "a-list", "no-weights", "truncated"])
def test_damaged_directories(damage: str, tmp_path: Path) -> None:
    path = save(tmp_path / "adapter", make_config(), make_tensors())
    config, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    if damage == "no-directory":
        path = tmp_path / "elsewhere"
    elif damage == "no-config":
        config.unlink()
    elif damage == "no-weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
    else:
        config.write_text("{" if damage == "not-json" else "[]")
    with pytest.raises(LimeEdgeError, match="adapter|elsewhere"):
        read_adapter(path)


def test_selections_have_the_names_in_the_document() -> None:
    found = {
        name_selection(RoutingConfig(sparse_mode=s, auto_topk=a, soft_topk=soft))
        for s in (False, True)
        for a in (False, True)
        for soft in (False, True)
    }
    assert found == set(SELECTIONS)
    assert all(f"`{name}`" in DOCUMENT for name in SELECTIONS)


# The document


def read_table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    below = DOCUMENT.split(heading, 1)[1]
    lines = [line for line in re.split(r"\n#", below)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_documented_fields_are_the_fields_in_code() -> None:
    found = {row[0].strip("`"): row for row in read_table("## Fields of adapter_config.json")}
    assert list(found) == list(FIELDS)
    defaults = {entry.name: entry.default for entry in fields(RoutingConfig)}
    for name, (types, required) in FIELDS.items():
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        assert found[name][1] == wanted, name
        assert (found[name][2] == "required") == required, name
        if name in defaults:
            assert json.loads(found[name][2]) == defaults[name], name


def test_documented_parts_are_the_parts_in_code() -> None:
    found = {row[0].strip("`"): row[3] for row in read_table("## Tensors of adapter_model.safetensors")}
    assert found.keys() == {
        *(part for variant in VARIANTS.values() for part in variant.parts),
        "LiMEs",
        "LiME_shared",
        "gamma",
        "input_proj",
    }
    for variant in VARIANTS.values():
        for part in {part for other in VARIANTS.values() for part in other.parts}:
            assert (part in variant.parts) == (variant.name in found[part].split(", ")), (variant.name, part)


def test_every_hyper_parameter_of_the_fixtures_is_documented() -> None:
    rows = read_table("### The authors' state dict")
    documented = {row[0].strip("`") for row in rows}
    assert documented == set(KNOWN)
    assert all(f"`{name}`" in DOCUMENT for name in (*TRAINING, "rep_mode"))
    for file in FIXTURES.glob("models/*/lime.json"):
        assert json.loads(file.read_text()).keys() <= documented, file


def test_the_documented_example_is_valid() -> None:
    text = DOCUMENT.split("## Example", 1)[1]
    config = json.loads(text[text.index("{") : text.index("}") + 1])
    sizes = {row[0].strip("`"): tuple(int(n) for n in re.findall(r"\d+", row[1])) for row in read_table("## Example")}
    adapter = build_adapter(config, {name: torch.ones(size) for name, size in sizes.items()}, "example")
    assert adapter.expert_names == ("movie", "intent") and adapter.routing == "auto_topk"


def test_the_starter_adapter_still_reads() -> None:
    adapter = read_adapter(ROOT / "examples/starter_adapter/adapter")
    assert (len(adapter.sites), adapter.routing) == (120, "pinned")
