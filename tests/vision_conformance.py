"""The vision fixtures (vision/models, vision/preprocessing) for `tests/conformance.py`: torch and ONNX.

torch is asked twice: the unfolded reference on transformers' own model, and the compiled model that exporters are
compared with. Tiles are cut from the raw pictures and must equal the fixture's bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conformance import (
    EXPORTED_MODEL_LIMIT,
    TORCH_MODEL_LIMIT,
    Check,
    Mode,
    ModelFixture,
    build_backbone,
    compare,
    compare_tokens,
    guard,
)
from encoder_conformance import export_fixture
from msgspec import structs
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import lime_edge
from lime_edge.bundle.vision.llava import LlavaProcessor
from lime_edge.bundle.vision.pictures import Picture, open_picture
from lime_edge.bundle.vision.pixels import RESAMPLING
from lime_edge.bundle.vision.processor import Cut
from lime_edge.bundle.vision.reading import AnyProcessor
from lime_edge.bundle.vision.smolvlm import SmolProcessor
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.authors import respell_state, split_state
from lime_edge.compiler.formats.hyper import ImportOptions
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.decoder import Cache, DecoderModule
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.export.vision import make_processor
from lime_edge.session.generate import GenerationOptions
from lime_edge.session.vision import VisionSession

PIXELS = ("in.pixel_values", "in.pixel_values_videos")


@dataclass(frozen=True)
class VisionCase:
    """One case of vision/models/<name>."""

    name: str
    expected: Mapping[str, Tensor]

    @property
    def ids(self) -> list[int]:
        """The prompt."""
        found: list[int] = self.expected["in.input_ids"][0].tolist()
        return found

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """What was seen: images, or one video."""
        count = sum(key.startswith("raw.") for key in self.expected)
        raw = [self.expected[f"raw.{index}"].numpy() for index in range(count)]
        if PIXELS[1] in self.expected:
            return (open_picture(raw),)
        return tuple(open_picture(one) for one in raw)

    @property
    def pixels(self) -> Tensor | None:
        """(tiles, 3, S, S), those of zeros alone left out; None in a text."""
        found = next((self.expected[key].flatten(0, 1) for key in PIXELS if key in self.expected), None)
        return None if found is None else found[found.flatten(1).any(1)]

    def cut(self, processor: AnyProcessor) -> tuple[Cut, Check]:
        """The pictures' tiles, and whether they are the fixture's; split or not as the fixture was."""
        pixels, pictures = self.pixels, self.pictures
        assert pixels is not None
        cut = processor.cut(pictures)
        if isinstance(processor, SmolProcessor) and len(cut.tiles) != len(pixels):
            cut = structs.replace(processor, split=False).cut(pictures)
        same = cut.tiles.shape == tuple(pixels.shape)
        wrong = int((cut.tiles != pixels.numpy()).sum()) if same else -1
        problem = "" if not wrong else f"{wrong} numbers differ, {cut.tiles.shape} and {tuple(pixels.shape)}"
        return cut, Check(self.name, "tiles, bit for bit", abs(wrong), 0, problem)


def list_vision_models(directory: Path) -> list[Path]:
    """The model fixtures below a directory."""
    return sorted(path.parent for path in (directory / "vision" / "models").glob("*/lime.json"))


def list_cases(path: Path) -> list[VisionCase]:
    """Every case of a model."""
    named = {file: file.stem.removeprefix("expected").strip(".") for file in sorted(path.glob("expected*.safetensors"))}
    return [VisionCase(f"vision/{path.name}/{name or 'image'}", load_file(file)) for file, name in named.items()]


class VisionEngine:
    """What is asked of a model that sees. Modes are as in `conformance`."""

    def see(self, mode: Mode, pixels: Tensor) -> np.ndarray:
        """Features (tiles, rows, hidden)."""
        raise NotImplementedError

    def logits(self, mode: Mode, ids: list[int], rows: np.ndarray | None) -> np.ndarray:
        """(S, V); a row for each placeholder."""
        raise NotImplementedError

    def generate(self, mode: Mode, ids: list[int], rows: np.ndarray | None, count: int) -> list[int]:
        """Greedy new tokens with a cache."""
        raise NotImplementedError

    def generate_anew(self, mode: Mode, ids: list[int], rows: np.ndarray | None, count: int) -> list[int]:
        """Greedy new tokens, the whole sequence at every step."""
        made: list[int] = []
        for _ in range(count):
            made.append(int(self.logits(mode, ids + made, rows)[-1].argmax()))
        return made


class OracleEngine(VisionEngine):
    """The compiled model in torch."""

    def __init__(self, imported: Path):
        checkpoint = read_checkpoint(imported / "backbone", imported / "adapter")
        self.model = compile_checkpoint(checkpoint, CompileOptions(quant="none"))
        self.language = DecoderModule(self.model.language)

    def _vector(self, mode: Mode) -> Tensor | None:
        return None if mode == "routed" else list(self.model.experts.values())[int(mode)]  # type: ignore[arg-type]

    def see(self, mode: Mode, pixels: Tensor) -> np.ndarray:
        found: np.ndarray = self.model.see(pixels, self._vector(mode)).numpy()
        return found

    def _residual(self, mode: Mode) -> Tensor | None:
        vector = self._vector(mode)
        return None if vector is None else vector - self.model.reference

    def logits(self, mode: Mode, ids: list[int], rows: np.ndarray | None) -> np.ndarray:
        features = None if rows is None else torch.from_numpy(rows)
        found: np.ndarray = self.language(torch.tensor([ids]), self._residual(mode), None, features)[0].numpy()
        return found

    def generate(self, mode: Mode, ids: list[int], rows: np.ndarray | None, count: int) -> list[int]:
        cache, made, step = Cache(), list[int](), ids
        features = None if rows is None else torch.from_numpy(rows)
        for _ in range(count):
            logits = self.language(torch.tensor([step]), self._residual(mode), cache, features)
            step, features = [int(logits[0, -1].argmax())], None
            made += step
        return made


class SessionEngine(VisionEngine):
    """An opened bundle."""

    def __init__(self, session: VisionSession):
        self.session = session

    def _use(self, mode: Mode) -> None:
        self.session.use(self.session.experts[mode] if isinstance(mode, int) else mode)  # type: ignore[arg-type]

    def see(self, mode: Mode, pixels: Tensor) -> np.ndarray:
        self._use(mode)
        return self.session.see_tiles(pixels.numpy())

    def _place(self, ids: list[int], rows: np.ndarray | None) -> list[int]:
        return ids if rows is None else self.session.place(ids, rows)

    def logits(self, mode: Mode, ids: list[int], rows: np.ndarray | None) -> np.ndarray:
        self._use(mode)
        return self.session.logits(self._place(ids, rows)).copy()

    def generate(self, mode: Mode, ids: list[int], rows: np.ndarray | None, count: int) -> list[int]:
        self._use(mode)
        options = GenerationOptions(max_new_tokens=count, ignore_eos=True)
        return list(self.session.generate_ids(self._place(ids, rows), options))


def check_case(case: VisionCase, engine: VisionEngine, processor: AnyProcessor, limit: float) -> Iterator[Check]:
    """Compare every expected tensor of a case with what an engine computes."""
    cut: Cut | None = None
    if case.pixels is not None:
        cut, check = case.cut(processor)
        yield check
    rows: dict[Any, np.ndarray | None] = {}

    def see(mode: Mode) -> np.ndarray | None:
        if cut is None or case.pixels is None:
            return None
        if mode not in rows:
            rows[mode] = np.concatenate(processor.pack(engine.see(mode, case.pixels), cut))
        return rows[mode]

    for key, expected in sorted(case.expected.items()):
        if key.startswith(("in.", "raw.")) or key == "tower_features":
            continue
        kind, _, expert = key.removeprefix("pinned_").partition(".")
        mode: Mode = int(expert) if key.startswith("pinned_") else "routed"
        if kind in ("image_features", "video_features"):
            found = see(mode)
            assert found is not None
            yield compare(case.name, key, expected, torch.from_numpy(found), limit)
        elif kind == "logits":
            yield compare(
                case.name, key, expected[0], torch.from_numpy(engine.logits(mode, case.ids, see(mode))), limit
            )
        elif kind in ("generated", "generated_uncached"):
            ask = engine.generate if kind == "generated" else engine.generate_anew
            made = ask(mode, case.ids, see(mode), expected.shape[1] - len(case.ids))
            yield compare_tokens(case.name, key, expected, torch.tensor([case.ids + made]))
        else:
            yield Check(case.name, key, float("inf"), limit, "a key that this script does not know")


def check_reference(path: Path, case: VisionCase) -> Iterator[Check]:
    """The unfolded reference on transformers' own model: logits, and what its projector reads."""
    hyper = json.loads((path / "lime.json").read_text())
    state = respell_state(load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text()))
    backbone, sites = split_state(state)
    fixture = ModelFixture(case.name, path, hyper, case.expected)
    unfolded = UnfoldedModel(build_backbone(fixture, backbone), sites, hyper)
    seen: list[Tensor] = []
    names = ("model.multi_modal_projector", "model.connector")
    projector = next(module for name, module in unfolded.model.named_modules() if name in names)
    projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for key, expected in sorted(case.expected.items()):
        if key.removeprefix("pinned_").partition(".")[0] != "logits":
            continue
        unfolded.use(int(key.rpartition(".")[2]) if key.startswith("pinned_") else "routed")
        found = unfolded.logits(fixture.inputs)
        yield compare(case.name, f"reference: {key}", expected, found, TORCH_MODEL_LIMIT)
        if key == "logits" and "tower_features" in case.expected:
            tower = case.expected["tower_features"]
            yield compare(case.name, "reference: tower_features", tower, seen[-1], TORCH_MODEL_LIMIT)


