"""Pictures from whatever they come as: an answer or a clear error, never a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from vision_conformance import build_processor
from vision_models import SETTINGS, draw_picture

from lime_edge.bundle.vision import pictures
from lime_edge.bundle.vision.llava import interpolate
from lime_edge.bundle.vision.pictures import open_picture
from lime_edge.bundle.vision.reading import decode_processor
from lime_edge.errors import LimeEdgeError

PICTURE = draw_picture(20, 30)


def save(folder: Path, name: str, image: Image.Image, **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_a_path_an_image_and_an_array_are_one_picture(tmp_path: Path) -> None:
    image = Image.fromarray(PICTURE)
    sources = [PICTURE, image, save(tmp_path, "a.png", image), str(tmp_path / "a.png")]
    found = [open_picture(source) for source in sources]
    assert len({one.digest for one in found}) == 1
    assert all(np.array_equal(one.frames[0], PICTURE) for one in found)
    assert open_picture(found[0]) is found[0]


def test_what_is_seen_makes_the_digest() -> None:
    """A video of one frame is not that frame, and shape counts where the bytes are equal."""
    other = PICTURE.copy()
    other[3, 4, 1] ^= 1
    sources = [PICTURE, other, [PICTURE], [PICTURE, PICTURE], PICTURE.reshape(30, 20, 3)]
    assert len({open_picture(source).digest for source in sources}) == len(sources)


def test_an_array_may_change_afterwards() -> None:
    array = PICTURE.copy()
    picture = open_picture(array)
    array[:] = 0
    assert np.array_equal(picture.frames[0], PICTURE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(PICTURE)
    converted = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    frame = open_picture(converted).frames[0]
    assert frame.shape == (20, 30, 3) and frame.dtype == np.uint8
    if mode in ("RGBA", "LA", "L"):
        expected = np.array(image.convert("L" if mode != "RGBA" else "RGB").convert("RGB"))
        assert np.array_equal(frame, expected)


def test_transparency_is_white_as_in_transformers() -> None:
    pixels = np.dstack([PICTURE, np.full((20, 30), 40, np.uint8)])
    image = Image.fromarray(pixels, "RGBA")
    from transformers.image_transforms import convert_to_rgb

    assert np.array_equal(open_picture(image).frames[0], convert_to_rgb(image, return_numpy=True))
    palette = Image.fromarray(PICTURE).convert("P")
    palette.info["transparency"] = 0
    assert np.array_equal(open_picture(palette).frames[0], convert_to_rgb(palette, return_numpy=True))


def test_a_file_that_moves_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(draw_picture(20, 30, seed)) for seed in range(3)]
    for name in ("a.gif", "a.png", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        file = save(tmp_path, name, frames[0], save_all=True, append_images=frames[1:], **options)
        picture = open_picture(file)
        assert not picture.moves and picture.size == (20, 30)
        if name != "a.gif":
            assert np.array_equal(picture.frames[0], np.array(frames[0]))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (2, 3)])
@pytest.mark.parametrize("family", ["llava_onevision", "smolvlm"])
def test_the_smallest_pictures_have_tiles(family: str, size: tuple[int, int]) -> None:
    """And the tiles are those of transformers."""
    settings = {k: v for k, v in SETTINGS[family].items() if k != "image_processor_type"}
    kind = SETTINGS[family]["image_processor_type"] + "Pil"
    picture = open_picture(draw_picture(*size))
    tiles = build_processor(kind, settings, 14 if family == "llava_onevision" else 8).cut((picture,)).tiles
    assert np.isfinite(tiles).all()
    image = Image.fromarray(picture.frames[0])
    expected = getattr(transformers, kind)(**settings)(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(tiles, expected.reshape(tiles.shape))


def test_too_large_pictures_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file may claim any size; a hundred megapixels are still read."""
    for size, words in (((15000, 10000), "15000 x 10000 is more than"), ((20000, 10000), "decompression bomb")):
        file = save(tmp_path, "bomb.png", Image.new("1", size))
        assert file.stat().st_size < 100_000
        with pytest.raises(LimeEdgeError, match=words):
            open_picture(file)
    assert pictures.MOST_PIXELS > 100_000_000
    monkeypatch.setattr(pictures, "MOST_PIXELS", 500)
    with pytest.raises(LimeEdgeError, match="million pixels"):
        open_picture(PICTURE)
    with pytest.raises(LimeEdgeError, match="million pixels"):
        open_picture(Image.fromarray(PICTURE))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((3, 8, 8), np.uint8), "height, width, 3"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0"),
        (np.zeros((4, 4, 2), np.uint8), "height, width, 3"),
        (np.zeros((1, 900, 3), np.uint8), "200 times"),
        ("nowhere.png", "no such image file"),
        (b"bytes", "expected a path"),
        (None, "expected a path"),
        ([], "1 to 1024 frames"),
        ([PICTURE, draw_picture(20, 31)], "different sizes"),
        ([[PICTURE]], "found a list"),
        (Image.new("F", (4, 4), float("nan")), "no numbers"),
    ],
)
def test_what_is_no_picture_is_refused(source: Any, words: str) -> None:
    with pytest.raises(LimeEdgeError, match=words):
        open_picture(source)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    """Cut anywhere, or with bytes changed: a picture or a LimeEdgeError."""
    whole = {}
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.tif", "a.bmp"):
        whole[name] = save(tmp_path, name, Image.fromarray(PICTURE)).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for name, data in whole.items():
        for _ in range(40):
            damaged = bytearray(data[: random.integers(1, len(data) + 1)])
            for place in random.integers(0, len(damaged), 3):
                damaged[place] ^= int(random.integers(1, 256))
            file = tmp_path / f"damaged-{name}"
            file.write_bytes(damaged)
            try:
                assert open_picture(file).frames[0].dtype == np.uint8
            except LimeEdgeError as error:
                assert str(file) in error.problem
                refused += 1
    assert refused > 100


def test_bilinear_is_torchs() -> None:
    import torch

    field = np.random.default_rng(0).standard_normal((27, 27, 5)).astype(np.float32)
    for height, width in ((14, 14), (20, 9), (27, 27), (31, 40), (1, 1)):
        tensor = torch.from_numpy(field).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(tensor, [height, width], mode="bilinear")[0].permute(1, 2, 0)
        assert np.abs(interpolate(field, height, width) - expected.numpy()).max() < 1e-5, (height, width)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"kind": "other"}',
        b'{"kind":"smolvlm","tile":32,"side":2,"resample":"area","rescale":0.1,"mean":[0,0,0],"std":[1,1,1],'
        b'"image_token":1,"edge":64,"split":true}',
        b'{"kind":"smolvlm","tile":32,"side":2,"resample":"box","rescale":0.1,"mean":[0,0,0],"std":[0,1,1],'
        b'"image_token":1,"edge":64,"split":true}',
        b'{"kind":"smolvlm","tile":32,"side":2,"resample":"box","rescale":0.1,"mean":[0,0,0],"std":[1,1,1],'
        b'"image_token":1,"edge":99999999,"split":true}',
    ],
)
def test_a_damaged_processor_is_refused(data: bytes) -> None:
    with pytest.raises(LimeEdgeError, match="processor.json"):
        decode_processor(data, "processor.json")
