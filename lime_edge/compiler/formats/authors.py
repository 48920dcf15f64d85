"""A full state dict of the authors' code: backbone and adapter in one, told apart and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lime_edge.compiler.formats.configs import read_config
from lime_edge.compiler.formats.files import read_weights
from lime_edge.compiler.formats.hyper import (
    Imported,
    ImportOptions,
    check_hyper,
    make_config,
    name_targets,
    read_hyper,
)
from lime_edge.compiler.formats.vision_families import VISION_FAMILIES
from lime_edge.compiler.maths.variants import PROMPT_TUNING, SLICEFINE, find_variant
from lime_edge.errors import Faults, LimeEdgeError


def read_state(source: Path, options: ImportOptions) -> Imported:
    """Read a full state dict of the authors' code.

    Source: names and hyper-parameters: conformance README; defaults: Kowsher/LiME at 82f981f.
    """
    directory = source if source.is_dir() else source.parent
    hyper = read_hyper(directory, options)
    state = read_weights(source)
    if places := _list_configs(directory, options.model):
        state = respell_state(state, read_config(places[0]))
    with Faults(str(source), "hyper-parameters come from a file, `hyper`, or one by one from `settings`") as faults:
        _refuse_prompts(hyper, state, faults)
        check_hyper(hyper, faults)
        _check_splittable(state, faults)
        faults.raise_any()
        backbone, sites = split_state(state)
        variant = hyper["variant"]
        _check_state(hyper, sites, faults)
        faults.raise_any()
        tensors = {
            f"{name}.{part}": t
            for name, found in sites.items()
            for part, t in found.items()
            if part not in ("part_F", "bias")
        }
        embeddings = [name for name in sites if _is_embedding(name, state, sites[name])]
        name, first = next(iter(sites.items()))
        rank = first["A"].shape[0] if "A" in first else first["part_T"].shape[1 if name in embeddings else 0]
        if rank != hyper.get("rank", rank):
            faults.add(f"{name}: rank", hyper["rank"], rank)
        config = make_config(hyper, variant, rank, first["LiMEs"].shape[0], "LiME_shared" in first, options.names)
        modules = [key.removesuffix(".weight") for key, t in backbone.items() if key.endswith(".weight")]
        wanted = hyper.get("target_modules")
        config["target_modules"] = name_targets(sites, modules, wanted if isinstance(wanted, list) else [])
        if embeddings:
            config |= {"embedding_modules": embeddings, "pad_token_id": hyper.get("pad_token_id")}
    described = _read_model_config(directory, options.model, hyper)
    return Imported(config, tensors, backbone, described, directory)


def respell_state(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A state dict under the names of transformers 5: of vision-language models, four spellings occur.

    Source: conformance README, "vision", "Names".
    """
    family = VISION_FAMILIES.get(str(config.get("model_type")))
    return dict(state) if family is None else {family.spell(name): tensor for name, tensor in state.items()}


