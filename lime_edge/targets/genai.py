"""ONNX Runtime GenAI's files beside the ONNX graph: its config, and one `.onnx_adapter` per expert. numpy only.

All of them follow from the manifest and the expert files, so that a device that adds an expert writes its adapter too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lime_edge.bundle.experts import ALWAYS_ON

if TYPE_CHECKING:
    from lime_edge.bundle.bundle import Manifest

CONFIG, GRAPH = "onnx/genai_config.json", "onnx/genai.onnx"
ORIGINAL = "none"  # the adapter that gives the original model back; no expert can have this name
TOKENIZER = "tokenizer"
MOST_TOKENS = 2048  # the cache that GenAI allocates unless its user sets max_length


def adapter_file(name: str) -> str:
    """Where a bundle keeps an expert for GenAI."""
    return f"onnx/{name}.onnx_adapter"


def takes_adapters(targets: dict[str, dict[str, Any]]) -> bool:
    """Whether GenAI runs the graph and the graph has an expert input. targets: the manifest's."""
    facts = targets.get("onnx", {})
    return bool(facts.get("genai") and facts.get("expert_input"))


def write_genai(stage: Path, manifest: Manifest, vectors: Mapping[str, np.ndarray], reference: np.ndarray) -> None:
    """Write the config and the adapters of a staged bundle; nothing where the exporter did not ask for them.

    Args:
        stage: the bundle, its tokenizer already in it. vectors: by expert, as stored (sum_H,).
        reference: p_ref (sum_H,) float32.
    """
    facts = manifest.targets.get("onnx", {})
    if not facts.get("genai"):
        return
    config = describe_config(manifest.model, facts.get("threads"), (stage / TOKENIZER).is_dir())
    (stage / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if not takes_adapters(manifest.targets):
        return
    residuals = {name: vector.astype(np.float32) - reference for name, vector in vectors.items()}
    if manifest.adapter["variant"] not in ALWAYS_ON:
        residuals[ORIGINAL] = -reference
    for name, residual in residuals.items():
        (stage / adapter_file(name)).write_bytes(encode_adapter(residual))


def encode_adapter(residual: np.ndarray) -> bytes:
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


def describe_config(model: dict[str, Any], threads: int | None, has_tokenizer: bool) -> dict[str, Any]:
    """The body of genai_config.json: on the CPU, with the bundle's own tokenizer where it has one.

    Args:
        model: the manifest's. threads: None lets ONNX Runtime choose.
    Source: onnxruntime.ai, "Config reference"; tokenizer_dir: onnxruntime-genai 0.18.0.
    """
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if threads:
        session["intra_op_num_threads"] = threads
    decoder = {
        "filename": Path(GRAPH).name,
        "hidden_size": model["hidden"],
        "head_size": model["head_dim"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"],
        "num_hidden_layers": model["layers"],
        "session_options": session,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    facts = {
        "type": model["family"],
        "vocab_size": model["vocab"],
        "context_length": model["context"],
        "eos_token_id": list(model["eos"]),
        "pad_token_id": next(iter(model["eos"]), 0),
        "decoder": decoder,
    }
    if has_tokenizer:
        facts["tokenizer_dir"] = f"../{TOKENIZER}"
    search = {
        "do_sample": False,
        "num_beams": 1,
        "max_length": min(model["context"], MOST_TOKENS),
        "past_present_share_buffer": True,
    }
    return {"model": facts, "search": search}
