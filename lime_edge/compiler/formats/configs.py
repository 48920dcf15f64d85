"""A model's config.json before a library believes it: numbers that nothing is built of may not be any size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lime_edge.compiler.formats.files import read_json
from lime_edge.errors import Faults
from lime_edge.targets.values import PLAIN_TEXT

# name -> least and most; by what the largest models have, with room above
SIZES = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 18),
    "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 4096),
    "num_attention_heads": (1, 65536),
    "num_key_value_heads": (1, 65536),
    "head_dim": (2, 65536),
    "max_position_embeddings": (1, 1 << 22),
    "sliding_window": (1, 1 << 24),
    "max_window_layers": (0, 4096),
    "type_vocab_size": (0, 1 << 16),
    "image_size": (1, 4096),
    "patch_size": (1, 1 << 12),
    "num_channels": (1, 64),
    "num_labels": (1, 1 << 17),
    # the same under the names of some encoders
    "n_layers": (1, 4096),
    "n_layer": (1, 4096),
    "num_layers": (1, 4096),
    "depths": (1, 4096),
    "depth": (1, 4096),
    "n_heads": (1, 65536),
    "num_heads": (1, 65536),
    "dim": (1, 1 << 18),
    "hidden_dim": (1, 1 << 20),
    "embed_dim": (1, 1 << 18),
    "embedding_size": (1, 1 << 18),
    "hidden_sizes": (1, 1 << 18),
}
LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "depth")
LISTS = ("image_size", "patch_size", "depths", "hidden_sizes", "num_heads")  # these may be a number per axis or stage
LARGEST_INT, LARGEST_FLOAT = 1 << 53, 1e30
MOST_VALUES, DEEPEST = 1 << 20, 24


def read_config(file: Path) -> dict[str, Any]:
    """A model's config.json as it stands, its numbers looked at.

    Raises:
        LimeEdgeError: no JSON object, or what `check_config` finds.
    """
    config = read_json(file)
    with Faults(str(file), "is this what save_pretrained writes?") as faults:
        check_config(config, faults)
    return config


def check_config(config: Mapping[str, Any], faults: Faults) -> None:
    """Note sizes out of range anywhere in a config, numbers that are none, and nesting that no config has."""
    count = 0
    stack: list[tuple[str, Any, int]] = [("", config, 0)]
    while stack:
        name, value, depth = stack.pop()
        count += 1
        if depth > DEEPEST or count > MOST_VALUES:
            faults.add("nested too deeply" if depth > DEEPEST else f"more than {MOST_VALUES} values")
            return
        if name in SIZES and isinstance(value, (Mapping, list)) and not (name in LISTS and isinstance(value, list)):
            faults.add(name, "a whole number", f"{value!r:.40}")
        elif name == "model_type" and not isinstance(value, str):
            faults.add(name, "a name", f"{value!r:.40}")
        elif isinstance(value, Mapping):
            stack.extend((str(key), inner, depth + 1) for key, inner in value.items())
        elif isinstance(value, list):
            stack.extend((name, inner, depth + 1) for inner in value)
        else:
            _check_value(name, value, faults)


def count_layers(config: Mapping[str, Any]) -> int:
    """The most layers that a checked config asks for: a model has at least as many tensors."""
    return max((config.get(name) or 0 for name in LAYERS), default=0)


def _check_value(name: str, value: Any, faults: Faults) -> None:
    if name in SIZES and value is not None:
        least, most = SIZES[name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= most:
            faults.add(name, f"a whole number in {least}..{most}", f"{value!r:.40}")
    elif isinstance(value, int) and abs(value) > LARGEST_INT:
        faults.add(name[:80], f"at most {LARGEST_INT} in size", f"{value:.3e}" if value.bit_length() < 1000 else "more")
    elif isinstance(value, float) and not (math.isfinite(value) and abs(value) <= LARGEST_FLOAT):
        faults.add(name[:80], f"a finite number of at most {LARGEST_FLOAT:g} in size", value)


def plain_name(name: str) -> str:
    """A name for the manifest: without what it refuses, at most 200 characters."""
    kept = "".join(letter for letter in name if letter.isprintable())[:200]
    return kept if kept and re.search(PLAIN_TEXT, kept) else "model"
