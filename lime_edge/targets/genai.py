"""ONNX Runtime GenAI's config beside the ONNX graph; its experts are written with the bundle's (companions.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lime_edge.bundle.fields import Manifest

CONFIG, GRAPH = "onnx/genai_config.json", "onnx/genai.onnx"
TOKENIZER = "tokenizer"
MOST_TOKENS = 2048  # the cache that GenAI allocates unless its user sets max_length


def write_config(stage: Path, manifest: Manifest) -> None:
    """Write GenAI's config into a staged bundle; nothing where the bundle has no such companion.

    Args:
        stage: the bundle, its tokenizer already in it.
    """
    if "genai" in manifest.companions:
        config = describe_config(manifest.model, manifest.targets["onnx"].threads, (stage / TOKENIZER).is_dir())
        (stage / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


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
