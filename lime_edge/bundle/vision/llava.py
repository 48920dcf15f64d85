"""LLaVA-OneVision's pictures: the whole one and a grid of tiles; rows packed line by line; videos pooled."""

from __future__ import annotations

import base64
import math
from functools import cached_property
from typing import Annotated

import numpy as np
from msgspec import Meta

from lime_edge.bundle.vision.pictures import Picture
from lime_edge.bundle.vision.pixels import normalize, resize
from lime_edge.bundle.vision.processor import Cut, PixelFacts

SLACK = 1.1  # how much longer a side may be than the limit says before rows are interpolated


class LlavaProcessor(PixelFacts, frozen=True, dict=True, tag_field="kind", tag="llava_onevision", kw_only=True):
    """LLaVA-OneVision.

    Source of all below: transformers 5.23, LlavaOnevisionImageProcessorPil and LlavaOnevisionModel.
    """

    grids: Annotated[
        tuple[tuple[int, int], ...],
        Meta(min_length=1, max_length=4096, description="heights and widths of grids of tiles, in pixels"),
    ]
    limit: Annotated[int, Meta(ge=1, le=4096, description="tiles beyond which rows are interpolated (anyres_max)")]
    newline: Annotated[str, Meta(max_length=1 << 22, description="base64 of float32: the row after each line of tiles")]
    video_token: Annotated[int, Meta(ge=0, le=1 << 24)]

    @cached_property
    def line_end(self) -> np.ndarray:
        """(hidden,) float32."""
        return np.frombuffer(base64.b64decode(self.newline), "<f4")

    def token(self, picture: Picture) -> int:
        """Videos have a token of their own."""
        return self.video_token if picture.moves else self.image_token

    def cut(self, pictures: tuple[Picture, ...]) -> Cut:
        """A picture alone: itself as a tile, then its grid. One of several: padded to a square. Videos: frames."""
        alone = sum(not picture.moves for picture in pictures) == 1
        tiles, counts, grids = [], [], []
        for picture in pictures:
            if picture.moves:
                mine, grid = [self._stretch(frame) for frame in picture.frames], (0, 0)
            elif alone:
                mine, grid = self._cut_grid(picture.frames[0])
            else:
                mine, grid = [self._stretch(self._square(picture.frames[0]))], (0, 0)
            tiles += mine
            counts.append(len(mine))
            grids.append(grid)
        return Cut(normalize(tiles, self.rescale, self.mean, self.std), tuple(counts), pictures, tuple(grids))

    def _stretch(self, image: np.ndarray) -> np.ndarray:
        return resize(image, self.tile, self.tile, self.resample)

    def _square(self, image: np.ndarray) -> np.ndarray:
        """Padded to a square with the mean colour."""
        height, width = image.shape[:2]
        side = max(height, width)
        square = np.empty((side, side, 3), np.uint8)
        square[:] = [int(channel * 255) for channel in self.mean]
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = image
        return square

    def _cut_grid(self, image: np.ndarray) -> tuple[list[np.ndarray], tuple[int, int]]:
        """The whole picture, then its best grid's tiles, aspect kept, padded with black."""
        size = image.shape[:2]
        height, width = choose_grid(size, self.grids)
        new_height, new_width = fit_into(size, (height, width))
        top, left = (height - new_height) // 2, (width - new_width) // 2
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[top : top + new_height, left : left + new_width] = resize(image, new_height, new_width, self.resample)
        s = self.tile
        tiles = [canvas[y : y + s, x : x + s] for y in range(0, height, s) for x in range(0, width, s)]
        return [self._stretch(image), *tiles], (height // s, width // s)

    def pack(self, features: np.ndarray, cut: Cut) -> list[np.ndarray]:
        """Rows of each picture: the whole one's, then the grid's without padding, a newline after each line."""
        return self._pack(features, cut, self.line_end)

    def count(self, cut: Cut) -> list[int]:
        """How many rows that makes."""
        blank = np.zeros((len(cut.tiles), self.side**2, 1), np.float32)
        return [len(rows) for rows in self._pack(blank, cut, np.zeros(1, np.float32))]

    def _pack(self, features: np.ndarray, cut: Cut, newline: np.ndarray) -> list[np.ndarray]:
        packed = []
        for picture, grid, tiles in zip(cut.pictures, cut.grids, cut.split(features), strict=True):
            if picture.moves:
                rows = pool_frames(tiles, self.side)
            elif grid == (0, 0):
                rows = tiles[0]
            else:
                packed.append(np.concatenate([tiles[0], self._pack_grid(tiles[1:], grid, picture.size, newline)]))
                continue
            packed.append(np.concatenate([rows, newline[None]]))
        return packed

    def _pack_grid(
        self, tiles: np.ndarray, grid: tuple[int, int], size: tuple[int, int], newline: np.ndarray
    ) -> np.ndarray:
        (down, across), side = grid, self.side
        field = tiles.reshape(down, across, side, side, -1).transpose(0, 2, 1, 3, 4)
        field = unpad(field.reshape(down * side, across * side, -1), size)
        height, width = field.shape[:2]
        ratio = math.sqrt(height * width / (self.limit * side**2))
        if ratio > SLACK:
            field = interpolate(field, int(height // ratio), int(width // ratio))
        ends = np.broadcast_to(newline, (field.shape[0], 1, field.shape[2]))
        return np.concatenate([field, ends], axis=1).reshape(-1, field.shape[2])

    def spell(self, cut: Cut, known: set[str], image: str) -> list[str]:
        """The placeholder once per row."""
        return [image * count for count in self.count(cut)]


def choose_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The grid that keeps most of a picture (height, width), then wastes least; the first of equals."""
    height, width = size

    def rate(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]

    return max(grids, key=rate)


def fit_into(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a picture as large as it fits into a grid, aspect kept."""
    (height, width), (most_height, most_width) = size, grid
    by_width, by_height = most_width / width, most_height / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), most_height), most_width
    return most_height, min(math.ceil(width * by_height), most_width)


def unpad(field: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Rows and columns of features that are of the picture (height, width) and not of its padding."""
    (height, width), (rows, columns) = size, field.shape[:2]
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return field[cut : rows - cut]
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return field[:, cut : columns - cut]


def pool_frames(tiles: np.ndarray, side: int) -> np.ndarray:
    """Frames (F, side * side, hidden) at half their size, one after another: (N, hidden)."""
    half = math.ceil(side / 2)
    frames = [interpolate(tile.reshape(side, side, -1), half, half) for tile in tiles]
    return np.stack(frames).reshape(-1, tiles.shape[-1])


def interpolate(field: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, pixels as areas: (h, w, C) float32 to (height, width, C).

    Source: torch.nn.functional.interpolate(mode="bilinear", align_corners=False).
    """
    y0, y1, down = _find_neighbours(field.shape[0], height)
    x0, x1, across = _find_neighbours(field.shape[1], width)
    top = field[y0][:, x0] * (1 - across)[None, :, None] + field[y0][:, x1] * across[None, :, None]
    bottom = field[y1][:, x0] * (1 - across)[None, :, None] + field[y1][:, x1] * across[None, :, None]
    return top * (1 - down)[:, None, None] + bottom * down[:, None, None]


def _find_neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new place the old ones on both sides, and how far it lies towards the second (float32)."""
    step = np.float32(old) / np.float32(new)
    place = np.maximum((np.arange(new, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5), 0)
    first = np.minimum(place.astype(np.int64), old - 1)
    return first, np.minimum(first + 1, old - 1), (place - first).astype(np.float32)
