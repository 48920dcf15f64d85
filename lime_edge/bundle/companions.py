"""Companions: files for another engine beside a target's own. What they hold per expert follows from p and p_ref alone,
so a device that adds an expert writes its companions' files too. numpy only.
"""

from __future__ import annotations

import struct

import numpy as np

ORIGINAL = "none"  # the companion's expert that gives the original model back; no expert can have this name
ONNX_ADAPTER = "onnx_adapter"


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
