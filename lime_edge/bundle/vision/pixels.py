"""Resizing and normalising as transformers' PIL processors do it, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lime_edge.errors import need

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # as Pillow numbers them


def resize(image: np.ndarray, height: int, width: int, resample: str) -> np.ndarray:
    """(h, w, 3) uint8 to (height, width, 3) uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise need("Pillow", "vision") from error
    method = Image.Resampling(RESAMPLING[resample])
    return np.array(Image.fromarray(image).resize((width, height), method))


def normalize(tiles: Sequence[np.ndarray], rescale: float, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Tiles (S, S, 3) uint8 as pixel_values (tiles, 3, S, S) float32: (x * rescale - mean) / std.

    Source: transformers 5.23, image_transforms.rescale (in float64, then float32) and normalize (in float32).
    """
    scaled = (np.stack(tiles).astype(np.float64) * rescale).astype(np.float32)
    shifted = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(shifted.transpose(0, 3, 1, 2))
