"""Reading from disk: JSON objects, and state dicts in any of their forms."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lime_edge.errors import LimeEdgeError

WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LimeEdgeError(f"{file}: not a readable JSON file: {error}", "copy it again, or mend it by hand") from None
    if not isinstance(read, dict):
        raise LimeEdgeError(
            f"{file}: expected a JSON object, found {type(read).__name__}", 'write it as {"name": value, ...}'
        )
    return read


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    """Read a state dict: one safetensors file, its shards, or a PyTorch file read without running code."""
    file = source
    if source.is_dir():
        found = [source / name for name in WEIGHTS if (source / name).is_file()]
        if not found:
            raise LimeEdgeError(f"{source}: holds none of {', '.join(WEIGHTS)}", "name the weight file itself")
        file = found[0]
    try:
        if file.suffix == ".json":
            shards = sorted(set(read_json(file)["weight_map"].values()))
            return {name: t for shard in shards for name, t in load_file(file.parent / shard).items()}
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        OSError,
        KeyError,
        AttributeError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise LimeEdgeError(
            f"{file}: not a readable state dict: {error}", "copy it again; it must hold tensors only"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise LimeEdgeError(
            f"{file}: expected a state dict (name -> tensor), found something else",
            "save model.state_dict(), not the model",
        )
    return dict(state)
