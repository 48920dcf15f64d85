"""Decoder language models: a Hugging Face model directory or a GGUF file, read and checked."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lime_edge.bundle.inside import is_folder, is_plain
from lime_edge.compiler.formats.adapter_checks import refuse_checkpoint
from lime_edge.compiler.formats.architecture import HEAD, Decoder, list_layers, list_scales, read_decoder
from lime_edge.compiler.formats.backbone import Backbone, Layer, quiet
from lime_edge.compiler.formats.configs import count_layers, plain_name, read_config
from lime_edge.compiler.formats.families import WRAPPED
from lime_edge.compiler.formats.files import AGAIN, SINGLE, WEIGHTS, read_json, read_weights, reading
from lime_edge.compiler.formats.float8 import EIGHT, read_block, widen
from lime_edge.compiler.formats.gguf import check_gguf
from lime_edge.compiler.formats.prequantized import refuse_prequantized
from lime_edge.errors import Faults, LimeEdgeError

HEAD_NORM = re.compile(r"(.+\.self_attn\.[qk]_layernorm)\.norms\.(\d{1,6})\.weight")


@dataclass(frozen=True)
class DecoderBackbone(Backbone):
    """A language model: what to build, float32 tensors by Hugging Face name, end-of-text token ids."""

    decoder: Decoder
    tensors: dict[str, torch.Tensor] = field(repr=False)
    eos: tuple[int, ...] = ()

    @property
    def layers(self) -> dict[str, Layer]:
        """The token table and every linear layer but the head."""
        return list_layers(self.decoder)

    @property
    def scales(self) -> dict[str, float]:
        """What the family multiplies with (Granite, for one)."""
        return list_scales(self.decoder)

    @property
    def prompt_width(self) -> int | None:
        """Width of an embedding; None where the family scales embeddings, which prompt tuning's routing would see."""
        return self.decoder.hidden if self.decoder.scales.embedding == 1.0 else None

    @property
    def traits(self) -> dict[str, str | int]:
        """Family, heads, and the slowest rotation, to four digits: a GGUF file rounds numbers of the configuration."""
        d = self.decoder
        slowest = d.rotations[0].frequencies[-1]
        return {"family": d.family, "heads": d.heads, "kv_heads": d.kv_heads, "rope": f"{slowest:.3e}"}

    def read_state(self) -> Mapping[str, torch.Tensor]:
        """All tensors; a tied head is not among them."""
        return self.tensors

    def split_state(self, sites: Container[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Matrices, and norms and biases. A head that is tied to an adapted table keeps the old table."""
        weights = {name: tensor for name, tensor in self.tensors.items() if tensor.ndim == 2}
        if self.decoder.tied and self.decoder.embedding in sites:
            weights[f"{HEAD}.weight"] = weights[f"{self.decoder.embedding}.weight"]
        return weights, {name: tensor for name, tensor in self.tensors.items() if tensor.ndim != 2}


def read_decoder_backbone(path: Path) -> DecoderBackbone:
    """Read a language model.

    Args:
        path: a directory with config.json and *.safetensors, a .gguf file, or a directory that holds
            exactly one .gguf file.
    Raises:
        LimeEdgeError: quantized already, not a model, not a supported one, or tensors missing, extra, mis-shaped or
            not finite: all faults at once.
    """
    refuse_prequantized(path)
    gguf = find_gguf(path)
    if gguf is not None:
        config, tensors = _read_gguf(gguf)
    else:
        config, tensors = _read_directory(path)
    config, tensors, stem = unwrap(config, tensors)
    with reading(f"{path}: not a model that can be built", "is this what save_pretrained writes?"):
        decoder = replace(read_decoder(config, str(path)), stem=stem)
    tensors = check_tensors(decoder, flatten_norms(tensors), str(path))
    name = plain_name(gguf.stem if gguf else path.resolve().name)
    return DecoderBackbone(str(path), name, decoder, tensors, read_eos(path, config, decoder.vocab))


def read_eos(path: Path, config: Any, vocab: int) -> tuple[int, ...]:
    """End-of-text ids: of generation_config.json where there is one, else of the model's config."""
    file = path / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = config.eos_token_id if ids is None else ids
    found = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
        raise LimeEdgeError(
            f"{path}: eos_token_id: expected token ids, found {ids!r:.80}",
            "mend generation_config.json, or remove it: config.json has eos too",
        )
    return tuple(one for one in found if 0 <= one < vocab)  # no other can come


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` means, or None when it is a Hugging Face directory."""
    if not (is_plain(path) or is_folder(path)):
        raise LimeEdgeError(f"{path}: no such file or directory", "pass a model directory or a .gguf file")
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise LimeEdgeError(
            f"{path}: expected a model directory or a .gguf file, found a {path.suffix} file",
            "name the directory that the file lies in",
        )
    if (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise LimeEdgeError(f"{path}: holds {len(found)} GGUF files ({names})", "name one of them")
    raise LimeEdgeError(f"{path}: neither config.json nor a .gguf file is in it", "is this a model directory?")


def _read_directory(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    file = path / "config.json"
    facts = read_config(file)
    if not any((path / name).is_file() for name in WEIGHTS):
        hint = "save it with save_pretrained(..., safe_serialization=True)"
        raise LimeEdgeError(f"{path}: {SINGLE} is missing", hint)
    tensors = widen(read_weights(path, (EIGHT,)), read_block(facts), str(path))
    layers = count_layers(facts)
    if layers > len(tensors):
        raise LimeEdgeError(f"{file}: num_hidden_layers: {layers}, but there are {len(tensors)} tensors", AGAIN)
    with reading(f"{file}: not a readable model config", "is this what save_pretrained writes?"):
        return AutoConfig.from_pretrained(path, local_files_only=True), tensors


def _read_gguf(file: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    check_gguf(file)
    with reading(f"{file}: not a readable GGUF model", "pass the Hugging Face directory instead"), quiet():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
    return model.config, model.state_dict()


def unwrap(config: Any, tensors: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor], str]:
    """The decoder of a model that has other parts too: its config, its tensors by their modules' names, its stem."""
    wrapped = WRAPPED.get(config.model_type)
    if wrapped is None:
        return config, tensors, "model"
    text = config.text_config
    text.tie_word_embeddings = config.tie_word_embeddings
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(wrapped.dropped)}
    names = {f"{wrapped.older}.model.": f"{wrapped.stem}.", f"{wrapped.older}.{HEAD}.": f"{HEAD}."}
    for old, new in names.items():
        kept = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in kept.items()}
    return text, kept, wrapped.stem


def flatten_norms(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms of the heads as one vector each, where a checkpoint has a tensor or a row for every head.

    `self_attn.q_layernorm.norms.3.weight` (StableLM) and `self_attn.q_norm.weight` (heads, D) (Command R) alike.
    """
    heads: dict[str, dict[int, torch.Tensor]] = {}
    flat: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        if match := HEAD_NORM.fullmatch(name):
            heads.setdefault(f"{match[1]}.weight", {})[int(match[2])] = tensor
        else:
            flat[name] = tensor.flatten() if name.endswith("_norm.weight") else tensor
    return flat | {name: torch.cat([rows[index] for index in sorted(rows)]) for name, rows in heads.items()}


def check_tensors(decoder: Decoder, found: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """A decoder's tensors, float32; an unused rotation table or a tied head's own copy is left out.

    Args:
        found: by name. where: named in errors.
    Raises:
        LimeEdgeError: tensors missing, extra, mis-shaped or not finite, all at once.
    """
    refuse_checkpoint(found, where, "a backbone")
    wanted = decoder.tensors()
    checked: dict[str, torch.Tensor] = {}
    with Faults(where, "config.json and the weights must come from the same model") as faults:
        for name, shape in wanted.items():
            tensor = found.get(name)
            if tensor is None:
                faults.add(f"tensor {name} is missing", expected=shape)
            elif tuple(tensor.shape) != shape:
                faults.add(f"tensor {name}", shape, tuple(tensor.shape))
            elif not tensor.is_floating_point():
                faults.add(f"tensor {name}", "floating point", tensor.dtype)
            elif not torch.isfinite(tensor).all():
                faults.add(f"tensor {name} holds NaN or infinite values")
            else:
                plain = tensor.detach().float().contiguous()
                checked[name] = plain + 1.0 if decoder.offset_norms and name.endswith("norm.weight") else plain
        for name in found.keys() - wanted.keys():
            tied_head = decoder.tied and name == "lm_head.weight"
            if not tied_head and not name.endswith("rotary_emb.inv_freq"):
                faults.add(f"tensor {name} is not part of a {decoder.family} model")
    return checked
