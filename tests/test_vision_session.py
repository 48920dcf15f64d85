"""The session of a vision-language bundle: pictures, prompts, caches, experts; against the oracle in torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import make_adapter
from PIL import Image
from prebuilt import Make
from test_cli import Cli
from vision_models import IMAGE, IMAGE_TOKEN, draw_picture, make_vision_model

import lime_edge
from lime_edge.bundle.vision.pictures import open_picture
from lime_edge.checks.verify import verify_bundle
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.model.vision import CompiledVision
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.session import cache
from lime_edge.session.features import FeatureRows
from lime_edge.session.vision import VisionSession
from lime_edge.targets.devices import find_device

BOTH, TEXT = ("q_proj", "o_proj", "out_proj"), ("o_proj", "down_proj")
FIRST, SECOND = draw_picture(45, 60), draw_picture(45, 60, 1)
LIMIT = 1e-3
ROUTING = {"auto_topk": True, "auto_topk_threshold": 0.6, "soft_topk_temperature": 0.2}


@pytest.fixture(scope="session")
def vision_bundle(shared_folder: Path) -> Make:
    """vision_bundle(family, targets, routing, **options): a tiny bundle that sees, float32 unless told otherwise."""
    from conftest import remember

    def make(
        directory: Path,
        family: str = "smolvlm",
        targets: tuple[str, ...] = BOTH,
        routing: Any = None,
        activation: Any = None,
        **options: Any,
    ) -> Path:
        model = make_vision_model(directory / "model", family)
        adapter = make_adapter(
            directory / "adapter",
            model,
            targets=targets,
            routing=dict(routing) if routing else None,
            activation=activation,
        )
        compiling = CompileOptions(**({"quant": "none"} | options))
        export_bundle(model, adapter, directory / "x.lime", compiling, find_device("cpu"), ExportOptions())
        return directory / "x.lime"

    return remember(shared_folder / "vision", make)


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


def open_session(bundle: Path, **options: Any) -> VisionSession:
    session = lime_edge.open(bundle, threads=1, **options)
    assert isinstance(session, VisionSession)
    return session


def compile_beside(bundle: Path) -> CompiledVision:
    """The oracle of a float32 bundle."""
    checkpoint = read_checkpoint(bundle.parent / "model", bundle.parent / "adapter")
    found: CompiledVision = compile_checkpoint(checkpoint, CompileOptions(quant="none"))
    return found


def ask_oracle(
    model: CompiledVision, session: VisionSession, name: str, images: list[Any], ids: list[int]
) -> np.ndarray:
    """Logits of a prompt whose placeholders stand one for each row."""
    vector = None if name == "routed" else model.experts[name]
    cut = session.processor.cut(tuple(map(open_picture, images)))
    rows = np.concatenate(session.processor.pack(model.see(torch.from_numpy(cut.tiles), vector).numpy(), cut))
    residual = None if vector is None else vector - model.reference
    found: np.ndarray = DecoderModule(model.language)(torch.tensor([ids]), residual, None, torch.from_numpy(rows))[
        0
    ].numpy()
    return found


def spell_out(session: VisionSession, ids: list[int]) -> list[int]:
    """A prompt's ids with placeholders in the place of rows."""
    found, _ = session._eyes.features.resolve(np.array([ids]))
    spelled: list[int] = found[0].tolist()
    return spelled


def test_logits_are_the_oracles(vision_bundle: Make) -> None:
    bundle = vision_bundle()
    session, model = open_session(bundle), compile_beside(bundle)
    for name in ("expert0", "expert2"):
        session.use(name)
        ids = session.read_prompt(f"{IMAGE}look{IMAGE}at it", [FIRST, SECOND])
        expected = ask_oracle(model, session, name, [FIRST, SECOND], spell_out(session, ids))
        assert np.abs(session.logits(ids) - expected).max() < LIMIT, name


def test_golden_outputs_hold_and_a_swapped_tower_does_not(vision_bundle: Make, tmp_path: Path) -> None:
    bundle = vision_bundle()
    assert not verify_bundle(bundle).missed
    other = tmp_path / "other.lime"
    shutil.copytree(bundle, other)
    with (other / "onnx" / "vision.onnx.data").open("r+b") as file:
        file.seek(4096)
        file.write(b"\x11" * 400)
    with pytest.raises(LimeEdgeError, match="vision.onnx.data"):
        verify_bundle(other)