def check_torch_vision(path: Path) -> Iterator[Check]:
    """One model: the reference, and the compiled model."""
    with tempfile.TemporaryDirectory() as directory:
        imported = Path(directory) / "imported"
        import_checkpoint(path, imported, ImportOptions())
        engine = OracleEngine(imported)
        processor = make_processor(engine.model.backbone, imported / "backbone")
        for case in list_cases(path):
            yield from guard(case.name, check_reference(path, case))
            yield from guard(case.name, check_case(case, engine, processor, TORCH_MODEL_LIMIT))


def check_exported_vision(path: Path, target: str) -> Iterator[Check]:
    """One model through its exported bundle, float32."""
    with tempfile.TemporaryDirectory() as directory:
        session = lime_edge.open(export_fixture(path, Path(directory), (target,)), threads=1)
        assert isinstance(session, VisionSession)
        for case in list_cases(path):
            checks = check_case(case, SessionEngine(session), session.processor, EXPORTED_MODEL_LIMIT)
            yield from guard(case.name, checks)


def check_preprocessing(directory: Path) -> Iterator[Check]:
    """vision/preprocessing: every setting, every picture, by the sha256 of all its numbers."""
    folder = directory / "vision" / "preprocessing"
    if not (folder / "images.safetensors").is_file():
        return
    images = load_file(folder / "images.safetensors")
    for path in sorted(folder.glob("*.safetensors")):
        if path.stem != "images":
            name = f"vision/preprocessing/{path.stem}"
            yield from guard(name, check_setting(name, path, images))


