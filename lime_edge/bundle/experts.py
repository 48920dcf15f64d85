"""Expert files and the bank of experts a session switches between. numpy only."""

from __future__ import annotations

import math
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from lime_edge.bundle.inside import is_plain
from lime_edge.bundle.manifest import ALWAYS_ON as ALWAYS_ON
from lime_edge.bundle.manifest import LONGEST
from lime_edge.bundle.names import RESERVED, check_name
from lime_edge.bundle.residual import Subtract, subtract_reference
from lime_edge.errors import Faults, LimeEdgeError, suggest
from lime_edge.targets.values import PLAIN_TEXT

FORMAT = "lime-edge-expert"
SCHEMA = 2
ROUTED, NONE = "routed", "none"
DTYPES = {"float16": np.float16, "float32": np.float32}
STORED: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
MOST_HEADER, MOST_TEXT = 1 << 16, 512  # bytes of a header, characters of a note
LARGEST_VALUE = 65504.0  # float16's
Selection = str | Mapping[str, float] | None
READY_BYTES = 1 << 20  # fp32 residuals kept ready for a switch back, per session


def parse_selection(text: str) -> Selection:
    """Read a selection as typed: NAME, none, routed, or a blend NAME=WEIGHT,NAME=WEIGHT."""
    if text.lower() in RESERVED:
        return None if text.lower() == "none" else text.lower()
    if "=" not in text:
        return text
    blend: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            blend[name.strip()] = blend.get(name.strip(), 0.0) + float(weight)
        except ValueError:
            hint = "write a blend as NAME=WEIGHT,NAME=WEIGHT"
            raise LimeEdgeError(f"{part!r} in the blend {text!r}: {weight!r} is not a number", hint) from None
    return blend


def describe_selection(selection: Selection) -> str:
    """The selection as one would type it."""
    if selection is None or isinstance(selection, str):
        return selection or "none"
    return ",".join(f"{name}={weight:g}" for name, weight in selection.items())


def check_weights(blend: Mapping[str, float]) -> dict[str, float]:
    """A blend's weights as numbers.

    Raises:
        LimeEdgeError: not numbers, or they do not sum to 1.
    """
    hint = "write a blend as {NAME: WEIGHT, NAME: WEIGHT}"
    if not all(isinstance(weight, Real) for weight in blend.values()):
        raise LimeEdgeError(f"blend weights: expected numbers, found {list(blend.values())!s:.80}", hint)
    try:
        weights = {name: float(weight) for name, weight in blend.items()}
    except OverflowError:
        raise LimeEdgeError("blend weights: a number is too large", hint) from None
    total = sum(weights.values())
    if not weights or not abs(total - 1.0) <= 1e-6:
        hint = "scale the weights so that they sum to 1 (else the shared vector would be scaled)"
        raise LimeEdgeError(f"blend weights sum to {total:g}, expected 1", hint)
    return weights


@dataclass(frozen=True)
class Expert:
    """One expert: its full vector p (sum_H,), gamma * p_shared included, float16 or float32.

    adapter_id: of the shared adapter that it fits. note, license: for people, without control characters.
    """

    name: str
    vector: np.ndarray = field(repr=False)
    adapter_id: str
    note: str = ""
    license: str = ""

    def to_bytes(self) -> bytes:
        """The expert file: safetensors with tensor `expert` and a header that says what it fits."""
        kind = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}[self.vector.dtype]
        facts = {"format": FORMAT, "schema": str(SCHEMA), "name": self.name, "adapter_id": self.adapter_id}
        facts |= {"note": self.note, "license": self.license}
        tensor = {"dtype": kind, "shape": self.vector.shape, "data_offsets": (0, self.vector.nbytes)}
        header = msgspec.json.encode({"__metadata__": facts, "expert": tensor})
        header += b" " * (-len(header) % 8)
        little = np.ascontiguousarray(self.vector, self.vector.dtype.newbyteorder("<"))
        return struct.pack("<Q", len(header)) + header + little.tobytes()


Load = Callable[[], Expert]


