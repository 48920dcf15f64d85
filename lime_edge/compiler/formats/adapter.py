"""The LiME adapter directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lime_edge.bundle.fields import Always
from lime_edge.bundle.inside import is_folder
from lime_edge.compiler.formats.adapter_checks import (
    CONFIG,
    IMPORT,
    WEIGHTS,
    Activation,
    check_adapter,
    is_named,
    read_activation,
)
from lime_edge.compiler.formats.files import read_json, read_safetensors
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.maths.variants import Variant, find_variant
from lime_edge.errors import Faults, LimeEdgeError

CHECKPOINT = ("lime.json", "model.safetensors", "pytorch_model.bin")  # what a checkpoint of the authors' code holds


@dataclass(frozen=True)
class AdapterSite:
    """One site's tensors, float32; what its variant does not have is None.

    Attributes:
        a: (r, D); on an embedding (r, H). SliceFine: None.
        b: (H, r); on an embedding (H, r) for lora, (V, r) for lora_fa and dora. SliceFine: None.
        experts: (E, H). shared: (H,), or None. gamma: weight of `shared`.
        m: (H,), DoRA's magnitude.
        part_t: SliceFine's trained rows (r, D); on an embedding its trained columns (V, r).
        prompt_base, prompt_delta: virtual tokens (V, H) of prompt tuning. input_proj: (H, H), or None.
        embedding: the site is an embedding table (V, H), not a linear layer (H, D).
    """

    a: torch.Tensor | None
    b: torch.Tensor | None
    experts: torch.Tensor
    shared: torch.Tensor | None
    gamma: float
    m: torch.Tensor | None = None
    part_t: torch.Tensor | None = None
    embedding: bool = False
    prompt_base: torch.Tensor | None = None
    prompt_delta: torch.Tensor | None = None
    input_proj: torch.Tensor | None = None

    def vectors(self) -> torch.Tensor:
        """Every expert with gamma * p_shared added: (E, H) float32."""
        if self.shared is None:
            return self.experts
        return self.experts + self.gamma * self.shared

    @property
    def width(self) -> int:
        """H."""
        return self.experts.shape[1]

    @property
    def weight_shape(self) -> tuple[int | None, int | None]:
        """Shape of the backbone's weight: (H, D), or (V, H) of a table; None where any size fits."""
        source = self.part_t if self.part_t is not None else self.b if self.embedding else self.a
        size = None if source is None else source.shape[0 if self.embedding else 1]
        if not self.embedding:
            return self.width, size
        lora = self.part_t is None and self.m is None and size == self.width
        return None if lora else size, self.width

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the site holds, named as in the file; `model.reference` takes it so."""
        named = {"A": self.a, "B": self.b, "m": self.m, "part_T": self.part_t, "LiMEs": self.experts}
        if self.shared is not None:
            named |= {"LiME_shared": self.shared, "gamma": torch.tensor([self.gamma])}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def join(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The tensors that `Variant.fold_linear` and `Variant.fold_embedding` take.

        Args:
            weight: the backbone's (H, D), or table (V, H). SliceFine: only what part_T leaves is read.
            bias: (H,), or None.
        Source: docs/adapter-format.md, "SliceFine".
        """
        joined = {name: t for name, t in self.tensors().items() if name in ("A", "B", "m", "part_T")}
        if self.part_t is None:
            joined["weight"] = weight
        else:
            axis = 1 if self.embedding else 0
            rank = self.part_t.shape[axis]
            joined["part_F"] = weight.narrow(axis, rank, weight.shape[axis] - rank)
        return joined if bias is None else joined | {"bias": bias}