def check_setting(name: str, path: Path, images: Mapping[str, Tensor]) -> Iterator[Check]:
    """One processor setting."""
    expected = load_file(path)
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["preprocessing"])
    processor = build_processor(told["processor"], told["arguments"], told["patch_size"])
    for key, digest in told["sha256"].items():
        cut = processor.cut(tuple(open_picture(images[f"image.{one}"].numpy()) for one in key.split("+")))
        shape = tuple(expected[f"pixel_values_shape.{key}"].tolist())
        tiles = np.ascontiguousarray(cut.tiles, "<f4")
        right = tiles.size == np.prod(shape) and hashlib.sha256(tiles.tobytes()).hexdigest() == digest
        yield Check(
            name, f"pixel_values.{key}", 0 if right else 1, 0, "" if right else "other numbers than transformers"
        )
        counts = torch.tensor(processor.count(cut))
        yield compare_tokens(name, f"num_image_tokens.{key}", expected[f"num_image_tokens.{key}"], counts)
        if f"rows_cols.{key}" in expected:
            yield compare_tokens(name, f"rows_cols.{key}", expected[f"rows_cols.{key}"], torch.tensor(cut.grids[0]))


def build_processor(kind: str, arguments: Mapping[str, Any], patch: int) -> AnyProcessor:
    """A processor from the arguments that transformers' class was given, its defaults filled in from there."""
    import transformers

    defaults = getattr(transformers, kind)(**arguments)
    names = {number: name for name, number in RESAMPLING.items()}
    common = {
        "resample": names[int(defaults.resample)],
        "rescale": defaults.rescale_factor,
        "mean": tuple(defaults.image_mean),
        "std": tuple(defaults.image_std),
        "image_token": 0,
    }
    if kind.startswith("Llava"):
        tile = dict(defaults.size)["height"]
        return LlavaProcessor(
            **common,
            tile=tile,
            side=tile // patch,
            grids=tuple((grid[0], grid[1]) for grid in defaults.image_grid_pinpoints),
            limit=9,
            newline="AAAAAA==",
            video_token=1,
        )
    tile = dict(defaults.max_image_size)["longest_edge"]
    return SmolProcessor(
        **common,
        tile=tile,
        side=tile // patch // 2,
        edge=dict(defaults.size)["longest_edge"],
        split=defaults.do_image_splitting,
    )
