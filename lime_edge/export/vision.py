"""processor.json of a vision-language model, from its preprocessor's settings and its config."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from lime_edge.bundle.vision.llava import LlavaProcessor
from lime_edge.bundle.vision.pixels import RESAMPLING
from lime_edge.bundle.vision.reading import AnyProcessor, check_processor
from lime_edge.bundle.vision.smolvlm import SmolProcessor
from lime_edge.compiler.formats.files import read_json
from lime_edge.compiler.formats.vision import VisionBackbone
from lime_edge.compiler.formats.vision_families import LLAVA
from lime_edge.errors import Faults, LimeEdgeError

SETTINGS, WHOLE = "preprocessor_config.json", "processor_config.json"
STEPS = ("do_resize", "do_rescale", "do_normalize")  # what both families always do
HINT = "save it with the model: AutoProcessor.from_pretrained(...).save_pretrained(MODEL)"


def make_processor(backbone: VisionBackbone, model: Path) -> AnyProcessor:
    """The processor of a model, from its directory.

    Raises:
        LimeEdgeError: no settings, or settings that the processor does not follow or that contradict config.json; all
            at once.
    """
    settings, file = read_settings(model)
    config = backbone.config
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    with Faults(str(file), "a model reads pictures as it was trained: nothing is guessed") as faults:
        for step in STEPS:
            if settings.get(step, True) is not True:
                faults.add(step, True, settings[step])
        if settings.get("do_center_crop"):
            faults.add("do_center_crop", False, settings["do_center_crop"])
        common = _read_pixels(settings, faults)
        common |= {"tile": tile, "image_token": backbone.image_tokens[0]}
        make = _make_llava if backbone.family is LLAVA else _make_smol
        own = make(backbone, settings, tile, patch, faults)
    kind: Any = LlavaProcessor if backbone.family is LLAVA else SmolProcessor
    processor: AnyProcessor = kind(**common, **own)
    try:
        check_processor(processor)
    except ValueError as error:
        raise LimeEdgeError(f"{file}: {error}", HINT) from None
    return processor


def read_settings(model: Path) -> tuple[dict[str, Any], Path]:
    """The image processor's settings and where they stand: in a file of their own, or in the whole processor's."""
    if (model / SETTINGS).is_file():
        return read_json(model / SETTINGS), model / SETTINGS
    if (model / WHOLE).is_file():
        settings = read_json(model / WHOLE).get("image_processor")
        if isinstance(settings, dict):
            return settings, model / WHOLE
    raise LimeEdgeError(f"{model}: {SETTINGS} is missing: how pictures become tiles is not known", HINT)


def _read_pixels(settings: dict[str, Any], faults: Faults) -> dict[str, Any]:
    """Resampling, scale, mean and deviation."""
    names: dict[Any, str] = {number: name for name, number in RESAMPLING.items()}
    resample, rescale = settings.get("resample"), settings.get("rescale_factor", 1 / 255)
    if resample not in names:
        faults.add("resample", "a number of Pillow's, 0 to 5", resample)
    if not isinstance(rescale, float) or not 0 < rescale <= 1:
        faults.add("rescale_factor", "a number above 0, at most 1", rescale)
    found = {"resample": names.get(resample, "bicubic"), "rescale": rescale}
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        values = settings.get(key)
        if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)):
            faults.add(key, "three numbers", values)
        else:
            found[name] = tuple(map(float, values))
    return found


def _make_llava(
    backbone: VisionBackbone, settings: dict[str, Any], tile: int, patch: int, faults: Faults
) -> dict[str, Any]:
    config, size, grids = backbone.config, settings.get("size"), settings.get("image_grid_pinpoints")
    if size != {"height": tile, "width": tile}:
        faults.add("size", {"height": tile, "width": tile}, size)
    if grids != config.image_grid_pinpoints:
        faults.add("image_grid_pinpoints", f"config.json's {str(config.image_grid_pinpoints)[:200]}", str(grids)[:200])
    newline = backbone.newline
    assert newline is not None
    return {
        "side": tile // patch,
        "grids": tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints),
        "limit": int(str(config.vision_aspect_ratio).removeprefix("anyres_max_")),
        "newline": base64.b64encode(newline.numpy().astype("<f4").tobytes()).decode(),
        "video_token": backbone.image_tokens[1],
    }


def _make_smol(
    backbone: VisionBackbone, settings: dict[str, Any], tile: int, patch: int, faults: Faults
) -> dict[str, Any]:
    largest = settings.get("max_image_size")
    if not isinstance(largest, dict) or largest.get("longest_edge") != tile:
        faults.add("max_image_size", {"longest_edge": tile}, largest)
    size = settings.get("size")
    edge = size.get("longest_edge") if isinstance(size, dict) else None
    if not isinstance(edge, int) or not 1 <= edge <= 1 << 14:
        faults.add("size", "a longest_edge of 1 to 16384 pixels", size)
    split = settings.get("do_image_splitting", True)
    if not isinstance(split, bool):
        faults.add("do_image_splitting", "true or false", split)
    return {"side": tile // patch // backbone.config.scale_factor, "edge": edge, "split": split}
