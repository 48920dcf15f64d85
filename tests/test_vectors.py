"""A skill delivered later: a folder of vectors alone, into a bundle and into a running session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import Cli

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import read_expert
from lime_edge.bundle.vectors import CONFIG, WEIGHTS, read_vectors
from lime_edge.errors import LimeEdgeError

Make = Callable[..., Path]
Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def make_folder(adapter: Path, folder: Path, bundle: Bundle, edit: Edit = lambda *_: None) -> Path:
    """Vectors alone, N(1, 0.5), for an adapter whose bundle is given."""
    config = json.loads((adapter / CONFIG).read_text())
    tensors = load_file(adapter / WEIGHTS)
    random = np.random.default_rng(5)
    config |= {"num_experts": 1, "expert_names": ["later"], "base_fingerprint": bundle.manifest.backbone.fingerprint}
    config["training"] = {"shared_adapter_sha256": bundle.manifest.adapter.sha256}
    kept = {n: t for n, t in tensors.items() if n.endswith((".LiME_shared", ".gamma"))}
    for name, tensor in tensors.items():
        if name.endswith(".LiMEs"):
            kept[name] = random.normal(1, 0.5, (1, tensor.shape[1])).astype(np.float16)
    edit(config, kept)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(kept, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("shared", [False, True])
def test_it_answers_as_if_trained_jointly(
    shared: bool, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path
) -> None:
    """Installed while the session runs, it gives the logits of a bundle that had it from the start."""
    adapter = tiny_adapter(None, shared=shared)
    bundle = Bundle.open(tiny_bundle(None, adapter))
    folder = make_folder(adapter, tmp_path / "later", bundle)
    whole = Path(shutil.copytree(adapter, tmp_path / "whole"))
    config, tensors = json.loads((whole / CONFIG).read_text()), load_file(whole / WEIGHTS)
    config |= {"num_experts": config["num_experts"] + 1, "expert_names": [*config["expert_names"], "later"]}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if name.endswith(".LiMEs"):
            tensors[name] = np.concatenate([tensors[name], tensor.astype(np.float32)])
    (whole / CONFIG).write_text(json.dumps(config))
    save_file(tensors, whole / WEIGHTS)
    expected = lime_edge.open_decoder(tiny_bundle(None, whole))
    expected.use("later")

    session = lime_edge.open_decoder(bundle.path)
    ids = [5, 9, 17, 33]
    before = session.logits(ids).copy()
    (expert,) = read_vectors(folder, bundle)
    file = tmp_path / "later.safetensors"
    file.write_bytes(expert.to_bytes())
    assert session.install(file) == "later"
    assert np.array_equal(session.logits(ids), before)  # installing switches nothing
    session.use("later")
    np.testing.assert_allclose(session.logits(ids), expected.logits(ids), atol=1e-4, rtol=1e-4)
    assert np.abs(session.logits(ids) - before).max() > 0.1


def drop_site(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    del tensors[min(n for n in tensors if n.endswith(".LiMEs"))]


def cut_width(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    name = min(n for n in tensors if n.endswith(".LiMEs"))
    tensors[name] = tensors[name][:, :-1].copy()


def add_nan(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    tensors[min(n for n in tensors if n.endswith(".LiMEs"))][0, 3] = np.nan


def add_site(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.9.mlp.up_proj.LiMEs"] = np.ones((1, 4), np.float32)


def name_other(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    config["training"]["shared_adapter_sha256"] = "f" * 64


FAULTS: dict[str, Edit] = {
    "is missing": drop_site,
    "expected (1, 32), found (1, 31)": cut_width,
    "holds NaN": add_nan,
    "the bundle has no such site": add_site,
    "shared adapter: expected": name_other,
    "names no shared adapter: expected adapter_id": lambda c, _: c.pop("training"),
    "found ffffffffffffffff": name_other,
    "found 0000000000000000": lambda c, _: c.update(adapter_id="0" * 64),
    "two are equal": lambda c, _: c.update(num_experts=2, expert_names=["a", "A"]),
    "expert_names: expected 1 names, found 7": lambda c, _: c.update(expert_names=7),
    "holds values up to 7e+04": lambda _, t: t.update({n: np.full_like(x, 7e4, np.float32) for n, x in t.items()}),
    "lora_alpha: expected 8.0, found 9": lambda c, _: c.update(lora_alpha=9),
    "expected 2 names": lambda c, _: c.update(num_experts=2),
    "'routed' is reserved": lambda c, _: c.update(expert_names=["routed"]),
    "peft_type: expected LIME": lambda c, _: c.update(peft_type="LORA"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_does_not_fit_is_refused(message: str, tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path) -> None:
    adapter = tiny_adapter()
    bundle = Bundle.open(tiny_bundle(None, adapter))
    with pytest.raises(LimeEdgeError) as caught:
        read_vectors(make_folder(adapter, tmp_path / "later", bundle, FAULTS[message]), bundle)
    assert message in str(caught.value)


def test_any_backbone_of_the_adapter_will_do(tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path) -> None:
    """What was folded and rounded is none of an expert's business."""
    adapter = tiny_adapter()
    bundle = Bundle.open(tiny_bundle(None, adapter))

    def name_adapter(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        config |= {"base_fingerprint": "0" * 64, "adapter_id": bundle.manifest.adapter_id, "training": None}

    (expert,) = read_vectors(make_folder(adapter, tmp_path / "later", bundle, name_adapter), bundle)
    assert expert.adapter_id == bundle.manifest.adapter_id


def test_bfloat16_is_widened(tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    bundle = Bundle.open(tiny_bundle(None, tiny_adapter()))
    folder = make_folder(tiny_adapter(), tmp_path / "later", bundle)
    tensors = {name: torch.from_numpy(t).bfloat16() for name, t in load_file(folder / WEIGHTS).items()}
    save_torch(tensors, folder / WEIGHTS)
    (expert,) = read_vectors(folder, bundle)
    flat = torch.cat([tensors[f"{site.name}.LiMEs"][0] for site in bundle.manifest.sites])
    assert np.array_equal(expert.vector, flat.float().numpy())


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 10**5, b'{"peft_type": "LIME", "r": 1e999}'])
def test_a_broken_configuration_is_refused(text: bytes, tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle(None, tiny_adapter()))
    folder = make_folder(tiny_adapter(), tmp_path / "later", bundle)
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(LimeEdgeError):
        read_vectors(folder, bundle)


