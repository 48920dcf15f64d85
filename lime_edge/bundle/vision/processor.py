"""What every family's processor has: processor.json of a bundle, and what comes out of cutting pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Protocol

import numpy as np
from msgspec import Meta

from lime_edge.bundle.vision.pictures import Picture
from lime_edge.targets.values import Strict, Width

Side = Annotated[int, Meta(ge=1, le=4096, description="pixels")]
Triple = Annotated[tuple[float, ...], Meta(min_length=3, max_length=3)]


@dataclass(frozen=True)
class Cut:
    """The pictures of one prompt as tiles.

    tiles: (T, 3, S, S) float32, all pictures' in a row. counts: tiles of each picture. pictures: what was cut.
    grids: rows and columns of each picture's tiles, the whole picture's own tile left out; (0, 0) where that is all.
    """

    tiles: np.ndarray = field(repr=False)
    counts: tuple[int, ...]
    pictures: tuple[Picture, ...] = field(repr=False)
    grids: tuple[tuple[int, int], ...]

    def split(self, features: np.ndarray) -> list[np.ndarray]:
        """Features (T, rows, hidden) by picture."""
        return np.split(features, np.cumsum(self.counts)[:-1])


class PixelFacts(Strict, frozen=True, kw_only=True):
    """What all processors know of pixels."""

    tile: Annotated[Side, Meta(description="S: height and width of what the tower sees, in pixels")]
    side: Annotated[Width, Meta(description="rows of features along one side of a tile")]
    resample: Annotated[str, Meta(pattern="^(nearest|lanczos|bilinear|bicubic|box|hamming)$")]
    rescale: Annotated[float, Meta(gt=0, le=1)]
    mean: Triple
    std: Triple
    image_token: Annotated[int, Meta(ge=0, le=1 << 24, description="the placeholder's id")]


class Processor(Protocol):
    """What a family does with pictures. All of it depends on the whole prompt's pictures, so they come together."""

    def cut(self, pictures: tuple[Picture, ...]) -> Cut:
        """Pictures as tiles."""

    def pack(self, features: np.ndarray, cut: Cut) -> list[np.ndarray]:
        """Features (T, rows, hidden) float32 of a cut's tiles as the rows (N, hidden) of each picture, in order."""

    def count(self, cut: Cut) -> list[int]:
        """How many rows `pack` gives for each picture."""

    def spell(self, cut: Cut, known: set[str], image: str) -> list[str]:
        """What stands in the prompt for each picture.

        Args:
            known: the tokens that the tokenizer has. image: the placeholder's text.
        """

    def token(self, picture: Picture) -> int:
        """The placeholder's id for a picture."""
