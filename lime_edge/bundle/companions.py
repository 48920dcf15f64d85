"""Companions: files for another engine beside a target's own. What they hold per expert follows from p and p_ref alone,
so a device that adds an expert writes its companions' files too. numpy only.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator

import numpy as np

ORIGINAL = "none"  # the companion's expert that gives the original model back; no expert can have this name
ONNX_ADAPTER = "onnx_adapter"
GENAI_CONFIG = "genai_config.json"  # wherever it lies: who opens its folder with GenAI follows it
CODE = re.compile(r"\.(so|dll|dylib|framework)(\.|$)", re.IGNORECASE)


def encode_expert(form: str, residual: np.ndarray) -> bytes:
    """An expert as a companion's engine reads it.

    Args:
        form: the manifest's `Companion.form`. residual: d = p - p_ref (sum_H,) float32.
    """
    return {ONNX_ADAPTER: encode_onnx_adapter}[form](residual)


def encode_onnx_adapter(residual: np.ndarray) -> bytes:
    """An `.onnx_adapter` with one parameter, `expert` (1, sum_H): a flatbuffer, the bytes of ORT's AdapterFormat.

    Args:
        residual: d (sum_H,) float32.
    Source: onnxruntime 1.31.1, lora/adapter_format/adapter_schema.fbs; the tests compare bit for bit.
    """
    data = np.ascontiguousarray(residual, "<f4").tobytes()
    size = len(data)
    padding = bytes(4) if size % 8 == 0 else b""  # aligns the shape, which follows the data, to 8 bytes
    head = struct.pack("<I4s", 8 + len(padding), b"TORT") + padding
    # Adapter: its vtable is 28 bytes on; versions of format, adapter and model; a vector of one parameter
    head += struct.pack("<i4I2I", -28, 1, 1, 1, 4, 1, 16)
    head += struct.pack("<6H", 12, 20, 4, 8, 12, 16)  # the vtable of both tables: its size, theirs, four fields
    # Parameter: vtable 12 bytes back; where name and shape are, from here; float32; where the data is, its length
    head += struct.pack("<i5I", 12, 44 + size, 16 + size, 1, 4, size)
    return head + data + struct.pack("<I2qI", 2, 1, residual.size, 0) + struct.pack("<I8s", 6, b"expert")


def find_code(data: bytes) -> list[str]:
    """What a genai_config.json would make stock GenAI do besides running the bundle's graph: one line each.

    A `custom_ops_library` or another library that it names is loaded, that is, run; a file outside the bundle is read.
    Every pair of a doubled key is looked at, since parsers differ about which one counts.
    """
    pairs: list[tuple[str, object]] = []

    def keep(found: list[tuple[str, object]]) -> dict[str, object]:
        pairs.extend(found)
        return dict(found)

    try:
        json.loads(data, object_pairs_hook=keep)
    except (ValueError, RecursionError):
        return ["not readable JSON"]
    return [f"names {key[:80]!r}: {str(value)[:80]!r}" for key, value in pairs if _leads_out(key, value)]


def _leads_out(key: str, value: object) -> bool:
    if "library" in key.lower():
        return True
    texts = list(_texts(value))
    if any(CODE.search(text) for text in texts):
        return True
    paths = [text.replace("\\", "/") for text in texts] if key in ("filename", "adapter_filename") else []
    return any(path.startswith(("/", "~")) or ".." in path.split("/") or ":" in path for path in paths)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
