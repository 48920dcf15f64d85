"""The LiME adapter directory: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.experts import check_name

VARIANTS = ("lora", "lora_fa", "dora", "slicefine")
# field -> (types, required); documented one by one in docs/adapter-format.md
FIELDS: dict[str, tuple[tuple[type, ...], bool]] = {
    "peft_type": ((str,), True),
    "variant": ((str,), True),
    "base_model_name_or_path": ((str, type(None)), False),
    "base_fingerprint": ((str, type(None)), False),
    "target_modules": ((list,), True),
    "r": ((int,), True),
    "lora_alpha": ((int, float), True),
    "num_experts": ((int,), True),
    "expert_names": ((list,), True),
    "use_shared_lime": ((bool,), False),
    "routing": ((str,), False),
    "top_k": ((int,), False),
    "auto_topk": ((bool,), False),
    "auto_topk_threshold": ((int, float), False),
    "soft_topk": ((bool,), False),
    "soft_topk_temperature": ((int, float), False),
    "sparse_mode": ((bool,), False),
    "temperature": ((int, float), False),
    "gamma_routing": ((int, float), False),
    "n_gram": ((int,), False),
    "license": ((str, type(None)), False),
}


@dataclass(frozen=True)
class AdapterSite:
    """One site's tensors, float32: A (r, D), B (H, r), experts (E, H), shared (H,) or None, gamma."""

    a: torch.Tensor
    b: torch.Tensor
    experts: torch.Tensor
    shared: torch.Tensor | None
    gamma: float

    def vectors(self) -> torch.Tensor:
        """Every expert with gamma * p_shared added: (E, H) float32."""
        if self.shared is None:
            return self.experts
        return self.experts + self.gamma * self.shared


@dataclass(frozen=True)
class Adapter:
    """A LiME adapter as read: no maths done yet."""

    path: str
    variant: str
    rank: int
    alpha: float
    expert_names: tuple[str, ...]
    target_modules: tuple[str, ...]
    base_name: str | None
    base_fingerprint: str | None
    routing: str
    sites: dict[str, AdapterSite] = field(repr=False)

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank


def read_adapter(path: Path) -> Adapter:
    """Read and check an adapter directory by itself; whether it fits a model is asked elsewhere.

    Raises:
        LimeEdgeError: all faults at once: missing files, unknown or missing fields, wrong types,
            missing, extra, mis-shaped or non-finite tensors.
    """
    config = _read_config(path)
    tensors = _read_tensors(path / "adapter_model.safetensors")
    with Faults(str(path), "docs/adapter-format.md lists every field and tensor") as faults:
        _check_config(config, faults)
        faults.raise_any()
        sites = _collect_sites(config, tensors, faults)
    return Adapter(
        path=str(path),
        variant=config["variant"],
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        expert_names=tuple(config["expert_names"]),
        target_modules=tuple(config["target_modules"]),
        base_name=config.get("base_model_name_or_path"),
        base_fingerprint=config.get("base_fingerprint"),
        routing=config.get("routing", "pinned"),
        sites=sites,
    )


def _read_config(path: Path) -> dict:
    file = path / "adapter_config.json"
    if not path.is_dir():
        raise LimeEdgeError(f"{path}: no such adapter directory", "pass the folder of adapter_config.json")
    if not file.is_file():
        raise LimeEdgeError(f"{path}: adapter_config.json is missing", "is this a LiME adapter directory?")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LimeEdgeError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise LimeEdgeError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise LimeEdgeError(f"{file}: missing", "an adapter directory holds adapter_model.safetensors")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise LimeEdgeError(f"{file}: not a readable safetensors file: {error}") from None


def _check_config(config: dict, faults: Faults) -> None:
    for name in sorted(set(config) - set(FIELDS)):
        faults.add(f"adapter_config.json: unknown field {name!r}")
    for name, (types, required) in FIELDS.items():
        if name not in config:
            if required:
                faults.add(f"adapter_config.json: field {name!r} is missing")
        elif not isinstance(config[name], types) or (isinstance(config[name], bool) and bool not in types):
            wanted = " or ".join(kind.__name__ for kind in types)
            faults.add(f"adapter_config.json: {name}", wanted, repr(config[name]))
    faults.raise_any()
    if config["peft_type"] != "LIME":
        faults.add("adapter_config.json: peft_type", "LIME", config["peft_type"])
    if config["variant"] not in VARIANTS:
        faults.add("adapter_config.json: variant", " or ".join(VARIANTS), config["variant"])
    if config["r"] < 1:
        faults.add("adapter_config.json: r", "at least 1", config["r"])
    names = config["expert_names"]
    if len(names) != config["num_experts"]:
        faults.add("adapter_config.json: expert_names", f"{config['num_experts']} names", len(names))
    if len(set(map(str, names))) != len(names):
        faults.add("adapter_config.json: expert_names are not unique", found=names)
    for name in names:
        problem = check_name(name)
        if problem:
            faults.add(f"adapter_config.json: expert_names: {problem}")


def _collect_sites(config: dict, tensors: dict[str, torch.Tensor], faults: Faults) -> dict[str, AdapterSite]:
    parts = ["A", "B", "LiMEs"] + (["LiME_shared", "gamma"] if config.get("use_shared_lime") else [])
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        site, _, part = name.rpartition(".")
        if part not in parts or not site:
            faults.add(f"adapter_model.safetensors: unknown tensor {name!r}")
            continue
        if not torch.isfinite(tensor).all():
            faults.add(f"adapter_model.safetensors: {name} holds NaN or infinite values")
        grouped.setdefault(site, {})[part] = tensor.float()
    if not grouped:
        faults.add("adapter_model.safetensors holds no adapter tensors")
    return {
        name: site
        for name, found in grouped.items()
        if (site := _build_site(name, found, parts, config, faults)) is not None
    }


def _build_site(
    name: str, found: dict[str, torch.Tensor], parts: list[str], config: dict, faults: Faults
) -> AdapterSite | None:
    missing = [part for part in parts if part not in found]
    for part in missing:
        faults.add(f"adapter_model.safetensors: {name}.{part} is missing")
    if missing:
        return None
    width, rank, count = found["B"].shape[0], config["r"], config["num_experts"]
    depth = found["A"].shape[-1]
    shapes = {"A": (rank, depth), "B": (width, rank), "LiMEs": (count, width)}
    shapes |= {"LiME_shared": (width,), "gamma": (1,)}
    wrong = [part for part in parts if tuple(found[part].shape) != shapes[part]]
    for part in wrong:
        faults.add(f"adapter_model.safetensors: {name}.{part}", shapes[part], tuple(found[part].shape))
    if wrong:
        return None
    shared = found.get("LiME_shared")
    gamma = float(found["gamma"]) if "gamma" in found else 0.0
    return AdapterSite(found["A"], found["B"], found["LiMEs"], shared, gamma)
