"""SmolVLM's (and Idefics3's) pictures: whole tiles of a large picture, the picture itself as the last one."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from msgspec import Meta

from lime_edge.bundle.vision.pictures import Picture
from lime_edge.bundle.vision.pixels import normalize, resize
from lime_edge.bundle.vision.processor import Cut, PixelFacts

MOST = 4096  # pixels of a side, whatever the settings say
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"


class SmolProcessor(PixelFacts, frozen=True, tag_field="kind", tag="smolvlm", kw_only=True):
    """SmolVLM. Source of all below: transformers 5.23, SmolVLMImageProcessorPil and SmolVLMProcessor."""

    edge: Annotated[int, Meta(ge=1, le=1 << 14, description="longest side of a picture before it is cut")]
    split: Annotated[bool, Meta(description="cut a picture into tiles; else it is one")]

    def token(self, picture: Picture) -> int:
        """One token for all."""
        return self.image_token

    def cut(self, pictures: tuple[Picture, ...]) -> Cut:
        """Tiles line by line, then the whole picture. Frames of a video: each one tile, however large."""
        tiles, counts, grids = [], [], []
        for picture in pictures:
            mine, grid = [], (0, 0)
            for frame in picture.frames:
                found, grid = self._cut_frame(frame, self.split and not picture.moves)
                mine += found
            tiles += mine
            counts.append(len(mine))
            grids.append(grid)
        return Cut(normalize(tiles, self.rescale, self.mean, self.std), tuple(counts), pictures, tuple(grids))

    def _cut_frame(self, image: np.ndarray, split: bool) -> tuple[list[np.ndarray], tuple[int, int]]:
        s = self.tile
        image = resize(image, *fit_edge(image.shape[0], image.shape[1], self.edge), self.resample)
        if not split:
            return [resize(image, s, s, self.resample)], (0, 0)
        image = resize(image, *fit_tiles(image.shape[0], image.shape[1], s), self.resample)
        height, width = image.shape[:2]
        if height <= s and width <= s:
            return [image], (0, 0)
        down, across = height // s, width // s
        tiles = [image[y * s : (y + 1) * s, x * s : (x + 1) * s] for y in range(down) for x in range(across)]
        return [*tiles, resize(image, s, s, self.resample)], (down, across)

    def pack(self, features: np.ndarray, cut: Cut) -> list[np.ndarray]:
        """Rows of each picture, tile after tile."""
        return [tiles.reshape(-1, tiles.shape[-1]) for tiles in cut.split(features)]

    def count(self, cut: Cut) -> list[int]:
        """How many rows that makes."""
        return [count * self.side**2 for count in cut.counts]

    def spell(self, cut: Cut, known: set[str], image: str) -> list[str]:
        """Placeholders, and tokens that say which tile it is around them where the tokenizer has those."""
        marked, rows = {FAKE, GLOBAL} <= known, image * self.side**2
        spelled = []
        for (down, across), count in zip(cut.grids, cut.counts, strict=True):
            if not marked:
                spelled.append(rows * count)
                continue
            text = "".join(
                "".join(f"{FAKE}<row_{y + 1}_col_{x + 1}>{rows}" for x in range(across)) + "\n" for y in range(down)
            )
            whole = f"{FAKE}{GLOBAL}{rows}{FAKE}"
            spelled.append(text + "\n" + whole if down else whole * count)
        return spelled


def fit_edge(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width with the longer side at `longest`, the other kept in proportion and even; none above MOST."""
    aspect = width / height
    if width >= height:
        width = longest
        height = int(width / aspect)
        height += height % 2
    else:
        height = longest
        width = int(height * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > MOST:
        width, height = MOST, int(MOST / aspect)
    elif height > width and height > MOST:
        height, width = MOST, int(MOST * aspect)
    return max(height, 1), max(width, 1)


def fit_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """The next multiples of a tile, the longer side first."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return height, width