@pytest.mark.check
@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llava_onevision", "smolvlm"])
def test_quantized_bundles_hold_their_golden_outputs(vision_bundle: Make, family: str, quant: str) -> None:
    bundle = vision_bundle(family=family, quant=quant, targets=BOTH)
    assert not verify_bundle(bundle).missed
    told = json.loads((bundle / "lime.json").read_text())["quantization"]["survival"]
    assert any("vision" in site for site in told["sites"]) and any(
        "language" in s or "text" in s for s in told["sites"]
    )


def test_two_pictures_and_one_text_share_no_cache(vision_bundle: Make) -> None:
    session = open_session(vision_bundle())
    prompt = f"{IMAGE}what is it?"
    alone = {}
    for name, picture in (("first", FIRST), ("second", SECOND)):
        session.reset()
        alone[name] = list(session.generate_ids(session.read_prompt(prompt, [picture])))
    ids = [session.read_prompt(prompt, [picture]) for picture in (FIRST, SECOND)]
    assert spell_out(session, ids[0]) == spell_out(session, ids[1]) and ids[0] != ids[1]
    session.reset()
    assert "".join(session.generate(prompt, images=[FIRST], keep_cache=True)) == session.codec.decode(alone["first"])
    kept = session._count_kept(ids[1], True)
    assert kept == ids[0].index(min(i for i in ids[0] if i >= 300)) == 0
    assert "".join(session.generate(prompt, images=[SECOND], keep_cache=True)) == session.codec.decode(alone["second"])
    assert session._count_kept(ids[1], True) > 20, "the same picture again is kept"


