"""Vectors without a shared adapter: the folder that training a new expert leaves, made into expert files.

Such a folder is an adapter directory (docs/adapter-format.md) that holds LiMEs only: A and B are those that
the bundle already has in its weights. numpy only: it is read on the device.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError, deserialize

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import DTYPES, MOST_TEXT, Expert, check_values
from lime_edge.bundle.identity import PARTS, SHARED_PARTS, hash_adapter, hash_shared
from lime_edge.bundle.inside import is_plain
from lime_edge.bundle.names import check_name
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.targets.values import PLAIN_TEXT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_PARTS = set(PARTS) - set(SHARED_PARTS)  # what makes a folder a whole adapter
MOST_CONFIG, MOST_TENSORS = 1 << 20, 2 << 30  # bytes
KINDS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
HINT = "vectors fit the shared adapter they were trained with; another one needs lime-edge export"


def read_vectors(directory: Path, bundle: Bundle) -> list[Expert]:
    """The experts of a folder of vectors, as files for this bundle.

    Args:
        directory: adapter_config.json and adapter_model.safetensors (SITE.LiMEs (E, H); SITE.LiME_shared (H,)
            and SITE.gamma (1,) where the adapter has a shared vector).
    Returns:
        Full vectors p (sum_H,), gamma * p_shared included, in the bundle's site order and dtype.
    Raises:
        LimeEdgeError: all faults at once: another shared adapter or none named, missing, extra, mis-shaped or
            non-finite tensors, bad names.
    """
    config, tensors = _read_config(directory / CONFIG), _read_tensors(directory / WEIGHTS)
    manifest = bundle.manifest
    with Faults(f"{directory} does not fit {bundle.path}", HINT) as faults:
        names = _check_names(config, faults)
        _check_tensors(config, tensors, bundle, len(names), faults)
        if not faults:
            _check_adapter(config, tensors, directory, bundle, faults)
    with np.errstate(over="ignore"):
        flat = np.concatenate([_join(tensors, site.name) for site in manifest.sites], axis=1)
        flat = flat.astype(DTYPES[manifest.adapter.expert_dtype])
    check_values(flat, str(directory))
    license = str(config.get("license") or "")[:MOST_TEXT]
    license = license if re.search(PLAIN_TEXT, license) else ""
    return [Expert(name, flat[index], manifest.adapter_id, license=license) for index, name in enumerate(names)]


def _check_names(config: dict[str, Any], faults: Faults) -> list[str]:
    names = config.get("expert_names")
    if not isinstance(names, list) or not names or len(names) != config.get("num_experts"):
        faults.add(f"{CONFIG}: expert_names", f"{config.get('num_experts')!s:.20} names", f"{names!s:.200}")
        return []
    problems = [problem for name in names if (problem := check_name(name))]
    for problem in problems:
        faults.add(f"{CONFIG}: expert_names: {problem}")
    if not problems and len({name.lower() for name in names}) != len(names):
        faults.add(f"{CONFIG}: expert_names: two are equal, letter case not counted")
    return names


def _check_adapter(
    config: dict[str, Any], tensors: dict[str, np.ndarray], directory: Path, bundle: Bundle, faults: Faults
) -> None:
    """The shared adapter is the bundle's: by its tensors where the folder has them, else by what it names."""
    manifest, facts = bundle.manifest, bundle.manifest.adapter
    for field, mine in (("variant", facts.variant), ("r", facts.rank), ("lora_alpha", facts.alpha)):
        if config.get(field) != mine:
            faults.add(field, mine, f"{config.get(field)!s:.20}")
    given, wanted_header = config.get("activation", "always"), getattr(manifest.activation, "tokens", 0)
    header = given.get("tokens") if isinstance(given, dict) and "generation_prompt" in given.values() else 0
    if header != wanted_header:
        faults.add("activation", _name_activation(wanted_header), _name_activation(header))
    training = config.get("training")
    trained_with = training.get("shared_adapter_sha256") if isinstance(training, dict) else None
    if any(name.rpartition(".")[2] in OWN_PARTS for name in tensors):
        named, wanted = (
            hash_adapter(facts.variant, facts.rank, facts.alpha, manifest.sites, tensors),
            manifest.adapter_id,
        )
    elif config.get("adapter_id") is not None:
        named, wanted = config["adapter_id"], manifest.adapter_id
    elif trained_with is not None and facts.sha256 is not None:
        named, wanted = trained_with, facts.sha256
    else:
        faults.add(
            f"{CONFIG}: names no shared adapter: expected adapter_id {manifest.adapter_id}, if it was trained with that"
        )
        return
    if named != wanted:
        faults.add("shared adapter", wanted[:16], f"{named!s:.16}")
    elif (shared := hash_shared(manifest.sites, tensors)) != facts.shared_id:
        faults.add("LiME_shared and gamma", "those of the bundle's adapter", "others" if shared else "none")


