"""Reading a saved ML program: the package's protobuf and its weight file, with numpy alone.

Field numbers are those of coremltools 9.0's Model.proto, FeatureTypes.proto and MIL.proto; the weight file is laid out
as its MILBlob storage format: a header of 64 bytes, and for each blob 64 bytes that say type, size and place.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lime_edge.errors import LimeEdgeError

MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
TYPES = {  # MIL.proto DataType -> name
    1: "bool",
    2: "string",
    10: "fp16",
    11: "fp32",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
}
BLOB_TYPES = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    14: "int32",
    15: "uint32",
}
STORED = {
    "bool": "?",
    "fp16": "<f2",
    "fp32": "<f4",
    "int8": "i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "int4": "u1",
    "uint8": "u1",
    "uint16": "<u2",
    "uint32": "<u4",
}
SENTINEL, BLOB = 0xDEADBEEF, struct.Struct("<IIQQ")  # a description: sentinel, type, bytes, where they start
HINT = "lime-edge inspect BUNDLE --verify compares the hashes"
Fields = dict[int, list[Any]]


@dataclass(frozen=True)
class Type:
    """A tensor's type: name of the element type, and shape with None for a length that is not fixed."""

    name: str
    shape: tuple[int | None, ...]
    state: bool = False


@dataclass(frozen=True)
class Constant:
    """A stored value: the array as it was written (int4 as int8), and the name of its element type."""

    type: str
    array: Any


@dataclass(frozen=True)
class Operation:
    """One operation: type; inputs by parameter, names of values or constants; outputs with their types."""

    kind: str
    inputs: dict[str, list[str | Constant]]
    outputs: list[tuple[str, Type]]
    value: Constant | None  # of a "const"


@dataclass(frozen=True)
class Function:
    """One function: inputs and states by name, operations in order, names of the outputs, enumerated input shapes."""

    name: str
    inputs: dict[str, Type]
    operations: list[Operation]
    outputs: list[str]
    shapes: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)

    @cached_property
    def states(self) -> dict[str, Type]:
        """The inputs that are state."""
        return {name: kind for name, kind in self.inputs.items() if kind.state}


@dataclass(frozen=True)
class Package:
    """A read .mlpackage: functions by name, and its metadata."""

    path: Path
    functions: dict[str, Function]
    metadata: dict[str, str]


def read_package(path: Path) -> Package:
    """Read a saved ML program.

    Raises:
        LimeEdgeError: a file is missing or damaged, or holds what this reader does not know.
    """
    try:
        model = (path / MODEL).read_bytes()
        weights = WeightFile(path / WEIGHTS)
    except OSError as error:
        raise LimeEdgeError(f"{path}: not a readable .mlpackage: {error}", HINT) from None
    place = f"file of {len(model)} bytes"
    try:
        fields = read_fields(model)
        description = read_fields(fields[2][0])
        program = read_fields(fields[502][0])
        shapes = _read_shapes(description)
        functions = {}
        for entry in program[2]:
            pair = read_fields(entry)
            name = _text(pair, 1)
            place = f"function {name!r}"
            functions[name] = _read_function(name, read_fields(pair[2][0]), weights, shapes.get(name, {}))
        return Package(path, functions, _read_metadata(description))
    except (KeyError, IndexError, ValueError, TypeError, OverflowError, struct.error) as error:
        raise LimeEdgeError(f"{path / MODEL}: not a readable ML program: {place}: {_explain(error)}", HINT) from None


def _explain(error: Exception) -> str:
    """What a reader of protobuf found, in words."""
    if isinstance(error, KeyError):
        key = error.args[0]
        return f"field {key} is missing" if isinstance(key, int) else f"{key!r} is not known or missing"
    if isinstance(error, (IndexError, struct.error)):
        return "a message ends too early"
    return "a field of another type than expected" if isinstance(error, TypeError) else str(error)


