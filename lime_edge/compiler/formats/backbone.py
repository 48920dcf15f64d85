"""The backbone, as far as every kind of model has it: its layers, its tensors, its fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.utils import logging as hf_logging

Source = tuple[int, str]  # which input: a number within the model, and the place (`options.PLACES`) of what reads it


@dataclass(frozen=True)
class Layer:
    """A linear layer or an embedding table of the model: what can be a site.

    Attributes:
        shape: of its weight, (H, D) or (V, H). embedding: which of the two. bias: it has one.
        source: layers of equal source read the same tensor (query, key and value, say).
    """

    shape: tuple[int, int]
    embedding: bool
    bias: bool
    source: Source

    @property
    def place(self) -> str:
        """Where it stands, one of `options.PLACES`."""
        return self.source[1]


@dataclass(frozen=True)
class Backbone:
    """A frozen base model. A kind of model adds what it has besides."""

    path: str
    name: str

    @property
    def layers(self) -> Mapping[str, Layer]:
        """What can be a site, by module name in computation order."""
        raise NotImplementedError

    @property
    def prompt_width(self) -> int | None:
        """Width of a virtual token; None where the model takes none."""
        return None

    @property
    def reads_text(self) -> bool:
        """Whether token ids go in, and a tokenizer before them."""
        return True

    @property
    def sees(self) -> bool:
        """Whether pictures go in."""
        return not self.reads_text

    @property
    def scales(self) -> Mapping[str, float]:
        """Constants that the model multiplies its modules' outputs with, by module name; they are folded."""
        return {}

    @property
    def traits(self) -> Mapping[str, str | int]:
        """What makes the model another one although names and shapes of its tensors are the same."""
        return {}

    def spell(self, name: str) -> str:
        """A module's name as this model has it; another where versions of transformers differ."""
        return name

    def read_state(self) -> Mapping[str, torch.Tensor]:
        """The tensors that identify the model."""
        raise NotImplementedError

    def split_state(self, sites: Container[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Every matrix to be quantized, and the vectors beside them (norms, biases), by tensor name, float32.

        Args:
            sites: names of the adapted layers.
        """
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        """Of the original model: experts carry it, so that they fit every quantization of it."""
        return hash_tensors(self.read_state())


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and float32 bytes: equal for equal values, whatever the file type."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].float().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep `transformers`' own progress bars and warnings off the terminal."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with open(os.devnull, "w") as sink, redirect_stderr(sink):
            yield
    finally:
        hf_logging.set_verbosity(level)
