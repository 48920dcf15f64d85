"""GenAI's files beside the ONNX graph: stock ONNX Runtime GenAI then runs a bundle's `onnx/` and switches its experts.

Its graph is the pinned one, whose inputs of ours have default values, on the same weight file: GenAI feeds what it
knows, and an adapter sets `expert`; without one the default is the folded model. It lies beside the pinned graph,
because ONNX Runtime refuses weights outside of a graph's folder. Other APIs refuse inputs with defaults, so the pinned
graph has none. The experts' files are written with the bundle's (lime_edge.bundle.companions).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lime_edge.bundle.fields import Backbone, Companion, DecoderFacts, Manifest
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.onnx.experts import EXPERT
from lime_edge.exporters.onnx.graph import LOGITS_TO_KEEP
from lime_edge.targets.entries import OnnxFacts, OnnxOptions

FOLDER, GRAPH, CONFIG = "onnx", "genai.onnx", "genai_config.json"
TOKENIZER = "tokenizer"
# What GenAI knows as language models, all alike to it: others go by Llama's name. Source: onnxruntime-genai 0.18.0
TYPES = frozenset(
    ("ernie4_5", "gemma", "gemma2", "gemma3_text", "granite")
    + ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
)
MOST_TOKENS = 2048  # the cache that GenAI allocates unless its user sets max_length


def check_genai(kind: str, options: OnnxOptions) -> None:
    """Refuse, before anything is compiled, what GenAI does not run.

    Raises:
        LimeEdgeError: not a language model, or float16.
    """
    if kind != "decoder":
        raise LimeEdgeError("`companion=genai`: GenAI runs language models, and this is none", "leave it out")
    if options.activations != "float32":
        raise LimeEdgeError(
            f"`companion=genai`: needs `activations=float32`, found {options.activations}", "export a bundle for each"
        )


def write_genai(model: CompiledModel, stage: Path, manifest: Manifest) -> Companion:
    """Write GenAI's graph and config into a staged bundle.

    Args:
        model: what the pinned graph was written from. stage: the bundle, tokenizer and artifacts already in it.
        manifest: without experts and files.
    Returns:
        What the manifest says of it, its experts still missing.
    Raises:
        LimeEdgeError: virtual tokens, an input that GenAI knows nothing of.
    """
    if model.virtual is not None:
        raise LimeEdgeError("`companion=genai`: GenAI cannot run a prompt-tuning adapter", "leave it out")
    if model.header:
        problem = "`companion=genai`: GenAI's adapters act on every token, this one from the generation prompt on"
        raise LimeEdgeError(problem, "leave it out")
    assert manifest.decoder is not None
    facts = manifest.facts_of(OnnxFacts)
    write_defaulted(stage / facts.file, model.variant.neutral)
    config = describe_config(manifest.backbone, manifest.decoder, facts.threads, (stage / TOKENIZER).is_dir())
    (stage / FOLDER / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return Companion(target=facts.target, folder=FOLDER, form="onnx_adapter" if facts.expert_input else None)


def write_defaulted(file: Path, neutral: float) -> None:
    """Write genai.onnx beside a pinned graph.

    Args:
        file: the pinned graph, without virtual tokens. neutral: what changes nothing in an expert: 0, SliceFine 1.
    """
    model = onnx.load(file, load_external_data=False)
    defaults = {LOGITS_TO_KEEP: np.zeros(1, np.int64)}  # all of them
    for value in model.graph.input:
        if value.name == EXPERT:
            rows, total = value.type.tensor_type.shape.dim
            rows.dim_value = 1
            defaults[EXPERT] = np.full((1, total.dim_value), neutral, np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in defaults.items())
    file.with_name(GRAPH).write_bytes(model.SerializeToString())


def describe_config(
    backbone: Backbone, decoder: DecoderFacts, threads: int | None, has_tokenizer: bool
) -> dict[str, Any]:
    """The body of genai_config.json: on the CPU, with the bundle's own tokenizer where it has one.

    Args:
        backbone, decoder: the manifest's. threads: None lets ONNX Runtime choose.
    Source: onnxruntime.ai, "Config reference"; tokenizer_dir: onnxruntime-genai 0.18.0.
    """
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if threads:
        session["intra_op_num_threads"] = threads
    graph = {
        "filename": GRAPH,
        "hidden_size": backbone.hidden,
        "head_size": decoder.head_dim,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "num_hidden_layers": backbone.layers,
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
        "type": backbone.family if backbone.family in TYPES else "llama",
        "vocab_size": backbone.vocab,
        "context_length": backbone.context,
        "eos_token_id": list(decoder.eos),
        "pad_token_id": next(iter(decoder.eos), 0),
        "decoder": graph,
    }
    if has_tokenizer:
        facts["tokenizer_dir"] = f"../{TOKENIZER}"
    search = {
        "do_sample": False,
        "num_beams": 1,
        "max_length": min(backbone.context, MOST_TOKENS),
        "past_present_share_buffer": True,
    }
    return {"model": facts, "search": search}
