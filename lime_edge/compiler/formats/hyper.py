"""What an import is told and what it gives; hyper-parameters under the names of the authors' code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lime_edge.compiler.formats.adapter_checks import check_routing, is_named, name_selection
from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.compiler.formats.files import read_json
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.maths.variants import VARIANTS, find_variant
from lime_edge.errors import Faults, LimeEdgeError

DEFAULT_ALPHA = 16.0  # Source: Kowsher/LiME at 82f981f.
ROUTING = tuple(entry.name for entry in fields(RoutingConfig))
# what else a hyper-parameter file may say; README of the conformance fixtures
KNOWN = (
    "variant",
    "target_modules",
    "architecture",
    "num_experts",
    "rank",
    "alpha",
    "use_shared_LiME",
    "pad_token_id",
    "activation",
    *ROUTING,
)
TRAINING = ("dropout", "jitter_noise", "LiME_init_std", "track_aux", "peft_dtype", "moe_dtype")


@dataclass(frozen=True)
class ImportOptions:
    """What the checkpoint itself does not say.

    hyper: hyper-parameters under the reference's names; they win over the file's. hyper_file: JSON;
    lime.json beside the checkpoint by default. names: of the experts, in order. model: base model, for a
    PEFT LoRA. experts: files with expert vectors, for a PEFT LoRA. force: replace the output.
    """

    hyper: Mapping[str, Any] = field(default_factory=dict)
    hyper_file: Path | None = None
    names: tuple[str, ...] = ()
    model: Path | None = None
    experts: tuple[Path, ...] = ()
    force: bool = False


@dataclass(frozen=True)
class Imported:
    """An adapter, and for a full state dict the backbone with its transformers config."""

    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    backbone: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    backbone_config: dict[str, Any] | None = None
    directory: Path | None = None  # where tokenizer files lie
    base: Backbone | None = field(default=None, repr=False)  # a base model that was given


def read_hyper(directory: Path, options: ImportOptions) -> dict[str, Any]:
    """The hyper-parameters of a file, overruled by those given on the command line."""
    file = options.hyper_file or directory / "lime.json"
    if options.hyper_file is None and not file.is_file():
        return dict(options.hyper)
    return {**read_json(file), **options.hyper}


def check_hyper(hyper: Mapping[str, Any], faults: Faults) -> None:
    """Note every hyper-parameter that is unknown, missing or out of range."""
    for name in sorted(hyper.keys() - {*KNOWN, *TRAINING, "rep_mode"}):
        faults.add(f"unknown hyper-parameter {name!r} (known: {', '.join(KNOWN)})")
    if hyper.get("rep_mode", "token") != "token":
        faults.add("rep_mode", "token", hyper["rep_mode"])
    if hyper.get("variant") not in VARIANTS:
        faults.add("variant", " or ".join(VARIANTS), hyper.get("variant", "nothing"))
        return
    check_routing(hyper, "", faults)
    alpha = hyper.get("alpha", DEFAULT_ALPHA)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        faults.add("alpha", "a number", repr(alpha))


def read_alpha(hyper: Mapping[str, object]) -> float:
    """The adapter's alpha, or the reference's default."""
    alpha = hyper.get("alpha", DEFAULT_ALPHA)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise LimeEdgeError(f"alpha: expected a number, found {alpha!r}")
    return float(alpha)


def make_config(
    hyper: Mapping[str, Any], variant: str, rank: int, count: int, shared: bool, names: tuple[str, ...]
) -> dict[str, Any]:
    """The fields of adapter_config.json; target_modules and the base are still empty."""
    given = {key: hyper[key] for key in ROUTING if key in hyper}
    return {
        "peft_type": "LIME",
        "variant": variant,
        "base_model_name_or_path": None,
        "target_modules": [],
        "r": rank,
        "lora_alpha": hyper.get("alpha", DEFAULT_ALPHA),
        "num_experts": count,
        "expert_names": list(names) or [f"expert_{index}" for index in range(count)],
        "use_shared_lime": shared,
        "routing": name_selection(find_variant(variant).read_routing(hyper)),
        **given,
    } | {name: hyper[name] for name in ("activation",) if name in hyper}


def name_targets(sites: Iterable[str], modules: Iterable[str], wanted: list[str]) -> list[str]:
    """Short names (q_proj) where they mean exactly the sites, full module names otherwise.

    Args:
        sites: full names. modules: every module of the model that has a weight. wanted: the trainer's
            own list, tried first.
    """
    sites = list(sites)
    short = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in sites))
    for names in (wanted, short):
        if {name for name in {*modules, *sites} if is_named(name, names)} == set(sites):
            return list(names)
    return sites
