"""Scenes for training, painted by worker processes while the model trains."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from scenes import SEED, SIDE, Scene, make_scene
from torch import Tensor

SHARD = 128

Encode = Callable[[Scene], list[int]]


class Feed:
    """A growing store of pictures and labels on the training device.

    Args:
        encode: what is to be learned about a scene, as integers of a fixed count.
        count: scenes in all. workers: processes (0: paint everything here, before training).
        split, first: which scenes (see scenes.make_scene).
    """

    def __init__(self, encode: Encode, count: int, workers: int, split: str = "train", first: int = 0) -> None:
        self._shards = [(split, first + k, min(SHARD, count - k), encode) for k in range(0, count, SHARD)]
        self._filled = threading.Condition()
        self._workers, self.count, self.ready = workers, count, 0
        self._pool = None
        if workers:  # before CUDA starts: a fork must not inherit it
            self._pool = multiprocessing.get_context("fork").Pool(workers)

    def start(self, device: str) -> None:
        """Begin to fill the store on a device."""
        width = len(_paint_shard(self._shards[0])[1][0])
        self.pixels = torch.empty((self.count, SIDE, SIDE, 3), dtype=torch.uint8, device=device)
        self.labels = torch.empty((self.count, width), dtype=torch.int64, device=device)
        if self._pool is None:
            self._fill(map(_paint_shard, self._shards))
        else:
            results = self._pool.imap(_paint_shard, self._shards)
            threading.Thread(target=self._fill, args=(results,), daemon=True).start()

    def _fill(self, results) -> None:
        on_gpu = self.pixels.device.type == "cuda"
        stream = torch.cuda.Stream() if on_gpu else None  # its own: copies must not queue behind training steps
        for pixels, labels in results:
            end = self.ready + len(labels)
            with torch.cuda.stream(stream) if stream else nullcontext():
                self.pixels[self.ready : end].copy_(torch.from_numpy(pixels))
                self.labels[self.ready : end].copy_(torch.from_numpy(labels))
            if stream:
                stream.synchronize()
            with self._filled:
                self.ready = end
                self._filled.notify_all()

    def wait(self, count: int) -> None:
        """Wait until so many scenes are there."""
        with self._filled:
            self._filled.wait_for(lambda: self.ready >= min(count, self.count))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw pictures (N, 3, S, S) in [-1, 1], unaltered, and labels (N, ...) from what is there."""
        chosen = torch.randint(self.ready, (count,), generator=generator).to(self.pixels.device)
        return scale_pixels(self.pixels[chosen]), self.labels[chosen]

    def stop(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.terminate()


def _paint_shard(task: tuple[str, int, int, Encode]) -> tuple[np.ndarray, np.ndarray]:
    split, first, count, encode = task
    pairs = [make_scene(index, split, SEED) for index in range(first, first + count)]
    return np.stack([np.asarray(image) for _, image in pairs]), np.array([encode(scene) for scene, _ in pairs])


def scale_pixels(pixels: Tensor) -> Tensor:
    """Map pictures (N, S, S, 3) uint8 to (N, 3, S, S) in [-1, 1]: what SmolVLM's processor does to 96 x 96 pixels."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def vary_pixels(pixels: Tensor) -> Tensor:
    """Shift the batch by up to 2 pixels, change each picture's light, and add a little noise."""
    down, right = torch.randint(-2, 3, (2,)).tolist()
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), mode="replicate")
    size = pixels.shape[-1]
    pixels = padded[..., 2 + down : 2 + down + size, 2 + right : 2 + right + size]
    light = torch.rand(len(pixels), 2, 1, 1, 1, device=pixels.device)
    pixels = pixels * (0.85 + 0.3 * light[:, 0]) + (light[:, 1] - 0.5) * 0.2
    return pixels + torch.randn_like(pixels) * 0.04 * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