class _Tensor(Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[Annotated[int, Meta(ge=0, le=LONGEST)]]
    data_offsets: tuple[int, int]


class _Header(Struct, forbid_unknown_fields=True):
    """Of an expert file; a file that holds other tensors is none."""

    facts: dict[str, str] = msgspec.field(name="__metadata__")
    expert: _Tensor


def read_expert(path: Path, most: int = LONGEST) -> Expert:
    """Read one expert file from anywhere.

    Args:
        most: numbers that its vector may have; a larger file is not read.
    Raises:
        LimeEdgeError: missing, truncated, not an expert file, of another schema, wrong dtype or shape, NaN, infinite
            or too large values.
    """
    if not is_plain(path):
        raise LimeEdgeError(f"{path}: no such expert file", "an expert is one .safetensors file")
    try:
        with path.open("rb") as file:
            data = file.read(4 * most + MOST_HEADER + 9)
    except OSError as error:
        raise LimeEdgeError(f"{path}: not readable: {error.strerror}", "check the file's permissions") from None
    return parse_expert(data, str(path), most)


def parse_expert(data: bytes, where: str, most: int = LONGEST) -> Expert:
    """The expert in the bytes of a file; its vector is a read-only view of them.

    Args:
        where: for messages. most: numbers that its vector may have.
    Raises: as `read_expert`.
    """
    header, offset = _parse_header(data, where)
    facts, tensor = header.facts, header.expert
    if facts.get("format") != FORMAT:
        raise LimeEdgeError(f"{where}: not a LiME expert file", "export one with lime-edge")
    if facts.get("schema") != str(SCHEMA):
        older = facts.get("schema") == "1"
        hint = "it is of an older format: pack or export it again" if older else "upgrade lime-edge"
        raise LimeEdgeError(f"{where}: schema: expected {SCHEMA}, found {facts.get('schema', '')[:20]!r}", hint)
    with Faults(where, "write it anew with lime-edge experts pack") as faults:
        if tensor.dtype not in STORED:
            faults.add("dtype", "float16 or float32 (F16, F32)", tensor.dtype[:20])
        if len(tensor.shape) != 1 or not 1 <= tensor.shape[0] <= most:
            faults.add("shape", f"one axis of at most {most}", tuple(tensor.shape[:8]))
        elif tensor.dtype in STORED:
            size = tensor.shape[0] * STORED[tensor.dtype].itemsize
            if tensor.data_offsets != (0, size) or len(data) != offset + size:
                faults.add("bytes of numbers", size, len(data) - offset)
        if problem := check_name(facts.get("name")):
            faults.add(f"name: {problem}")
        if not re.search(r"^[0-9a-f]{64}(?![\s\S])", facts.get("adapter_id", "")):
            faults.add("adapter_id: expected 64 hex digits")
        for key in ("note", "license"):
            if len(facts.get(key, "")) > MOST_TEXT or not re.search(PLAIN_TEXT, facts.get(key, "")):
                faults.add(f"{key}: at most {MOST_TEXT} characters, none of control")
    vector = np.frombuffer(data, STORED[tensor.dtype], offset=offset)
    vector = vector if vector.flags.aligned else vector.copy()
    check_values(vector, where)
    return Expert(facts["name"], vector, facts["adapter_id"], facts.get("note", ""), facts.get("license", ""))


def _parse_header(data: bytes, where: str) -> tuple[_Header, int]:
    """The header of a safetensors file and where its numbers begin. Source: safetensors, "Format"."""
    (length,) = struct.unpack("<Q", data[:8]) if len(data) >= 8 else (0,)
    if not 2 <= length <= min(len(data) - 8, MOST_HEADER):
        hint = "copy the file again: it may be truncated"
        raise LimeEdgeError(f"{where}: not a readable expert file: no safetensors header", hint)
    try:
        return msgspec.json.decode(data[8 : 8 + length], type=_Header), 8 + length
    except (ValueError, RecursionError) as error:
        hint = "it holds one tensor, `expert`; copy the file again"
        raise LimeEdgeError(f"{where}: not a readable expert file: {error}", hint) from None


def check_values(vector: np.ndarray, where: str) -> None:
    """Refuse what no target can hold.

    Args:
        vector: p, p_ref or d (sum_H,).
    Raises:
        LimeEdgeError: NaN or infinite values, or some beyond float16's range, in which Core ML takes d.
    """
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(vector).max(initial=0.0))  # NaN where there is one
    if not largest <= LARGEST_VALUE:
        found = "NaN or infinite values" if not math.isfinite(largest) else f"values up to {largest:.3g}"
        raise LimeEdgeError(
            f"{where}: holds {found}, expected at most {LARGEST_VALUE:.0f} in size", "train or convert it again"
        )


