"""Vision-language models in torch: equal to transformers without an adapter and to the authors' fixtures with one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision_conformance
from models import make_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from vision_models import IMAGE_TOKEN, VIDEO_TOKEN, draw_picture, make_vision_model

from lime_edge.bundle.vision.pictures import Picture, open_picture
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.vision import VisionBackbone, read_vision_backbone
from lime_edge.compiler.formats.vision_families import LLAVA, REFUSED
from lime_edge.compiler.kinds import find_kind, read_checkpoint
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.vision import make_processor

FIXTURES = Path(__file__).parent / "fixtures" / "conformance"
LIMIT = 1e-4
FAMILIES = ("llava_onevision", "smolvlm", "idefics3")
TEXT_ONLY = ("o_proj",)  # a last part that the tower does not have


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of every family; LLaVA's is tied."""
    folder = tmp_path_factory.mktemp("vision")
    return {name: make_vision_model(folder / name, name, tied=name == "llava_onevision") for name in FAMILIES}


def test_fixtures_of_the_authors_in_torch() -> None:
    checks = [*vision_conformance.check_preprocessing(FIXTURES)]
    for path in vision_conformance.list_vision_models(FIXTURES):
        checks += vision_conformance.check_torch_vision(path)
    assert len(checks) > 150
    wrong = [f"{check.fixture} {check.what}: {check.error:.2g} {check.problem}" for check in checks if not check.ok]
    assert not wrong, wrong


SHOWN: dict[str, tuple[Any, ...]] = {
    "image": (draw_picture(40, 66),),
    "two": (draw_picture(33, 47, 1), draw_picture(28, 28, 2)),
    "video": ([draw_picture(30, 41, seed) for seed in range(3)],),
    "none": (),
}


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers_without_an_adapter(
    models: dict[str, Path], tmp_path: Path, family: str, shown: str
) -> None:
    """Every expert's vector is 0, so that the adapter does nothing."""
    if family != "llava_onevision" and shown == "video":
        pytest.skip("transformers makes images of a video's frames there")
    model = models[family]
    adapter = make_adapter(tmp_path / "adapter", model, targets=("q_proj", "o_proj", "out_proj"))
    silence(adapter)
    compiled = compile_checkpoint(read_checkpoint(model, adapter), CompileOptions(quant="none"))
    processor = make_processor(compiled.backbone, model)
    original = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    pictures, vector = tuple(map(open_picture, SHOWN[shown])), compiled.experts["expert0"]
    ids, rows, inputs = [5, 6, 7, 8], None, {}
    if pictures:
        cut = processor.cut(pictures)
        rows = torch.from_numpy(
            np.concatenate(processor.pack(compiled.see(torch.from_numpy(cut.tiles), vector).numpy(), cut))
        )
        ids = [9, *[VIDEO_TOKEN if pictures[0].moves else IMAGE_TOKEN] * len(rows), *ids]
        inputs = feed_original(family, pictures, cut.tiles, cut.counts)
    with torch.no_grad():
        expected = original(input_ids=torch.tensor([ids]), **inputs).logits
    found = DecoderModule(compiled.language)(torch.tensor([ids]), vector - compiled.reference, None, rows)
    assert (found - expected).abs().max() < LIMIT


def silence(adapter: Path) -> None:
    """Make an adapter's experts vectors of zeros."""
    file = adapter / "adapter_model.safetensors"
    tensors = {k: torch.zeros_like(t) if k.endswith(".LiMEs") else t for k, t in load_file(file).items()}
    save_file(tensors, file)


def feed_original(
    family: str, pictures: tuple[Picture, ...], tiles: np.ndarray, counts: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """transformers' own inputs for the same tiles."""
    pixels = torch.from_numpy(tiles)
    if family != "llava_onevision":
        return {"pixel_values": pixels[None]}
    if pictures[0].moves:
        return {"pixel_values_videos": pixels[None]}
    parts = pixels.split(counts)
    padded = [torch.nn.functional.pad(part, (0, 0) * 3 + (0, max(counts) - len(part))) for part in parts]
    sizes = torch.tensor([picture.size for picture in pictures])
    return {
        "pixel_values": torch.stack(padded),
        "image_sizes": sizes,
        "batch_num_images": torch.tensor([len(pictures)]),
    }


SPELLINGS: dict[str, dict[str, str]] = {  # of module tree names, by the version that wrote them
    "built": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.image_newline": "image_newline",
    },
    "old": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.image_newline": "image_newline",
    },
    "4.52": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "5": {},
}


def respell(tensors: dict[str, torch.Tensor], beginnings: dict[str, str]) -> dict[str, torch.Tensor]:
    """Names as another version writes them."""
    found = {}
    for key, tensor in tensors.items():
        tree = LLAVA.spell(key)
        old = next((old for old in beginnings if tree.startswith(old)), "")
        found[beginnings.get(old, "") + tree.removeprefix(old)] = tensor
    return found