def _name_activation(header: object) -> str:
    return f"from the prompt's last {header!s:.20} tokens on" if header else "always"


def _check_tensors(
    config: dict[str, Any], tensors: dict[str, np.ndarray], bundle: Bundle, count: int, faults: Faults
) -> None:
    sites = bundle.manifest.sites
    for site in sites:
        wanted = {"LiMEs": (count, site.width)}
        if config.get("use_shared_lime"):
            wanted |= {"LiME_shared": (site.width,), "gamma": (1,)}  # type: ignore[dict-item]
        for part in ("LiMEs", "LiME_shared", "gamma"):
            name = f"{site.name}.{part}"
            tensor = tensors.get(name)
            if part not in wanted:
                if tensor is not None:
                    faults.add(f"{name}: use_shared_lime says there is none")
            elif tensor is None:
                faults.add(f"{name} is missing")
            elif tensor.shape != wanted[part]:
                faults.add(name, wanted[part], tensor.shape)
            elif not np.issubdtype(tensor.dtype, np.floating):
                faults.add(name, "floating point", tensor.dtype)
            elif not np.isfinite(tensor).all():
                faults.add(f"{name} holds NaN or infinite values")
    for name in tensors:
        if sites.find(name.rpartition(".")[0]) is None:
            faults.add(f"{name}: the bundle has no such site")


def _join(tensors: dict[str, np.ndarray], site: str) -> np.ndarray:
    """p_e + gamma p_shared: (E, H) float32."""
    vectors = tensors[f"{site}.LiMEs"].astype(np.float32)
    if f"{site}.gamma" not in tensors:
        return vectors
    return vectors + tensors[f"{site}.gamma"].astype(np.float32) * tensors[f"{site}.LiME_shared"].astype(np.float32)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        if not is_plain(file):
            raise OSError("no such file")
        with file.open("rb") as opened:
            config = msgspec.json.decode(opened.read(MOST_CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        raise LimeEdgeError(f"{file}: not readable: {error}", "is this a folder of LiME vectors?") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LIME":
        raise LimeEdgeError(f"{file}: peft_type: expected LIME", "is this a folder of LiME vectors?")
    return config


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor, bfloat16 widened to float32, which numpy has not."""
    try:
        if not is_plain(file):
            raise OSError("no such file")
        if file.stat().st_size > MOST_TENSORS:
            raise LimeEdgeError(f"{file}: expected at most {MOST_TENSORS} bytes, found {file.stat().st_size}", HINT)
        return {name: _view(facts) for name, facts in deserialize(file.read_bytes())}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        hint = "copy it again; store float32, float16 or bfloat16"
        raise LimeEdgeError(f"{file}: not a readable safetensors file: {error}", hint) from None


def _view(facts: dict[str, Any]) -> np.ndarray:
    data, shape = facts["data"], facts["shape"]
    if facts["dtype"] == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    return np.frombuffer(data, KINDS[facts["dtype"]]).reshape(shape)
