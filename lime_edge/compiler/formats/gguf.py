"""A GGUF file's header, walked before a library believes it: counts, lengths and offsets must lie within the file.

Source: ggml-org/ggml, docs/gguf.md ("File Structure"); block sizes: ggml.h, enum ggml_type, as in gguf-py's constants.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lime_edge.compiler.formats.configs import SIZES
from lime_edge.compiler.formats.files import AGAIN, reading
from lime_edge.errors import Faults, LimeEdgeError

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_FIELDS, MOST_TENSORS, MOST_ITEMS = 4096, 1 << 17, 1 << 24
LONGEST_NAME, LONGEST_TEXT = 256, 64 << 20
# GGUF's names of what config.json calls otherwise
KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}

NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its numbers: single values by key, and shapes by tensor, outermost axis first."""

    values: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def check_gguf(file: Path) -> Header:
    """Walk the header, so that what reads it next neither hangs nor fills memory.

    Raises:
        LimeEdgeError: no GGUF, another version, truncated, or numbers that no model has.
    """
    what = f"{file}: not a readable GGUF file"
    with reading(what, AGAIN), file.open("rb") as opened:
        if opened.read(4) != MAGIC:
            raise LimeEdgeError(
                f"{file}: not a GGUF file (no GGUF magic)", "copy it again, or pass a Hugging Face directory"
            )
        header = _Walk(opened, file.stat().st_size, what).read()
    with Faults(str(file), AGAIN) as faults:
        family = str(header.values.get("general.architecture", ""))
        for key, name in KEYS.items():
            value = header.values.get(f"{family}.{key}")
            least, most = SIZES[name]
            if value is None and key in NEEDED and f"{family}.{key}" not in header.values:
                faults.add(f"{family}.{key} is missing")
            if value is not None and not (isinstance(value, int) and least <= value <= most):
                faults.add(f"{family}.{key}", f"a whole number in {least}..{most}", f"{value!r:.40}")
        _check_sizes(header, family, faults)
    return header


def _check_sizes(header: Header, family: str, faults: Faults) -> None:
    """The model that the fields describe is the one whose tensors are there: it would be built first, then filled."""
    layers = header.values.get(f"{family}.block_count")
    found = {name.split(".")[1] for name in header.shapes if name.startswith("blk.")}
    if isinstance(layers, int) and layers != len(found):
        faults.add(f"{family}.block_count", f"{len(found)}, of which there are tensors", layers)
    table = header.shapes.get("token_embd.weight")
    width = header.values.get(f"{family}.embedding_length")
    if table is None or len(table) != 2:
        faults.add("token_embd.weight", "a table", table)
    elif isinstance(width, int) and width != table[1]:
        faults.add(f"{family}.embedding_length", table[1], width)
    vocab, mlp = header.values.get(f"{family}.vocab_size"), header.values.get(f"{family}.feed_forward_length")
    if table and isinstance(vocab, int) and vocab != table[0]:
        faults.add(f"{family}.vocab_size", table[0], vocab)
    up, fused = header.shapes.get("blk.0.ffn_up.weight"), "blk.0.ffn_gate.weight" not in header.shapes
    if up and isinstance(mlp, int) and mlp != up[0] and not (fused and 2 * mlp == up[0]):  # gate and up as one
        faults.add(f"{family}.feed_forward_length", up[0], mlp)


class _Walk:
    """A reader of the header that never reads past the file's end or keeps a long array."""

    def __init__(self, opened: BinaryIO, size: int, what: str):
        self._opened, self._size, self._what = opened, size, what

    def read(self) -> Header:
        """Everything up to the numbers, whose places are compared with the file's size."""
        version, tensors, fields = self._take("<IQQ")
        if version not in VERSIONS:
            self._refuse(f"version: expected {' or '.join(map(str, VERSIONS))}, found {version}")
        if tensors > MOST_TENSORS or fields > MOST_FIELDS:
            self._refuse(f"{tensors} tensors and {fields} fields")
        header = Header()
        for _ in range(fields):
            key = self._text(LONGEST_NAME)
            if key in header.values:
                self._refuse(f"{key!r:.80} twice")
            header.values[key] = self._value(key, self._take("<I")[0])
        places = [self._tensor(header) for _ in range(tensors)]
        alignment = header.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            self._refuse(f"general.alignment {alignment!r:.20}")
        begin = math.ceil(self._opened.tell() / alignment) * alignment
        for name, start, size in places:
            if begin + start + size > self._size:
                self._refuse(f"{name} ends at byte {begin + start + size}, the file at {self._size}")
        return header

    def _tensor(self, header: Header) -> tuple[str, int, int]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text(LONGEST_NAME)
        (axes,) = self._take("<I")
        if not 1 <= axes <= 4 or name in header.shapes:
            self._refuse(f"tensor {name!r:.80}: {axes} axes" if name not in header.shapes else f"{name!r:.80} twice")
        shape = self._take(f"<{axes}Q")
        kind, start = self._take("<IQ")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        count = math.prod(shape)
        if not 1 <= count <= 1 << 40 or shape[0] % block:
            self._refuse(f"tensor {name!r:.80}: shape {shape}")
        header.shapes[name] = shape[::-1]
        return name, start, count // block * size

    def _value(self, key: str, kind: int) -> Any:
        """A single value; of an array, None."""
        if kind == STRING:
            return self._text(LONGEST_TEXT)
        if kind in SCALARS:
            return self._take("<" + SCALARS[kind])[0]
        if kind != ARRAY:
            self._refuse(f"{key!r:.80}: type {kind}")
        kind, count = self._take("<IQ")
        if count > MOST_ITEMS or kind == ARRAY:
            self._refuse(f"{key!r:.80}: an array of {count}")
        if kind == STRING:
            for _ in range(count):
                self._skip(self._take("<Q")[0])
        elif kind in SCALARS:
            self._skip(count * struct.calcsize("<" + SCALARS[kind]))
        else:
            self._refuse(f"{key!r:.80}: an array of type {kind}")
        return None

    def _text(self, most: int) -> str:
        (length,) = self._take("<Q")
        if length > most:
            self._refuse(f"a text of {length} bytes")
        return self._bytes(length).decode("utf-8", "replace")

    def _take(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _bytes(self, count: int) -> bytes:
        if self._opened.tell() + count > self._size:
            self._refuse("truncated")
        return self._opened.read(count)

    def _skip(self, count: int) -> None:
        if self._opened.tell() + count > self._size:
            self._refuse("truncated")
        self._opened.seek(count, 1)

    def _refuse(self, why: str) -> None:
        raise LimeEdgeError(f"{self._what}: {why}", AGAIN)