def test_four_spellings_are_one_model(models: dict[str, Path], tmp_path: Path) -> None:
    """What transformers has called these modules over time: backbone and adapter are read alike."""
    model = models["llava_onevision"]
    adapter = make_adapter(tmp_path / "adapter", model, targets=("q_proj", "linear_1"))
    read = []
    for name, beginnings in SPELLINGS.items():
        for source, file in ((model, "model.safetensors"), (adapter, "adapter_model.safetensors")):
            folder = tmp_path / name / source.name
            shutil.copytree(source, folder)
            save_file(respell(load_file(source / file), beginnings), folder / file, metadata={"format": "pt"})
        read.append(read_checkpoint(tmp_path / name / model.name, tmp_path / name / "adapter"))
    assert len({one.backbone.fingerprint for one in read}) == 1
    assert all(one.sites == read[0].sites for one in read)
    assert [site.name for site in read[0].sites][:2] == [
        f"model.vision_tower.encoder.layers.{index}.self_attn.q_proj" for index in (0, 1)
    ]


def test_sites_of_tower_and_language_in_order(models: dict[str, Path], tmp_path: Path) -> None:
    """The tower is computed first, so its sites come first; a suffix may mean both."""
    adapter = make_adapter(tmp_path / "adapter", models["smolvlm"], targets=("q_proj", "proj"))
    sites = [site.name for site in read_checkpoint(models["smolvlm"], adapter).sites]
    assert sites == [
        "model.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.vision_model.encoder.layers.1.self_attn.q_proj",
        "model.connector.modality_projection.proj",
        "model.text_model.layers.0.self_attn.q_proj",
        "model.text_model.layers.1.self_attn.q_proj",
    ]


def test_kind_is_found_by_the_config(models: dict[str, Path]) -> None:
    for family in FAMILIES:
        assert find_kind(models[family]).backbone is VisionBackbone


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "fast_vlm", "some_future_vlm"])
def test_other_families_are_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    config = {
        "model_type": kind,
        "architectures": ["XForConditionalGeneration"],
        "vision_config": {},
        "text_config": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_kind(tmp_path).backbone is VisionBackbone
    with pytest.raises(LimeEdgeError, match=kind) as error:
        read_vision_backbone(tmp_path)
    assert REFUSED.get(kind, "not known here") in error.value.problem


@pytest.mark.parametrize(
    ("family", "path", "value", "words"),
    [
        ("llava_onevision", ("vision_feature_layer",), -2, "vision_feature_layer"),
        ("llava_onevision", ("vision_feature_select_strategy",), "default", "vision_feature_select_strategy"),
        ("llava_onevision", ("image_grid_pinpoints",), [[28, 30]], "image_grid_pinpoints"),
        ("smolvlm", ("scale_factor",), 3, "scale_factor"),
        ("smolvlm", ("vision_config", "hidden_size"), 96, "patch_embedding"),
        ("smolvlm", ("vision_config", "num_hidden_layers"), 3, "layers.2"),
        ("smolvlm", ("text_config", "num_hidden_layers"), 3, "layers.2"),
        ("smolvlm", ("image_token_id",), 300, "image tokens"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    models: dict[str, Path], tmp_path: Path, family: str, path: tuple[str, ...], value: Any, words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models[family], folder)
    config = json.loads((folder / "config.json").read_text())
    place = config
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LimeEdgeError, match=words):
        read_vision_backbone(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_normalize": False}, "do_normalize"),
        ({"image_mean": None}, "image_mean"),
        ({"max_image_size": {"longest_edge": 64}}, "max_image_size"),
        ({"resample": 9}, "resample"),
        ({"size": {"height": 3}}, "size"),
    ],
)
def test_processor_settings_are_never_guessed(
    models: dict[str, Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["smolvlm"], folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(LimeEdgeError, match=words):
        make_processor(read_vision_backbone(folder), folder)
    file.unlink()
    with pytest.raises(LimeEdgeError, match="preprocessor_config.json is missing"):
        make_processor(read_vision_backbone(folder), folder)


def test_tower_is_adapted_or_not(models: dict[str, Path], tmp_path: Path) -> None:
    """Sites of the language alone leave features as they are under every expert."""
    model, pixels = models["smolvlm"], torch.randn(2, 3, 32, 32)
    both = make_adapter(tmp_path / "both", model, targets=("q_proj",))
    text = make_adapter(tmp_path / "text", model, targets=TEXT_ONLY)
    for adapter, differs in ((both, True), (text, False)):
        compiled = compile_checkpoint(read_checkpoint(model, adapter), CompileOptions(quant="none"))
        assert compiled.adapts_tower is differs
        seen = [compiled.see(pixels, vector) for vector in compiled.experts.values()]
        assert (not torch.equal(seen[0], seen[1])) is differs
