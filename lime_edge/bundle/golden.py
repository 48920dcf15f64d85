"""Golden outputs: what PyTorch computed at export, kept in the bundle, so that a device without torch can compare."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError

FILE = "verify/golden.safetensors"
FORMAT, SCHEMA = "lime-edge-golden", 1
COLUMNS, FEWEST = 512, 64  # of a wide output, how many values a row keeps
BUDGET = 1_500_000  # bytes of kept values in a bundle
MOST_STEPS = 1024
PIXEL = 1 / 32  # pixels are stored as int8 in these steps
DAMAGED = "the bundle is damaged: copy or export it again"


@dataclass(frozen=True)
class Rows:
    """One output's rows, condensed. Leading axes are (calls, rows); a Golden has the selections before them.

    A language model's rows have their mean taken off: softmax and every choice are blind to it, and computing
    with int8 activations moves it more than anything else.

    values: (..., C) float32 at the kept columns. best: (...) int32, the largest value's column; peak: (...)
    float32, that value; margin: (...) float32, how far the second lies below it.
    """

    values: np.ndarray = field(repr=False)
    best: np.ndarray
    peak: np.ndarray
    margin: np.ndarray

    def pick(self, index: int) -> Rows:
        """The rows of one selection."""
        return Rows(*(getattr(self, entry.name)[index] for entry in fields(self)))


@dataclass(frozen=True)
class Output:
    """One output of the model: which rows of a call and which columns of a row are kept, and what they hold.

    rows: (R,) into the output's leading axes, flattened; for language models the step. columns: (C,).
    expected: with a leading axis of selections.
    """

    rows: np.ndarray
    columns: np.ndarray
    expected: Rows

    @property
    def scale(self) -> float:
        """What errors are measured in: the standard deviation of everything kept, selections and calls included."""
        return max(float(self.expected.values.std()), 1e-6)


@dataclass(frozen=True)
class Golden:
    """What an export knows about the right answers.

    selections: as one would type them (`describe_selection`). calls: inputs by name, (P, 1, ...) each: one
    sequence or image a call. steps: language models: calls are prompts, each followed by steps - 1 tokens of
    `outputs["logits"]`'s best; encoders: 0.
    """

    selections: tuple[str, ...]
    calls: dict[str, np.ndarray] = field(repr=False)
    steps: int
    outputs: dict[str, Output] = field(repr=False)

    @property
    def count(self) -> int:
        """Calls per selection."""
        return len(next(iter(self.calls.values())))

    def to_bytes(self) -> bytes:
        """The file: safetensors, `inputs/NAME` and `OUTPUT/FIELD`, its header says the rest."""
        tensors = {f"inputs/{name}": _shrink(array) for name, array in self.calls.items()}
        for name, output in self.outputs.items():
            tensors[f"{name}/rows"] = output.rows.astype(np.int32)
            tensors[f"{name}/columns"] = output.columns.astype(np.int32)
            tensors |= {f"{name}/{entry.name}": getattr(output.expected, entry.name) for entry in fields(Rows)}
        header = {
            "format": FORMAT,
            "schema": str(SCHEMA),
            "steps": str(self.steps),
            "selections": json.dumps(self.selections),
        }
        return save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata=header)


def _shrink(array: np.ndarray) -> np.ndarray:
    """Token ids as int32, pixels as int8 steps."""
    return np.rint(array / PIXEL).astype(np.int8) if array.dtype.kind == "f" else array.astype(np.int32)


def read_golden(bundle: Bundle) -> Golden | None:
    """The bundle's golden outputs, or None where it was exported without.

    Raises:
        LimeEdgeError: damaged, or of a newer schema.
    """
    if FILE not in bundle.manifest.files:
        return None
    file, data = bundle.path / FILE, bundle.read(FILE)
    try:
        tensors = load(data)
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, RecursionError, KeyError, TypeError, struct.error) as error:
        raise LimeEdgeError(f"{file}: not readable: {error}", DAMAGED) from None
    if header.get("format") != FORMAT:
        raise LimeEdgeError(f"{file}: holds no golden outputs", DAMAGED)
    if header.get("schema") != str(SCHEMA):
        found = f"{header.get('schema')!s:.20}"
        raise LimeEdgeError(f"{file}: schema: expected {SCHEMA}, found {found}", "upgrade lime-edge on this device")
    try:
        golden = _build(header, tensors)
        _check_shapes(golden)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise LimeEdgeError(f"{file}: damaged: {error!r}", DAMAGED) from None
    return golden


def _build(header: dict[str, str], tensors: dict[str, np.ndarray]) -> Golden:
    calls = {}
    for name, array in tensors.items():
        if name.startswith("inputs/"):
            pixels = array.dtype == np.int8
            calls[name.removeprefix("inputs/")] = array * np.float32(PIXEL) if pixels else array.astype(np.int64)
    names = [name.rpartition("/")[0] for name in tensors if name.endswith("/columns")]
    outputs = {
        name: Output(
            tensors[f"{name}/rows"],
            tensors[f"{name}/columns"],
            Rows(*(tensors[f"{name}/{entry.name}"] for entry in fields(Rows))),
        )
        for name in names
    }
    return Golden(tuple(json.loads(header["selections"])), calls, int(header["steps"][:10]), outputs)


def _check_shapes(golden: Golden) -> None:
    """Raise ValueError where what is kept of selections, calls, rows and columns does not go together."""
    if not golden.calls or not golden.outputs or not all(isinstance(name, str) for name in golden.selections):
        raise ValueError("inputs, outputs or selections are missing")
    if not 0 <= golden.steps <= MOST_STEPS or any(array.ndim < 2 or array.size == 0 for array in golden.calls.values()):
        raise ValueError(f"steps {golden.steps}, or an empty input")
    count = golden.count
    if any(array.shape[:2] != (count, 1) for array in golden.calls.values()):
        raise ValueError("inputs of different numbers of calls")
    for name, output in golden.outputs.items():
        kept = (len(golden.selections), count, *output.rows.shape)
        shapes = [getattr(output.expected, entry.name).shape for entry in fields(Rows)]
        if output.rows.ndim != 1 or shapes != [(*kept, *output.columns.shape), kept, kept, kept]:
            raise ValueError(f"{name}: shapes {shapes}")
        if not np.isfinite(output.expected.values).all() or min(output.rows.min(), output.columns.min()) < 0:
            raise ValueError(f"{name}: values")


def condense(rows: np.ndarray, columns: np.ndarray, centre: bool) -> Rows:
    """Keep of full rows what is compared.

    Args:
        rows: (P, R, V) float32. columns: (C,). centre: take every row's mean off first.
    """
    rows = rows - rows.mean(-1, keepdims=True) if centre else rows
    best = rows.argmax(-1)
    peak = np.take_along_axis(rows, best[..., None], -1)[..., 0]
    second = np.partition(rows, -2, axis=-1)[..., -2] if rows.shape[-1] > 1 else peak
    return Rows(rows[..., columns], best.astype(np.int32), peak, peak - second)


def stack_rows(per_selection: list[Rows]) -> Rows:
    """The rows of every selection, one after another."""
    return Rows(*(np.stack([getattr(rows, entry.name) for rows in per_selection]) for entry in fields(Rows)))


def choose_columns(width: int, rows: int) -> np.ndarray:
    """Which columns of rows of that width are kept: all of a narrow one, else seeded ones within BUDGET.

    Args:
        rows: over all selections and calls.
    """
    count = min(COLUMNS, max(FEWEST, BUDGET // (4 * max(rows, 1))))
    if width <= count:
        return np.arange(width)
    return np.sort(np.random.default_rng(0).choice(width, count, replace=False))


def write_golden(stage: Path, golden: Golden) -> None:
    """Put the file into a staged bundle."""
    (stage / FILE).parent.mkdir()
    (stage / FILE).write_bytes(golden.to_bytes())
