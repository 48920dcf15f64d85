"""Checkpoints that somebody has quantized already: an adapter cannot be folded into them."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from lime_edge.bundle.inside import is_folder, is_plain
from lime_edge.compiler.formats.float8 import SCALES
from lime_edge.errors import LimeEdgeError

CONFIGS = ("config.json", "quantize_config.json", "quant_config.json")  # the last two: old AutoGPTQ's and AutoAWQ's
PACKED = {"qweight": "GPTQ or AWQ", "weight_packed": "compressed-tensors", "quant_state": "bitsandbytes"}
NAMES = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "fbgemm_fp8": "FP8"}
HINT = "take the original checkpoint of the same model, in bfloat16, float16 or float32, or a GGUF file"


def refuse_prequantized(path: Path, float8: bool = True) -> None:
    """Refuse a model directory whose weights are not floating-point numbers any more; reads headers only.

    Args:
        float8: whoever reads it makes float32 of FP8 (`float8.widen`): taken where every such weight has its scale.
    Raises:
        LimeEdgeError: GPTQ, AWQ, bitsandbytes and the like.
    """
    if not is_folder(path):
        return
    found = _read_claim(path) or _look_at_tensors(path)
    if found and not (float8 and _has_scales(path)):
        raise LimeEdgeError(
            f"{path}: its weights are quantized already ({found}); the adapter is folded into the original weights, "
            "which lime-edge then quantizes itself",
            HINT,
        )


def _read_claim(path: Path) -> str:
    """What a config says about quantization; empty where none does."""
    for name in CONFIGS:
        body = _read_object(path / name)
        facts = body if name != "config.json" else body.get("quantization_config") or body.get("compression_config")
        if not isinstance(facts, dict) or not facts:
            continue
        method = str(facts.get("quant_method") or ("awq" if name == "quant_config.json" else "gptq"))
        bits = next((facts[key] for key in ("bits", "w_bit") if isinstance(facts.get(key), int)), None)
        bits = bits or (4 if facts.get("load_in_4bit") else 8 if facts.get("load_in_8bit") else None)
        return NAMES.get(method, method) + (f", {bits} bits" if bits else "")
    return ""


def _look_at_tensors(path: Path) -> str:
    """What the tensors' names and dtypes say, where no config said it."""
    kinds: Counter[str] = Counter()
    for file in sorted(path.glob("*.safetensors")):
        for name, entry in _read_header(file).items():
            last = name.rsplit(".", 1)[-1]
            if isinstance(entry, dict) and str(entry.get("dtype", "")).startswith("F8_E"):
                kinds["FP8"] += 1
            elif kind := next((kind for end, kind in PACKED.items() if last.startswith(end)), None):
                kinds[kind] += 1
    return kinds.most_common(1)[0][0] if kinds else ""


def _has_scales(path: Path) -> bool:
    """Whether there are FP8 weights, each beside a scale, and nothing that is packed in another way."""
    kinds = {
        name: str(entry.get("dtype", ""))
        for file in sorted(path.glob("*.safetensors"))
        for name, entry in _read_header(file).items()
        if isinstance(entry, dict)
    }
    eight = [name for name, kind in kinds.items() if kind == "F8_E4M3"]
    packed = any(name.rsplit(".", 1)[-1].startswith(tuple(PACKED)) for name in kinds)
    return bool(eight) and not packed and all(any(name + end in kinds for end in SCALES) for name in eight)


def _read_object(file: Path) -> dict[str, Any]:
    if not is_plain(file):
        return {}
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # missing, or damaged: reading the model will say so
        return {}
    return body if isinstance(body, dict) else {}


def _read_header(file: Path) -> dict[str, Any]:
    """The JSON at the start of a safetensors file: tensor name -> dtype, shape, place."""
    try:
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            body = json.loads(opened.read(min(size, 100_000_000)))
    except (OSError, ValueError, RecursionError, struct.error):
        return {}
    return body if isinstance(body, dict) else {}