def test_a_shared_vector_must_be_the_bundle_s(tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path) -> None:
    adapter = tiny_adapter(None, shared=True)
    bundle = Bundle.open(tiny_bundle(None, adapter))

    def change(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors[min(n for n in tensors if n.endswith(".gamma"))] *= 2

    with pytest.raises(LimeEdgeError, match="LiME_shared and gamma: expected those of the bundle's adapter, found oth"):
        read_vectors(make_folder(adapter, tmp_path / "later", bundle, change), bundle)


def test_a_shared_vector_must_come_along(tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path) -> None:
    adapter = tiny_adapter(None, shared=True)
    bundle = Bundle.open(tiny_bundle(None, adapter))

    def leave_out(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        config["use_shared_lime"] = False
        for name in [n for n in tensors if not n.endswith(".LiMEs")]:
            del tensors[name]

    with pytest.raises(LimeEdgeError, match="LiME_shared and gamma: expected those of the bundle's adapter"):
        read_vectors(make_folder(adapter, tmp_path / "later", bundle, leave_out), bundle)


def test_a_whole_adapter_is_taken_only_if_it_is_the_bundles(tiny_adapter: Make, tiny_bundle: Make) -> None:
    bundle = Bundle.open(tiny_bundle(None, tiny_adapter()))
    same = read_vectors(tiny_adapter(), bundle)
    for expert in same:
        stored = read_expert(bundle.path / "experts" / f"{expert.name}.safetensors")
        assert np.array_equal(expert.vector, stored.vector), expert.name
    with pytest.raises(LimeEdgeError, match="shared adapter"):
        read_vectors(tiny_adapter(None, seed=3), bundle)


def test_the_command_line_adds_and_packs(lime: Cli, tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle(None, tiny_adapter(), quant="int8"), tmp_path / "x.lime"))
    folder = make_folder(tiny_adapter(), tmp_path / "later", Bundle.open(bundle))
    packed = tmp_path / "later.safetensors"
    assert lime("experts", "pack", folder, "-o", packed, "--bundle", bundle).code == 0
    assert lime("experts", "add", bundle, folder).code == 0
    assert Bundle.open(bundle, verify=True).manifest.experts[-1] == "later"
    assert np.array_equal(read_expert(bundle / "experts" / "later.safetensors").vector, read_expert(packed).vector)
    assert "exists already" in lime.refuse("experts", "add", bundle, folder)
    assert lime("experts", "add", bundle, folder, "--name", "again").code == 0
    before = (bundle / "lime.json").read_bytes()
    assert "expected one expert, found 4" in lime.refuse("experts", "add", bundle, tiny_adapter(), "--name", "x")
    assert "exists already" in lime.refuse("experts", "add", bundle, tiny_adapter())
    assert (bundle / "lime.json").read_bytes() == before
    words = ("experts", "pack", tiny_adapter(), "-o", packed, "--bundle", bundle, "--expert", "expert2")
    before = packed.read_bytes()
    assert "already exists hint: choose another name or pass --force" in lime.refuse(*words)
    assert packed.read_bytes() == before
    assert lime(*words, "--force").code == 0
    assert read_expert(packed).name == "expert2"