def split_state(
    state: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Split a reference checkpoint's full state dict into backbone and sites.

    Args:
        state: names as the reference saves them; a site is a module that has `LiMEs`.
    Returns:
        The backbone's state dict in transformers' own names (SliceFine's parts joined), and module
        name -> adapter tensors.
    Source: conformance README, "models".
    """
    names = {key.removesuffix(".LiMEs") for key in state if key.endswith(".LiMEs")}
    backbone: dict[str, torch.Tensor] = {}
    sites: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for key, tensor in state.items():
        site = next((name for name in names if key.startswith(name + ".")), None)
        if site is None:
            backbone[key] = tensor
            continue
        local = key.removeprefix(site + ".")
        if local.startswith(("linear.", "embedding.")):
            backbone[f"{site}.{local.split('.', 1)[1]}"] = tensor
        else:
            sites[site][local] = tensor
    for name, tensors in sites.items():
        if "part_T" in tensors:
            rows = tensors["part_T"].shape[0] + tensors["part_F"].shape[0]
            side = 0 if rows == tensors["LiMEs"].shape[1] else 1
            backbone[f"{name}.weight"] = torch.cat([tensors["part_T"], tensors["part_F"]], dim=side)
            if "bias" in tensors:
                backbone[f"{name}.bias"] = tensors["bias"]
    return backbone, {name: sites[name] for name in sorted(sites)}


def _refuse_prompts(hyper: Mapping[str, Any], state: Mapping[str, torch.Tensor], faults: Faults) -> None:
    if hyper.get("variant") == PROMPT_TUNING.name or any(name.endswith("prompt_base") for name in state):
        faults.add(
            "prompt tuning has no adapted layers, and an adapter directory holds nothing else: "
            "its virtual tokens cannot be imported"
        )
        faults.raise_any()


def _check_splittable(state: Mapping[str, torch.Tensor], faults: Faults) -> None:
    """Note what would keep the state dict from being split into backbone and sites."""
    sites = [key.removesuffix(".LiMEs") for key in state if key.endswith(".LiMEs")]
    if not sites:
        faults.add("no module of the state dict has LiMEs: this is not a LiME checkpoint")
    for site in sites:
        matrices = {part: state.get(f"{site}.{part}") for part in ("A", "B", "LiMEs", "part_T", "part_F")}
        flat = [part for part, tensor in matrices.items() if tensor is not None and tensor.ndim != 2]
        for part in flat:
            faults.add(f"{site}.{part}", "two axes", tuple(state[f"{site}.{part}"].shape))
        top, rest = matrices["part_T"], matrices["part_F"]
        if top is None and rest is None or flat:
            continue
        if top is None or rest is None:
            faults.add(f"{site}: part_T and part_F come together")
            continue
        width = state[f"{site}.LiMEs"].shape[1]
        (t, d), (f, e) = top.shape, rest.shape
        if not (d == e and t + f == width or t == f and d + e == width and t + f != width):
            faults.add(
                f"{site}: part_T and part_F must be the rows (or columns) of one weight with H = {width}",
                found=f"{tuple(top.shape)} and {tuple(rest.shape)}",
            )


def _check_state(hyper: Mapping[str, Any], sites: Mapping[str, Mapping[str, torch.Tensor]], faults: Faults) -> None:
    variant = find_variant(hyper["variant"])
    wanted = {*variant.parts, "LiMEs"} | ({"part_F"} if variant is SLICEFINE else set())
    optional = {"LiME_shared", "gamma"} | ({"bias"} if variant is SLICEFINE else set())
    for name, found in sites.items():
        for part in sorted(wanted - found.keys()):
            faults.add(f"{name}.{part} is missing (variant {variant.name})")
        for part in sorted(found.keys() - wanted - optional):
            faults.add(f"{name}.{part} is not a tensor of variant {variant.name}")
        if found["LiMEs"].shape[0] != hyper.get("num_experts", found["LiMEs"].shape[0]):
            faults.add(f"{name}.LiMEs: num_experts", hyper["num_experts"], found["LiMEs"].shape[0])
        shared = "LiME_shared" in found
        if shared != hyper.get("use_shared_LiME", shared):
            faults.add(f"{name}.LiME_shared: use_shared_LiME", hyper["use_shared_LiME"], shared)


def _is_embedding(name: str, state: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> bool:
    if "part_T" not in found:
        return f"{name}.embedding.weight" in state
    return found["part_T"].shape[0] + found["part_F"].shape[0] != found["LiMEs"].shape[1]


def _list_configs(directory: Path, model: Path | None) -> list[Path]:
    places = [place / "config.json" for place in (directory, model) if place is not None]
    return [place for place in places if place.is_file()]


def _read_model_config(directory: Path, model: Path | None, hyper: Mapping[str, Any]) -> dict[str, Any]:
    found = _list_configs(directory, model)
    if not found:
        raise LimeEdgeError(f"{directory}: config.json is missing", "pass the base model's directory as `model`")
    config = read_config(found[0])
    if "architecture" in hyper:
        config["architectures"] = [hyper["architecture"]]
    return config