def test_a_long_prompt_in_pieces_is_the_same(vision_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(vision_bundle())
    ids = session.read_prompt(f"a text before {IMAGE} between {IMAGE} and after", [FIRST, SECOND])
    whole = session.logits(ids).copy()
    monkeypatch.setattr(cache, "CHUNK", 7)
    assert np.abs(session.logits(ids) - whole).max() < 1e-4


def count_calls(session: VisionSession, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tiles of every call of the tower from now on."""
    calls: list[int] = []
    see = session._eyes.see

    def watch(tiles: np.ndarray) -> np.ndarray:
        calls.append(len(tiles))
        return see(tiles)

    monkeypatch.setattr(session._eyes, "see", watch)
    return calls


@pytest.mark.parametrize(("targets", "anew"), [(BOTH, True), (TEXT, False)])
def test_features_are_kept_where_no_site_is_in_the_tower(
    vision_bundle: Make, monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...], anew: bool
) -> None:
    bundle = vision_bundle(targets=targets)
    session, model = open_session(bundle), compile_beside(bundle)
    calls = count_calls(session, monkeypatch)
    session.use("expert0")
    session.see(FIRST)
    first = session.read_prompt(f"{IMAGE}hm", [FIRST])
    assert calls == [5], "seen once, then kept"
    session.use("expert1")
    second = session.read_prompt(f"{IMAGE}hm", [FIRST])
    assert calls == ([5, 5] if anew else [5]) and (first != second) is anew
    expected = ask_oracle(model, session, "expert1", [FIRST], spell_out(session, second))
    assert np.abs(session.logits(second) - expected).max() < LIMIT
    session.use("expert0")
    assert session.read_prompt(f"{IMAGE}hm", [FIRST]) == first and len(calls) == 1 + anew


def test_many_rows_see_different_pictures(vision_bundle: Make) -> None:
    """Row for row what a session of its own says, each picture seen by the row's expert."""
    session = open_session(vision_bundle())
    asked = [("expert0", FIRST), ("expert1", FIRST), ("expert1", SECOND), ("expert3", SECOND)]
    prompts = [(session.read_prompt(f"{IMAGE}so", [image], name), name) for name, image in asked]
    expected = []
    for name, image in asked:
        session.use(name)
        expected.append("".join(session.generate(f"{IMAGE}so", images=[image], max_new_tokens=8)))
    told = [(f"{IMAGE}so", name, None, [image]) for name, image in asked]
    for requests in (prompts, told):
        found = [""] * len(asked)
        for row, piece in session.generate_many(requests, max_new_tokens=8):
            found[row] += piece
        assert found == expected and len(set(expected)) > 1


def test_the_original_model_sees_for_itself(vision_bundle: Make) -> None:
    """None is a selection: what the original model sees is not what the expert in use does."""
    session = open_session(vision_bundle())
    session.use("expert1")
    mine, other = (session.read_prompt(f"{IMAGE}so", [FIRST], one) for one in ("expert1", None))
    assert mine == session.read_prompt(f"{IMAGE}so", [FIRST]) != other
    session.use(None)
    assert session.read_prompt(f"{IMAGE}so", [FIRST]) == other


@pytest.mark.check
def test_routed_all_tiles_in_one_call(vision_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = vision_bundle(routing=tuple(ROUTING.items()))
    session, model = open_session(bundle), compile_beside(bundle)
    session.use("routed")
    calls = count_calls(session, monkeypatch)
    session.see(FIRST)
    assert not calls, "what is seen depends on what else is"
    ids = session.read_prompt(f"{IMAGE}{IMAGE}routed", [FIRST, SECOND])
    assert calls == [10]
    expected = ask_oracle(model, session, "routed", [FIRST, SECOND], spell_out(session, ids))
    assert np.abs(session.logits(ids) - expected).max() < LIMIT
    alone = session.read_prompt(f"{IMAGE}routed", [FIRST])
    assert calls == [10, 5] and set(alone[:20]).isdisjoint(ids)


@pytest.mark.check
def test_the_original_model_sees_before_the_generation_prompt(vision_bundle: Make) -> None:
    """An expert that acts from the generation prompt on neither sees nor reads what lies before it."""
    bundle = vision_bundle(activation={"kind": "generation_prompt", "tokens": 3})
    assert not verify_bundle(bundle).missed
    session = open_session(bundle)
    asked = []
    for name in ("expert0", "expert1"):
        session.use(name)
        asked.append(session.read_prompt(f"{IMAGE}so", [FIRST]))
    assert asked[0] == asked[1]


@pytest.mark.check
def test_llava_images_and_videos(vision_bundle: Make) -> None:
    bundle = vision_bundle(family="llava_onevision")
    session, model = open_session(bundle), compile_beside(bundle)
    session.use("expert2")
    video = [draw_picture(30, 41, seed) for seed in range(3)]
    for prompt, images in ((f"{IMAGE}x", [FIRST]), (f"{IMAGE}{IMAGE}x", [FIRST, SECOND]), ("<video>x", [video])):
        ids = session.read_prompt(prompt, images)
        expected = ask_oracle(model, session, "expert2", images, spell_out(session, ids))
        assert np.abs(session.logits(ids) - expected).max() < LIMIT, prompt


def test_messages_with_content_lists(vision_bundle: Make) -> None:
    session = open_session(vision_bundle())
    listed = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    plain = [{"role": "user", "content": "what?"}]
    ids = [session.read_prompt(messages, [FIRST]) for messages in (listed, plain)]
    assert ids[0] == ids[1]
    text = session.codec.render_chat(listed)
    assert text == f"<|im_start|>user\n{IMAGE}what?<|im_end|>\n<|im_start|>assistant\n"
    assert session.read_prompt(text, [FIRST]) == ids[0]
    assert session.read_prompt(plain) == session.codec.encode(session.codec.render_chat(plain))
    pieces = session.codec.encode(text)
    assert session.read_prompt(pieces, [FIRST]) == ids[0], "a placeholder each, in ids"
    assert session.read_prompt(spell_out(session, ids[0]), [FIRST]) == ids[0], "or one for each row"


@pytest.mark.parametrize(
    ("prompt", "images", "words"),
    [
        ("no place", [FIRST], "no placeholder"),
        (f"{IMAGE}{IMAGE}", [FIRST], "more placeholders"),
        (f"{IMAGE}", [FIRST, SECOND], "no placeholder"),
        (f"{IMAGE} bare", [], "without a picture"),
        ([5, IMAGE_TOKEN, IMAGE_TOKEN], [FIRST], "2 placeholders"),
        ([{"role": "system", "content": "x"}], [FIRST], "no user's turn"),
        ([300], [], "no picture that is held"),
        (f"{IMAGE}", ["nowhere.png"], "no such image file"),
    ],
)
def test_prompts_that_do_not_fit_their_pictures(
    vision_bundle: Make, prompt: Any, images: list[Any], words: str
) -> None:
    session = open_session(vision_bundle())
    with pytest.raises(LimeEdgeError, match=words):
        list(session.generate(prompt, images=images))


def test_tiles_of_ones_own(vision_bundle: Make) -> None:
    session = open_session(vision_bundle())
    tiles = session.processor.cut((open_picture(FIRST),)).tiles
    rows = session.see_tiles(np.concatenate([tiles, np.zeros_like(tiles[:1])]))
    assert rows.shape == (5, 4, 64), "a tile of zeros is padding"
    ids = session.place([IMAGE_TOKEN] * 20 + [7], rows.reshape(-1, 64))
    assert np.array_equal(session.logits(ids), session.logits(session.read_prompt([IMAGE_TOKEN, 7], [FIRST])))
    for wrong in (tiles[0], tiles[:, :, :30], tiles.astype(np.int64)):
        with pytest.raises(LimeEdgeError, match="tiles: expected"):
            session.see_tiles(wrong)
    with pytest.raises(LimeEdgeError, match="2 placeholders"):
        session.place([IMAGE_TOKEN] * 2, rows[0])


def test_the_oldest_features_are_forgotten() -> None:
    rows = FeatureRows(100, 4, (7,), limit=3 * 16 * 5)
    ids = [rows.add(name, np.full((5, 4), index, np.float32), 7) for index, name in enumerate("abcd")]
    assert rows.find("a") is None and [rows.find(name) for name in "bcd"] == ids[1:]
    found, values = rows.resolve(np.array([[3, ids[3][1], ids[1][4], 5]]))
    assert found.tolist() == [[3, 7, 7, 5]] and values[:, 0].tolist() == [3, 1]
    with pytest.raises(LimeEdgeError, match="see the picture again"):
        rows.resolve(np.array([[ids[0][0]]]))
    with pytest.raises(LimeEdgeError, match="bare|without a picture"):
        rows.resolve(np.array([[7, ids[3][1]]]))


def test_the_command_line_sees(vision_bundle: Make, tmp_path: Path, lime: Cli) -> None:
    bundle = vision_bundle()
    Image.fromarray(FIRST).save(tmp_path / "a.png")
    session = open_session(bundle)
    session.use("expert1")
    messages = [{"role": "user", "content": "what?"}]
    expected = "".join(session.generate(messages, images=[FIRST], max_new_tokens=6))
    told = ["--image", tmp_path / "a.png", "--max-new-tokens", 6, "--json"]
    done = lime("run", bundle, "what?", "--expert", "expert1", *told)
    assert done.code == 0 and json.loads(done.out)["answer"] == expected
    many = lime("run", bundle, "what?", "--expert", "expert1,expert2", *told)
    assert json.loads(many.out)["answers"][0]["answer"] == expected
    assert "no such image file" in lime.refuse("run", bundle, "what?", "--image", "nowhere.png")


def test_eval_with_an_image_column(vision_bundle: Make, tiny_bundle: Make, tmp_path: Path, lime: Cli) -> None:
    """The answer that the session itself gives is right for one picture, wrong for the other."""
    bundle = vision_bundle()
    session, right = open_session(bundle), []
    session.use("expert2")
    for name, image in (("a.png", FIRST), ("b.png", SECOND)):
        Image.fromarray(image).save(tmp_path / name)
        right.append("".join(session.generate(f"{IMAGE}so", images=[image], max_new_tokens=16)).strip())
    assert right[0] != right[1]
    shown = [("a.png", right[0]), ("b.png", right[0]), (["b.png"], right[1]), (["a.png", "b.png"], "no")]
    lines = [
        {"prompt": f"{IMAGE * (1 + (len(image) == 2))}so", "answer": answer, "image": image} for image, answer in shown
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    done = lime("eval", bundle, "--data", data, "--expert", "expert2", "--json")
    assert json.loads(done.out)["accuracy"] == 0.5, done
    assert "sees no pictures" in lime.refuse("eval", tiny_bundle(), "--data", data)
    data.write_text('{"prompt": "x", "answer": "y", "image": 3}')
    assert "image must be a path" in lime.refuse("eval", bundle, "--data", data)


def test_a_language_model_refuses_pictures(tiny_bundle: Make, lime: Cli) -> None:
    assert "sees no pictures" in lime.refuse("run", tiny_bundle(), "what?", "--image", "a.png")
