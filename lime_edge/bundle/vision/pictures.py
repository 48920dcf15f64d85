"""A picture from whatever it comes as: a file, an image of Pillow's, an array, or frames of a video."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lime_edge.errors import LimeEdgeError, need

MOST_PIXELS = 1 << 27  # of one picture, 134 million: 400 MB as RGB
MOST_FRAMES, MOST_BYTES = 1024, 1 << 31
LONGEST = 200  # how many times longer than the other a side may be: cutting would leave nothing of it
KINDS = "a path, an image of Pillow's, an array (height, width, 3) uint8, or a list of them: a video's frames"
Source = Any  # KINDS


@dataclass(frozen=True)
class Picture:
    """An image, or a video's frames.

    frames: (height, width, 3) uint8 each. moves: it is a video, however many frames. digest: of what is seen, 16 bytes.
    """

    frames: tuple[np.ndarray, ...] = field(repr=False)
    moves: bool
    digest: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the first frame, in pixels."""
        return self.frames[0].shape[0], self.frames[0].shape[1]


def open_picture(source: Source) -> Picture:
    """An image, or the frames of a video given as a list.

    Transparency is laid on white. Of a file that moves (GIF, APNG, WebP) the first frame is taken: who wants a video
    gives its frames.

    Args:
        source: see KINDS. Arrays are (height, width) or (height, width, 1, 3 or 4) uint8.
    Raises:
        LimeEdgeError: nothing of that kind, a damaged file, too many pixels or frames, or a shape that is no picture's.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, (list, tuple)):
        return _open_video(source)
    frame = _open_frame(source)
    return Picture((frame,), False, _hash([frame], False))


def _open_video(sources: Sequence[Source]) -> Picture:
    if not 1 <= len(sources) <= MOST_FRAMES:
        raise LimeEdgeError(f"video: expected 1 to {MOST_FRAMES} frames, found {len(sources)}", "take fewer of them")
    frames, held = [], 0
    for index, source in enumerate(sources):
        if isinstance(source, (list, tuple)):
            raise LimeEdgeError(f"video: frame {index}: expected a picture, found a list", KINDS)
        frames.append(_open_frame(source))
        held += frames[-1].nbytes
        if held > MOST_BYTES:
            raise LimeEdgeError(
                f"video: more than {MOST_BYTES >> 30} GB of frames", "take fewer of them, or smaller ones"
            )
    if len({frame.shape for frame in frames}) > 1:
        raise LimeEdgeError("video: frames of different sizes", "cut or resize them to one size")
    return Picture(tuple(frames), True, _hash(frames, True))


def _hash(frames: Sequence[np.ndarray], moves: bool) -> bytes:
    digest = hashlib.blake2b(bytes([moves]), digest_size=16)
    for frame in frames:
        digest.update(repr(frame.shape).encode())
        digest.update(np.ascontiguousarray(frame).data)
    return digest.digest()


def _open_frame(source: Source) -> np.ndarray:
    """One image as (height, width, 3) uint8."""
    if isinstance(source, np.ndarray):
        return _check_array(source)
    image_class = _pillow().Image
    if isinstance(source, image_class):
        return _to_rgb(source, "image")
    if isinstance(source, (str, Path)):
        return _open_file(Path(source))
    raise LimeEdgeError(f"image: expected {KINDS}, found {type(source).__name__}")


def _open_file(path: Path) -> np.ndarray:
    pillow = _pillow()
    if not path.is_file():
        raise LimeEdgeError(f"{path}: no such image file", "give the path of a PNG, JPEG, WebP or GIF file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of many pixels; the limit below is what decides
            with pillow.open(path) as image:
                _check_size(image.width, image.height, str(path))
                return _to_rgb(image, str(path))
    except LimeEdgeError:
        raise
    except Exception as error:  # decoders of two dozen formats raise anything
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise LimeEdgeError(
            f"{path}: not a readable image: {first[:200]}", "is it whole? PNG and JPEG always work"
        ) from None


def _to_rgb(image: Any, where: str) -> np.ndarray:
    """Any mode of Pillow's as RGB. Source: transformers 5.23, image_transforms.convert_to_rgb."""
    _check_size(image.width, image.height, where)
    pillow = _pillow()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _to_bytes(np.asarray(image), where)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        return np.array(pillow.alpha_composite(white, image).convert("RGB"))
    return np.array(image.convert("RGB"))


def _to_bytes(values: np.ndarray, where: str) -> np.ndarray:
    """Grey of 16 bits or more as RGB: Pillow alone would cut it off at 255."""
    if not np.isfinite(values).all():
        raise LimeEdgeError(f"{where}: pixels that are no numbers", "store it with 8 bits a channel")
    largest = float(values.max())
    scale = 1.0 if largest <= 255 else 255 / 65535 if largest <= 65535 else 255 / largest
    grey = np.clip(np.rint(values.astype(np.float64) * scale), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def _check_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise LimeEdgeError(
            f"image: expected an array (height, width, 3) of uint8, found {array.shape} {array.dtype}",
            "channels come last, values go from 0 to 255",
        )
    _check_size(array.shape[1], array.shape[0], "image")
    if array.ndim == 2 or array.shape[2] == 1:
        return np.ascontiguousarray(np.broadcast_to(array.reshape(*array.shape[:2], 1), (*array.shape[:2], 3)))
    if array.shape[2] == 4:
        return _to_rgb(_pillow().fromarray(array, "RGBA"), "image")
    return array.copy()  # who gave it may change it


def _check_size(width: int, height: int, where: str) -> None:
    if width < 1 or height < 1:
        raise LimeEdgeError(f"{where}: an image of {width} x {height} pixels", "there is nothing to see")
    if width * height > MOST_PIXELS:
        raise LimeEdgeError(
            f"{where}: {width} x {height} is more than {MOST_PIXELS >> 20} million pixels", "make it smaller first"
        )
    if max(width, height) > LONGEST * min(width, height):
        raise LimeEdgeError(
            f"{where}: {width} x {height}: one side is more than {LONGEST} times the other", "cut it first"
        )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise need("Pillow", "vision") from error
    return Image