@dataclass(frozen=True)
class Adapter:
    """A LiME adapter as read: no maths done yet. `routing_config` is what its variant applies."""

    path: str
    variant: Variant
    rank: int
    alpha: float
    expert_names: tuple[str, ...]
    target_modules: tuple[str, ...]
    base_name: str | None
    base_fingerprint: str | None
    base_sketch: Mapping[str, Any] | None
    license: str | None
    routing: str
    sites: dict[str, AdapterSite] = field(repr=False)
    routing_config: RoutingConfig = field(default_factory=RoutingConfig)
    pad_token_id: int | None = None
    activation: Activation = Always()  # on which tokens its experts act
    conditioning: str | None = None  # prompt tuning: how its routing reads the input; None: it does not

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank

    def hyper(self) -> dict[str, object]:
        """The hyper-parameters under the reference's names, as `model.reference` takes them."""
        named = {"variant": self.variant.name, "alpha": self.alpha, "pad_token_id": self.pad_token_id}
        return named | asdict(self.routing_config)


def read_adapter(path: Path) -> Adapter:
    """Read and check an adapter directory by itself; whether it fits a model is asked elsewhere.

    Raises:
        LimeEdgeError: all faults at once: missing files, unknown or missing fields, wrong types,
            missing, extra, mis-shaped or non-finite tensors.
    """
    config = _read_config(path)
    return build_adapter(config, _read_tensors(path / WEIGHTS), str(path))


def build_adapter(config: dict[str, Any], tensors: Mapping[str, torch.Tensor], where: str) -> Adapter:
    """Check the two halves of an adapter and put them together.

    Args:
        config: the fields, see FIELDS. tensors: `SITE.PART` -> tensor. where: named in errors.
    Raises:
        LimeEdgeError: as `read_adapter`.
    """
    with Faults(where, "docs/adapter-format.md lists every field and tensor") as faults:
        found = check_adapter(config, tensors, faults)
    variant, embeddings = find_variant(config["variant"]), config.get("embedding_modules", [])
    sites = {name: _build_site(parts, is_named(name, embeddings)) for name, parts in found.items()}
    return Adapter(
        path=where,
        variant=variant,
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        expert_names=tuple(config["expert_names"]),
        target_modules=tuple(config["target_modules"]),
        base_name=config.get("base_model_name_or_path"),
        base_fingerprint=config.get("base_fingerprint"),
        base_sketch=config.get("base_sketch"),
        license=config.get("license"),
        routing=config.get("routing", "pinned"),
        sites=sites,
        routing_config=variant.read_routing(config),
        pad_token_id=config.get("pad_token_id"),
        activation=read_activation(config),
        conditioning=config.get("input_conditioning_mode", "mean") if config.get("input_conditioned", True) else None,
    )


def write_adapter(path: Path, config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Adapter:
    """Check an adapter and write its two files into an existing, empty directory.

    Args: as `build_adapter`; tensors keep their dtype.
    Raises:
        LimeEdgeError: as `read_adapter`; nothing is written then.
    """
    adapter = build_adapter(config, tensors, str(path))
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: t.detach().clone().contiguous() for name, t in tensors.items()},
        path / WEIGHTS,
        metadata={"format": "pt"},
    )
    return adapter


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not is_folder(path):
        raise LimeEdgeError(f"{path}: no such adapter directory", "pass the folder of adapter_config.json")
    if not file.is_file():
        if whole := [name for name in CHECKPOINT if (path / name).is_file()]:
            raise LimeEdgeError(f"{path}: holds {', '.join(whole)}, a whole checkpoint and not an adapter", IMPORT)
        raise LimeEdgeError(f"{path}: adapter_config.json is missing", "is this a LiME adapter directory?")
    return read_json(file)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise LimeEdgeError(f"{file}: missing", "an adapter directory holds adapter_model.safetensors")
    return read_safetensors(file)


def _build_site(parts: Mapping[str, torch.Tensor], embedding: bool) -> AdapterSite:
    gamma = float(parts["gamma"]) if "gamma" in parts else 0.0
    return AdapterSite(
        parts.get("A"),
        parts.get("B"),
        parts["LiMEs"],
        parts.get("LiME_shared"),
        gamma,
        parts.get("m"),
        parts.get("part_T"),
        embedding,
        parts.get("prompt_base"),
        parts.get("prompt_delta"),
        parts.get("input_proj"),
    )