class WeightFile:
    """The blobs of a package, mapped, not read."""

    def __init__(self, path: Path):
        self.path = path
        self._map: Any = b""
        self._read: dict[int, np.ndarray] = {}  # functions that share a blob share its array
        if path.is_file() and path.stat().st_size:  # an empty file cannot be mapped
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, offset: int, kind: Type) -> np.ndarray:
        """The blob whose description starts at `offset`, in the shape of its type; int4 as int8."""
        if offset not in self._read:
            self._read[offset] = self._load(offset, kind)
        return self._read[offset]

    def _load(self, offset: int, kind: Type) -> np.ndarray:
        if offset + BLOB.size > len(self._map):
            self._refuse_length(offset + BLOB.size)
        sentinel, code, size, start = BLOB.unpack_from(self._map, offset)
        if sentinel != SENTINEL or BLOB_TYPES.get(code) != kind.name:
            found = BLOB_TYPES.get(code, str(code)) if sentinel == SENTINEL else "no blob"
            raise LimeEdgeError(f"{self.path}: at byte {offset}: expected {kind.name}, found {found}", HINT)
        shape = [length or 0 for length in kind.shape]
        count = int(np.prod(shape))
        expected = -(-count // 2) if kind.name == "int4" else count * np.dtype(STORED[kind.name]).itemsize
        if size != expected:
            raise LimeEdgeError(f"{self.path}: at byte {offset}: expected {expected} bytes, found {size}", HINT)
        if start + size > len(self._map):
            self._refuse_length(start + size)
        raw = np.frombuffer(
            self._map, np.dtype(STORED[kind.name]), offset=start, count=size if kind.name == "int4" else count
        )
        return (unpack_int4(raw)[:count] if kind.name == "int4" else raw).reshape(shape)

    def _refuse_length(self, expected: int) -> NoReturn:
        raise LimeEdgeError(f"{self.path}: expected at least {expected} bytes, found {len(self._map)}", HINT)


def unpack_int4(raw: np.ndarray) -> np.ndarray:
    """Signed nibbles, the low one first: (n,) uint8 to (2n,) int8."""
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1).astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)


def read_fields(data: bytes | memoryview) -> Fields:
    """A protobuf message as field number -> values: integers, 4 or 8 raw bytes, or bytes of any length.

    Source: protobuf's encoding guide (wire types 0, 1, 2 and 5).
    """
    view, fields, place = memoryview(data), {}, 0  # type: memoryview, Fields, int
    while place < len(view):
        tag, place = _read_varint(view, place)
        number, wire = tag >> 3, tag & 7
        value: Any
        if wire == 0:
            value, place = _read_varint(view, place)
        elif wire == 2:
            length, place = _read_varint(view, place)
            value, place = view[place : place + length], place + length
            if len(value) != length:
                raise ValueError("a message ends too early")
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
            value, place = view[place : place + length], place + length
        else:
            raise ValueError(f"wire type {wire}")
        fields.setdefault(number, []).append(value)
    return fields


