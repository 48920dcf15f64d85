"""Is this the backbone that the adapter was trained on? Asked once, at export, of values that survive a rounding.

A sha256 tells whether two models are equal, but a model at bfloat16, at Q8_0 and in a 4-bit GGUF file is the same model
to an adapter. So a training or an import also keeps a few values of every tensor, and the export compares its own.
Vectors (norms, biases) are not quantized by any format, so they may differ by the rounding to bfloat16 only; matrices
by what four bits do. What stays within both cannot be told from a rounding: a short fine-tune does
(docs/adapter-format.md).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import ValidationError, convert

from lime_edge.bundle.fields import Fit, Sketch
from lime_edge.bundle.prompts import TextCodec
from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.errors import LimeEdgeError

VECTORS, MATRICES = 0.0025, 0.15  # relative distances up to which it counts as the same model
FEWEST, MOST, ALL = 4, 64, 2048  # values kept of a tensor, and of all vectors or all matrices
GOLDEN = (math.sqrt(5) - 1) / 2
Tensors = Mapping[str, torch.Tensor]


def draw_sketch(backbone: Backbone, tokenizer: Path | None = None) -> Sketch:
    """What an adapter's configuration keeps of the backbone it was trained on (`base_sketch`).

    Args:
        tokenizer: directory of tokenizer.json, where there is one.
    """
    state = backbone.read_state()
    parts = {kind: np.concatenate([*_sample(state, kind).values(), np.zeros(0, "<f4")]) for kind in (True, False)}
    encode = {kind: base64.b64encode(values.tobytes()).decode() for kind, values in parts.items()}
    vocabulary = None if tokenizer is None else hash_vocabulary(tokenizer)
    return Sketch(names=hash_names(backbone), vocabulary=vocabulary, vectors=encode[True], matrices=encode[False])


def hash_vocabulary(tokenizer: Path) -> str | None:
    """sha256 over every token's spelling in the order of the ids; None where there is no tokenizer."""
    if not (tokenizer / "tokenizer.json").is_file():
        return None
    tokens = sorted((index, token) for token, index in TextCodec(tokenizer).vocabulary().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def judge_vocabulary(fit: Fit, kept: Mapping[str, Any] | None, tokenizer: Path, any_backbone: bool, where: str) -> Fit:
    """The same, for the tokenizer: equal to what the adapter was trained with, where both are known.

    Raises:
        LimeEdgeError: another one.
    """
    wanted, found = (kept or {}).get("vocabulary"), hash_vocabulary(tokenizer)
    if None in (wanted, found) or wanted == found:
        return fit
    misfits = [*fit.misfits, f"tokens: expected {wanted!s:.16}, found {found!s:.16}"]
    return _settle(fit.vectors, fit.matrices, misfits, any_backbone, where)


def hash_names(backbone: Backbone) -> str:
    """sha256 over names and shapes of all tensors, and over what shapes do not say (`Backbone.traits`)."""
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(backbone.read_state().items())]
    lines += [f"{name} = {value}" for name, value in sorted(backbone.traits.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sample(tensors: Tensors, vectors: bool) -> dict[str, np.ndarray]:
    """A few values of every vector, or of every other tensor, at places spread by the golden ratio."""
    chosen = {name: tensors[name] for name in sorted(tensors) if (tensors[name].ndim == 1) == vectors}
    count = min(max(ALL // max(len(chosen), 1), FEWEST), MOST)
    found = {}
    for name, tensor in chosen.items():
        places = [int((index * GOLDEN) % 1 * tensor.numel()) for index in range(min(count, tensor.numel()))]
        found[name] = tensor.reshape(-1)[places].float().numpy().astype("<f4")
    return found


def measure(sketch: Sketch, backbone: Backbone) -> tuple[float, float]:
    """How far a backbone's vectors and matrices are from a sketch of the same names and shapes.

    Returns:
        Root mean square, over tensors, of |difference| / |value|; infinite where the sketch has another length.
    """
    state = backbone.read_state()
    return _distance(sketch.vectors, _sample(state, True)), _distance(sketch.matrices, _sample(state, False))


def _distance(text: str, found: Mapping[str, np.ndarray]) -> float:
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except ValueError:
        return math.inf
    if values.size != sum(part.size for part in found.values()) or not np.isfinite(values).all():
        return math.inf
    total, start = 0.0, 0
    for part in found.values():
        wanted = values[start : start + part.size].astype(np.float64)
        start += part.size
        size, error = float(np.sum(wanted**2)), float(np.sum((part - wanted) ** 2))
        total += error / size if size > 0 else float(error > 0)
    return math.sqrt(total / max(len(found), 1))


def judge(
    backbone: Backbone, fingerprint: str | None, kept: Mapping[str, Any] | None, any_backbone: bool, where: str
) -> Fit:
    """Whether an adapter belongs to a backbone.

    Args:
        fingerprint: of the backbone it was trained on, None where it does not say. kept: its sketch, or None.
        any_backbone: take a misfit, and let the manifest say so.
    Raises:
        LimeEdgeError: another model, or one that cannot be told to be the same; with expected and found.
    """
    if fingerprint is not None and fingerprint == backbone.fingerprint:
        return Fit(verdict="identical")
    if fingerprint is None and kept is None:
        return Fit(verdict="not recorded")
    if kept is None:
        misfits = [f"base_fingerprint: expected {fingerprint}, found {backbone.fingerprint}"]
        return _settle(None, None, misfits, any_backbone, where)
    try:
        sketch = convert(dict(kept), Sketch)
    except ValidationError as error:
        raise LimeEdgeError(
            f"{where}: base_sketch of the adapter's configuration: {error}", "copy the adapter again"
        ) from None
    if sketch.names != hash_names(backbone):
        return _settle(None, None, ["other tensors, shapes or heads"], any_backbone, where)
    vectors, matrices = measure(sketch, backbone)
    misfits = []
    for name, found, most in (("norms and biases", vectors, VECTORS), ("matrices", matrices, MATRICES)):
        if not found <= most:
            misfits.append(f"{name}: expected at most {most:.2%} away, found {found:.2%}")
    return _settle(vectors, matrices, misfits, any_backbone, where)


def _settle(vectors: float | None, matrices: float | None, misfits: list[str], any_backbone: bool, where: str) -> Fit:
    if misfits and not any_backbone:
        raise LimeEdgeError(
            f"{where}: made for another backbone: {'; '.join(misfits)}",
            "take the model it was trained on, or pass `any_backbone` where you know better",
        )
    known = [None if value is None or not math.isfinite(value) else round(value, 6) for value in (vectors, matrices)]
    return Fit(
        verdict="any backbone" if misfits else "within tolerance",
        vectors=known[0],
        matrices=known[1],
        misfits=tuple(text[:500] for text in misfits),
    )
