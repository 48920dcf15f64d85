"""Import: a checkpoint of the authors' code, or a PEFT LoRA, becomes an adapter in our format.

`authors` knows the authors' full state dict, `peft` PEFT's directory. Both give `Imported`, which is checked and
written here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from msgspec import structs
from safetensors.torch import save_file

from lime_edge.bundle.inside import is_folder, is_plain
from lime_edge.bundle.staging import stage_directory
from lime_edge.compiler.formats.adapter import write_adapter
from lime_edge.compiler.formats.authors import read_state
from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.compiler.formats.checkpoint import pair
from lime_edge.compiler.formats.decoder import read_decoder_backbone
from lime_edge.compiler.formats.families import FAMILIES
from lime_edge.compiler.formats.files import reading
from lime_edge.compiler.formats.hyper import Imported, ImportOptions
from lime_edge.compiler.formats.peft import read_peft
from lime_edge.compiler.formats.sketch import draw_sketch
from lime_edge.compiler.formats.vision import read_vision_backbone
from lime_edge.compiler.formats.vision_families import VISION_FAMILIES
from lime_edge.errors import LimeEdgeError

BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "preprocessor_config.json",
    "processor_config.json",
)


def import_checkpoint(source: Path, output: Path, options: ImportOptions) -> dict[str, Any]:
    """Convert a checkpoint, or write nothing.

    Args:
        source: a directory (or weight file) of a full state dict, or a PEFT LoRA directory.
        output: the directory to appear: adapter/ in it, and backbone/ for a full state dict.
    Returns:
        What was written: variant, sites, experts, whether there is a backbone.
    Raises:
        LimeEdgeError: unknown or missing hyper-parameters, tensors that do not fit, a variant that the
            format does not carry, storage.
    """
    if not (is_plain(source) or is_folder(source)):
        raise LimeEdgeError(f"{source}: no such file or directory", "pass a checkpoint's directory or its weights")
    peft = source.is_dir() and (source / "adapter_config.json").is_file()
    with reading(f"{source}: not a readable checkpoint", "docs/adapter-format.md says what an import takes over"):
        imported = read_peft(source, options) if peft else read_state(source, options)
    with stage_directory(output, replace=options.force) as stage, _naming(source, stage):
        base = imported.base
        if imported.backbone is not None:
            base = _write_backbone(stage / "backbone", imported)
        if base is not None:
            imported.config["base_fingerprint"] = base.fingerprint
            imported.config["base_sketch"] = structs.asdict(draw_sketch(base, Path(base.path)))
        (stage / "adapter").mkdir()
        adapter = write_adapter(stage / "adapter", imported.config, imported.tensors)
        if base is not None:
            pair(base, adapter)
    config = imported.config
    return {
        "variant": config["variant"],
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "experts": config["expert_names"],
        "sites": len(adapter.sites),
        "selection": config["routing"],
        "adapter": str(output / "adapter"),
        "backbone": None if imported.backbone is None else str(output / "backbone"),
    }


@contextmanager
def _naming(source: Path, stage: Path) -> Iterator[None]:
    """Errors name what the user gave, not the temporary directory where the output grows."""
    try:
        yield
    except LimeEdgeError as error:
        problem = error.problem
        for name in (str(stage / "backbone"), str(stage / "adapter"), str(stage)):
            problem = problem.replace(name, str(source))
        raise LimeEdgeError(problem, error.hint, error.exit_code) from None


def _write_backbone(stage: Path, imported: Imported) -> Backbone | None:
    """Write a transformers directory; returns it read back where it is a language model, with pictures or without."""
    assert imported.backbone is not None and imported.directory is not None
    stage.mkdir()
    (stage / "config.json").write_text(json.dumps(imported.backbone_config, indent=2) + "\n", encoding="utf-8")
    kept: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in imported.backbone.items():
        storage = tensor.untyped_storage().data_ptr()  # tied weights of a PyTorch file share one
        kept[name] = (tensor.clone() if storage in storages else tensor).contiguous()
        storages.add(storage)
    save_file(kept, stage / "model.safetensors", metadata={"format": "pt"})
    for name in BESIDE:
        if (imported.directory / name).is_file():
            shutil.copyfile(imported.directory / name, stage / name)
    family = (imported.backbone_config or {}).get("model_type")
    if family in VISION_FAMILIES:
        return read_vision_backbone(stage)
    return read_decoder_backbone(stage) if family in FAMILIES else None