def _read_varint(view: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[place]
        value |= (byte & 127) << shift
        place += 1
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than ten bytes")


def _unpack_varints(values: list[Any]) -> Iterator[int]:
    """Packed or not; signed 64-bit as two's complement."""
    for value in values:
        if isinstance(value, int):
            yield value - (1 << 64) if value >> 63 else value
            continue
        place = 0
        while place < len(value):
            number, place = _read_varint(value, place)
            yield number - (1 << 64) if number >> 63 else number


def _text(fields: Fields, number: int) -> str:
    return bytes(fields[number][0]).decode() if number in fields else ""


def _read_metadata(description: Fields) -> dict[str, str]:
    if 100 not in description:
        return {}
    fields = read_fields(description[100][0])
    found = {
        name: _text(fields, number)
        for number, name in ((1, "description"), (2, "version"), (3, "author"), (4, "license"))
    }
    for entry in fields.get(100, []):
        pair = read_fields(entry)
        found[_text(pair, 1)] = _text(pair, 2)
    return found


def _read_shapes(description: Fields) -> dict[str, dict[str, set[tuple[int, ...]]]]:
    """Enumerated shapes by function and input; a package of one function has no list of functions."""
    listed = [(_text(f, 1), f.get(2, [])) for f in map(read_fields, description.get(20, []))]
    found: dict[str, dict[str, set[tuple[int, ...]]]] = {}
    for name, features in listed or [("main", description.get(1, []))]:
        found[name] = {}
        for feature in map(read_fields, features):
            kind = read_fields(feature[3][0])
            array = read_fields(kind[5][0]) if 5 in kind else {}
            shapes = read_fields(array[21][0])[1] if 21 in array else []
            if shapes:
                found[name][_text(feature, 1)] = {tuple(_unpack_varints(read_fields(s)[1])) for s in shapes}
    return found


def _read_function(name: str, fields: Fields, weights: WeightFile, shapes: dict[str, set[tuple[int, ...]]]) -> Function:
    inputs = dict(_read_named(entry) for entry in fields.get(1, []))
    opset = _text(fields, 2)
    blocks = {_text(pair, 1): pair[2][0] for pair in map(read_fields, fields[3])}
    block = read_fields(blocks[opset])
    operations = [_read_operation(read_fields(entry), weights) for entry in block[3]]
    return Function(name, inputs, operations, [bytes(n).decode() for n in block[2]], shapes)


def _read_operation(fields: Fields, weights: WeightFile) -> Operation:
    kind = _text(fields, 1)
    if 4 in fields:
        raise LimeEdgeError(f"the program holds a block inside {kind!r}, which this reader does not know")
    inputs: dict[str, list[str | Constant]] = {}
    for entry in map(read_fields, fields.get(2, [])):
        bindings = [read_fields(b) for b in read_fields(entry[2][0]).get(1, [])]
        inputs[_text(entry, 1)] = [_text(b, 1) if 1 in b else _read_value(b[2][0], weights) for b in bindings]
    value = None
    if kind == "const":
        attributes = {_text(pair, 1): pair[2][0] for pair in map(read_fields, fields[5])}
        value = _read_value(attributes["val"], weights)
    return Operation(kind, inputs, [_read_named(entry) for entry in fields.get(3, [])], value)


def _read_named(entry: memoryview) -> tuple[str, Type]:
    fields = read_fields(entry)
    return _text(fields, 1), _read_type(fields[2][0])


def _read_type(data: memoryview) -> Type:
    fields = read_fields(data)
    if 5 in fields:
        inner = _read_type(read_fields(fields[5][0])[1][0])
        return Type(inner.name, inner.shape, True)
    if 1 not in fields:
        return Type("other", ())
    tensor = read_fields(fields[1][0])
    shape: list[int | None] = []
    for dimension in map(read_fields, tensor.get(3, [])):
        shape.append(read_fields(dimension[1][0]).get(1, [0])[0] if 1 in dimension else None)
    return Type(TYPES.get(tensor[1][0], "other"), tuple(shape))


def _read_value(data: memoryview, weights: WeightFile) -> Constant:
    fields = read_fields(data)
    kind = _read_type(fields[2][0])
    if 5 in fields:
        offset = read_fields(fields[5][0]).get(2, [0])[0]
        return Constant(kind.name, weights.read(offset, kind))
    immediate = read_fields(fields[3][0])
    if 1 not in immediate:
        raise LimeEdgeError(f"a constant of type {kind.name} is no tensor, which this reader does not know")
    tensor = read_fields(immediate[1][0])
    ((number, body),) = tensor.items()
    return Constant(kind.name, _read_immediate(number, read_fields(body[0]).get(1, []), kind))


def _read_immediate(number: int, values: list[Any], kind: Type) -> Any:
    """floats 1, ints 2, bools 3, strings 4, long integers 5, bytes 7 of MIL.proto's TensorValue."""
    shape = [length or 0 for length in kind.shape]
    if number == 4:
        texts = [bytes(value).decode() for value in values]
        return texts if shape else texts[0]
    if number == 7:
        array = np.frombuffer(b"".join(bytes(v) for v in values), STORED[kind.name])
        return (unpack_int4(array)[: int(np.prod(shape))] if kind.name == "int4" else array).reshape(shape)
    if number == 1:
        return np.frombuffer(b"".join(bytes(v) for v in values), "<f4").astype(STORED[kind.name]).reshape(shape)
    if number in (2, 3, 5):
        signed = [v - (1 << 32) if number == 2 and v >> 31 == 1 else v for v in _unpack_varints(values)]
        return np.array(signed, np.dtype(STORED[kind.name])).reshape(shape)
    raise LimeEdgeError(f"a constant is stored as tensor value {number}, which this reader does not know")
