"""Export: a pinned expert leaves as a plain LoRA, for PEFT or for llama.cpp.

    y = W x + b + p * (s B A x) = W x + b + s (diag(p) B) A x
so a pinned expert or a blend is the LoRA (A, B' = diag(p) B) with the same scale s = alpha / r.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lime_edge.bundle.experts import Selection, describe_selection
from lime_edge.bundle.staging import stage_directory, write_file
from lime_edge.compiler.formats.activation import count_header
from lime_edge.compiler.formats.adapter import Adapter, read_adapter
from lime_edge.compiler.formats.architecture import Decoder
from lime_edge.compiler.formats.checkpoint import pair
from lime_edge.compiler.formats.decoder import read_decoder_backbone
from lime_edge.compiler.maths.variants import DORA, PROMPT_TUNING, SLICEFINE
from lime_edge.errors import Faults, LimeEdgeError, need

FORMATS = ("peft", "gguf")


@dataclass(frozen=True)
class PlainLora:
    """One expert as a LoRA: site -> (A (r, D), B' (H, r)) float32; delta = alpha / rank * B' A x."""

    name: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    base_name: str | None
    sites: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)


def export_expert(
    adapter: Path, selection: Selection, form: str, output: Path, model: Path | None = None, force: bool = False
) -> PlainLora:
    """Write an expert or a blend in another project's format, or write nothing.

    Args:
        adapter: LiME adapter directory.
        selection: an expert's name, or name -> weight with weights that sum to 1.
        form: "peft" writes a directory, "gguf" a file.
        model: the base model; checks that it fits. GGUF needs it: its rows are ordered by heads.
        force: replace what is at `output`.
    Raises:
        LimeEdgeError: unknown format or expert, a variant that is no LoRA, a model that does not fit.
    """
    if form not in FORMATS:
        raise LimeEdgeError(
            f"`form`: expected {' or '.join(FORMATS)}, found {form!r}",
            "peft for PEFT and transformers, gguf for llama.cpp",
        )
    if form == "gguf" and model is None:
        raise LimeEdgeError(
            "`model`: a gguf needs the base model: its rows are ordered by attention heads",
            "pass a Hugging Face directory or a GGUF file",
        )
    read = read_adapter(adapter)
    lora = pin_expert(read, selection)
    decoder = None if model is None else pair(read_decoder_backbone(model), read).backbone.decoder
    if form == "gguf":
        assert decoder is not None
        if output.exists() and not force:
            raise LimeEdgeError(f"{output}: already exists", "choose another name or pass `force`")
        write_file(output, encode_gguf(lora, decoder))
        return lora
    with stage_directory(output, replace=force) as stage:
        write_peft(lora, stage, decoder is not None)
    return lora


def pin_expert(adapter: Adapter, selection: Selection) -> PlainLora:
    """Multiply an expert's vector into B, site by site.

    Args:
        adapter: of variant lora or lora_fa. selection: as in `export_expert`.
    Raises:
        LimeEdgeError: another variant, sites on embeddings, unknown expert, weights that do not sum to 1.
    Source: this file's first lines; p = sum_e w_e p_e + gamma p_shared (conformance README).
    """
    check_plain(adapter)
    weights = weigh(adapter, selection)
    sites: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, site in adapter.sites.items():
        assert site.a is not None and site.b is not None
        p = weights @ site.vectors().double()
        sites[name] = site.a, (p.unsqueeze(1) * site.b.double()).float()
    with Faults(adapter.path) as faults:
        for name, (_, b) in sites.items():
            if not torch.isfinite(b).all():
                faults.add(f"{name}: diag(p) B is beyond float32's range")
    return PlainLora(
        describe_selection(selection), adapter.rank, adapter.alpha, adapter.target_modules, adapter.base_name, sites
    )


def check_plain(adapter: Adapter) -> None:
    """Refuse an adapter whose pinned expert is not a LoRA.

    Raises:
        LimeEdgeError: with the reason.
    """
    reasons = {
        DORA.name: "its magnitude scales the frozen output too, bias included, and neither PEFT's DoRA nor "
        "llama.cpp computes that for every p",
        SLICEFINE.name: "it multiplies rows of the weight instead of adding a low-rank product",
        PROMPT_TUNING.name: "it puts virtual tokens before the prompt and changes no layer",
    }
    hint = "export a bundle with lime-edge export instead"
    if (name := adapter.variant.name) in reasons:
        problem = f"{adapter.path}: a {name} expert is not a LoRA: {reasons[name]}"
        raise LimeEdgeError(problem, hint)
    if count_header(adapter):
        problem = f"{adapter.path}: its experts act from the generation prompt on, a plain LoRA acts on every token"
        raise LimeEdgeError(problem, hint)
    embeddings = [name for name, site in adapter.sites.items() if site.embedding]
    if embeddings:
        problem = f"{adapter.path}: an expert on an embedding ({', '.join(embeddings)}) is not a plain LoRA"
        raise LimeEdgeError(problem, hint)


def weigh(adapter: Adapter, selection: Selection) -> torch.Tensor:
    """The experts' weights (E,) float64 of a selection.

    Raises:
        LimeEdgeError: none selected, unknown names, weights that do not sum to 1.
    """
    blend: Mapping[str, float] = {selection: 1.0} if isinstance(selection, str) else selection or {}
    names = adapter.expert_names
    unknown = [name for name in blend if name not in names]
    if unknown or not blend:
        found = ", ".join(map(repr, unknown)) or "none"
        raise LimeEdgeError(f"unknown expert {found}", f"experts of this adapter: {', '.join(names)}")
    total = math.fsum(blend.values())
    if not math.isfinite(total) or abs(total - 1.0) > 1e-6:
        hint = "scale the weights so that they sum to 1 (else the shared vector would be scaled)"
        raise LimeEdgeError(f"blend weights sum to {total:g}, expected 1", hint)
    return torch.tensor([blend.get(name, 0.0) for name in names], dtype=torch.float64)


def write_peft(lora: PlainLora, directory: Path, causal: bool) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them.

    Args:
        directory: existing and empty. causal: the base is known to be a decoder language model.
    Source: PEFT checkpoint format (huggingface.co/docs/peft, "PEFT checkpoint format").
    """
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": lora.base_name,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(lora.target_modules),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in lora.sites.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    text = json.dumps(config, indent=2) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def encode_gguf(lora: PlainLora, decoder: Decoder) -> bytes:
    """A llama.cpp LoRA adapter: lora_a (r, D) and lora_b (H, r) per tensor, float32.

    Raises:
        LimeEdgeError: a site that llama.cpp has no tensor for; the package gguf is missing.
    Source: ggml-org/llama.cpp, src/llama-adapter.cpp (what its loader reads).
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise need("gguf", "export") from None
    if decoder.gguf is None:
        raise LimeEdgeError(f"llama.cpp has no {decoder.family} models", "export it for PEFT: `peft`")
    architecture, interleaved = decoder.gguf
    known = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, len(decoder.layers))
    with tempfile.TemporaryDirectory() as folder, Faults("GGUF") as faults:
        file = Path(folder) / "adapter.gguf"
        writer = gguf.GGUFWriter(file, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.alpha)
        writer.add_name(lora.name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for name, (a, b) in lora.sites.items():
            target = names.get_name(name)
            if target is None:
                faults.add(f"{name}: llama.cpp's {architecture} has no such tensor")
                continue
            heads = {"q_proj": decoder.heads, "k_proj": decoder.kv_heads}.get(name.rsplit(".", 1)[-1])
            rows = interleave_rows(b, heads) if interleaved and heads else b
            writer.add_tensor(f"{target}.weight.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{target}.weight.lora_b", rows.contiguous().numpy())
        faults.raise_any()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


def interleave_rows(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of every head from halves (x0.. | y0..) to pairs (x0 y0 x1 y1 ..).

    Args:
        matrix: (heads * d, n), rows as transformers' rotary embedding pairs them: i with i + d/2.
    Returns:
        (heads * d, n), rows as llama.cpp's pairs them: 2i with 2i + 1.
    Source: the two conventions of RoPE (arXiv 2104.09864, eq. 34); row order of ggml-org/llama.cpp's converted files.
    """
    rows, columns = matrix.shape
    halves = matrix.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)
