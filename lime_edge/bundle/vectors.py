"""Vectors without a shared adapter: the folder that training a new expert leaves, made into expert files.

Such a folder is an adapter directory (docs/adapter-format.md) that holds LiMEs only: A and B are those that
the bundle already has in its weights. numpy only: it is read on the device.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lime_edge.bundle.bundle import Bundle, hash_file
from lime_edge.bundle.experts import DTYPES, Expert, check_name
from lime_edge.errors import Faults, LimeEdgeError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HINT = "vectors fit the shared adapter they were trained with; another one needs lime-edge export"


def read_vectors(directory: Path, bundle: Bundle) -> list[Expert]:
    """The experts of a folder of vectors, as files for this bundle.

    Args:
        directory: adapter_config.json and adapter_model.safetensors (SITE.LiMEs (E, H); SITE.LiME_shared (H,)
            and SITE.gamma (1,) where the adapter has a shared vector).
    Returns:
        Full vectors p (sum_H,), gamma * p_shared included, in the bundle's site order and dtype.
    Raises:
        LimeEdgeError: all faults at once: another backbone or shared adapter, missing, extra, mis-shaped or
            non-finite tensors, bad names.
    """
    config, tensors = _read_config(directory / CONFIG), _read_tensors(directory / WEIGHTS)
    with Faults(f"{directory} does not fit {bundle.path}", HINT) as faults:
        names = _check_names(config, faults)
        _check_adapter(config, tensors, directory, bundle, faults)
        _check_tensors(config, tensors, bundle, len(names), faults)
    dtype = DTYPES[bundle.manifest.adapter["expert_dtype"]]
    with np.errstate(over="ignore"):
        flat = np.concatenate([_join(tensors, site.name) for site in bundle.manifest.sites], axis=1).astype(dtype)
    if not np.isfinite(flat).all():
        raise LimeEdgeError(
            f"{directory}: a vector holds values beyond {np.dtype(dtype)}'s range",
            "export the bundle with --quant none: it stores float32",
        )
    fingerprint, sites = bundle.manifest.fingerprint, bundle.manifest.sites.hash
    return [Expert(name, flat[index], fingerprint, sites) for index, name in enumerate(names)]


def _check_names(config: dict[str, Any], faults: Faults) -> list[str]:
    names = config.get("expert_names")
    if not isinstance(names, list) or not names or len(names) != config.get("num_experts"):
        faults.add(f"{CONFIG}: expert_names", f"{config.get('num_experts')} names", names)
        return []
    for name in names:
        if problem := check_name(name):
            faults.add(f"{CONFIG}: expert_names: {problem}")
    return names


def _check_adapter(
    config: dict[str, Any], tensors: dict[str, np.ndarray], directory: Path, bundle: Bundle, faults: Faults
) -> None:
    """Backbone and shared adapter: the same as the bundle's, as far as the folder names them."""
    manifest = bundle.manifest
    base = config.get("base_fingerprint")
    if base is not None and base != manifest.fingerprint:
        faults.add("base_fingerprint", manifest.fingerprint[:16], str(base)[:16])
    for field, mine in (("variant", "variant"), ("r", "rank"), ("lora_alpha", "alpha")):
        if mine in manifest.adapter and config.get(field) != manifest.adapter[mine]:
            faults.add(field, manifest.adapter[mine], config.get(field))
    known = manifest.adapter.get("sha256")
    own = [name for name in tensors if name.rsplit(".", 1)[-1] not in ("LiMEs", "LiME_shared", "gamma")]
    if own:  # a whole adapter: welcome if it is the very one of the bundle
        named: Any = hash_file(directory / WEIGHTS).sha256
    else:
        training = config.get("training")
        named = training.get("shared_adapter_sha256") if isinstance(training, dict) else None
    if known is not None and named is not None and named != known:
        faults.add("shared adapter (sha256)", known[:16], str(named)[:16])
    elif own and known is None:
        faults.add(f"{own[0]}: the folder holds a shared adapter of its own")
    if manifest.adapter.get("shared_vector") and not config.get("use_shared_lime"):
        faults.add("LiME_shared and gamma", "those of the bundle's adapter", "none")


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
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LimeEdgeError(f"{file}: not readable: {error}", "is this a folder of LiME vectors?") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LIME":
        raise LimeEdgeError(f"{file}: peft_type: expected LIME", "is this a folder of LiME vectors?")
    return config


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        hint = "copy it again; store float16 or float32"
        raise LimeEdgeError(f"{file}: not a readable safetensors file: {error}", hint) from None