class ExpertBank:
    """The experts of one opened bundle, and the residual d = p - p_ref for any selection of them.

    An expert of the bundle is read and checked when it is first used. Vectors stay in their stored dtype (2 bytes a
    number in a quantized bundle); residuals are made on demand and the last few, READY_BYTES in all, are kept so that
    switching back costs nothing.

    Args:
        total: sum_H. adapter_id: what experts must fit. reference: p_ref (sum_H,) float32.
        subtract: how p - p_ref is computed.
    """

    def __init__(self, total: int, adapter_id: str, reference: np.ndarray, subtract: Subtract = subtract_reference):
        self.total = total
        self.adapter_id = adapter_id
        self.reference = np.ascontiguousarray(reference, dtype=np.float32)
        self._bound = float(np.abs(self.reference).max(initial=0.0))
        self._subtract = subtract
        self._vectors: dict[str, np.ndarray | Load] = {}
        self._ready: OrderedDict[object, np.ndarray] = OrderedDict()  # oldest use first
        self._free: list[np.ndarray] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Installed experts in the order they came."""
        return tuple(self._vectors)

    def vector(self, name: str) -> np.ndarray:
        """The stored vector of an expert (sum_H,), read now if it was not.

        Raises:
            LimeEdgeError: no such expert, or its file is damaged or of another adapter.
        """
        try:
            found = self._vectors[name]
        except (KeyError, TypeError):
            known = ", ".join(self._vectors) or "none"
            hint = f"{suggest(str(name), self._vectors)} installed experts: {known}".strip()
            raise LimeEdgeError(f"unknown expert {name!r}", hint) from None
        if isinstance(found, np.ndarray):
            return found
        expert = found()
        self.check(expert, f"expert {name!r}")
        self._vectors[name] = expert.vector
        return expert.vector

    def check(self, expert: Expert, where: str) -> None:
        """Refuse an expert of another shared adapter, or a name that another one has but for letter case.

        Raises:
            LimeEdgeError: with expected and found.
        """
        hint = "an expert fits bundles of the shared adapter it was trained with, and no other"
        with Faults(where, hint) as faults:
            if problem := check_name(expert.name):
                faults.add(problem)
            elif twins := [n for n in self._vectors if n.lower() == expert.name.lower() and n != expert.name]:
                faults.add(f"{expert.name!r} and {twins[0]!r} differ by letter case only")
            if expert.adapter_id != self.adapter_id:
                faults.add("adapter_id", self.adapter_id[:16], expert.adapter_id[:16] or "none")
            if expert.vector.shape != (self.total,):
                faults.add("length", self.total, expert.vector.shape[0])
        check_values(expert.vector, where)
        if self._bound + float(np.abs(expert.vector).max(initial=0.0)) > LARGEST_VALUE:
            check_values(expert.vector.astype(np.float32) - self.reference, f"{where}: p - p_ref")

    def offer(self, name: str, load: Load) -> None:
        """Add an expert that is read when it is first used: `load` gives it."""
        self._vectors[name] = load

    def install(self, expert: Expert, where: str = "") -> None:
        """Add an expert, or replace the one of the same name."""
        self.check(expert, where or f"expert {expert.name!r}")
        self._vectors[expert.name] = np.array(expert.vector)
        self._forget_ready()

    def remove(self, name: str) -> None:
        """Forget an expert."""
        if not isinstance(name, str) or name not in self._vectors:
            self.vector(name)
        del self._vectors[name]
        self._forget_ready()

    def mix(self, selection: Selection) -> np.ndarray:
        """p of a selection: one expert, a blend whose weights sum to 1, or zeros for None.

        Returns:
            (sum_H,) float32.
        Raises:
            LimeEdgeError: unknown name, weights that do not sum to 1 or are not finite.
        """
        mixed = np.empty_like(self.reference)
        self._mix_into(mixed, selection)
        return mixed

    def _mix_into(self, out: np.ndarray, selection: Selection) -> None:
        if selection is None:
            out.fill(0.0)
        elif isinstance(selection, str):
            np.copyto(out, self.vector(selection))
        else:
            weights = check_weights(selection)
            mixed = np.zeros(out.shape, np.float64)
            for name, weight in weights.items():
                mixed += np.multiply(weight, self.vector(name), dtype=np.float64)  # weight * float16 would be float16
            with np.errstate(over="ignore"):
                np.copyto(out, mixed, casting="same_kind")
            check_values(out, f"the blend {describe_selection(selection)}")

    def residual(self, selection: Selection) -> np.ndarray:
        """d = p - p_ref for a selection.

        Returns:
            (sum_H,) float32, read-only. It lies in one of a few buffers that are used over and over
            (memory stays flat): it holds until other selections, at least one, have been asked for.
        """
        key = selection if selection is None or isinstance(selection, str) else tuple(check_weights(selection).items())
        if key not in self._ready:
            slot = self._free_slot()
            try:
                if isinstance(selection, str):
                    self._subtract(self.vector(selection), self.reference, slot)
                else:
                    self._mix_into(slot, selection)
                    slot -= self.reference
                    check_values(slot, f"{describe_selection(selection)}: p - p_ref")
            except LimeEdgeError:
                self._free.append(slot)
                raise
            self._ready[key] = slot
        self._ready.move_to_end(key)
        view = self._ready[key].view()
        view.flags.writeable = False
        return view

    def _free_slot(self) -> np.ndarray:
        """A buffer to write to: never the one that was asked for last."""
        if self._free:
            return self._free.pop(0)
        if len(self._ready) < max(2, READY_BYTES // max(1, self.reference.nbytes)):
            return np.empty_like(self.reference)
        return self._ready.popitem(last=False)[1]

    def _forget_ready(self) -> None:
        """An expert changed: nothing that was made is valid; the buffer in use is the last to be reused."""
        self._free.extend(self._ready.values())
        self._ready.clear()
