"""Import: a checkpoint of the authors' code, or a PEFT LoRA, becomes an adapter in our format.

`read_state` knows the authors' full state dict; `compiler.importing_peft` knows PEFT's directory.
Both give `Imported`; `import_checkpoint` checks and writes it.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lime_edge.bundle.staging import stage_directory
from lime_edge.compiler.formats.adapter import write_adapter
from lime_edge.compiler.formats.adapter_checks import PARTS, check_routing, is_named, name_selection
from lime_edge.compiler.formats.architecture import FAMILIES
from lime_edge.compiler.formats.backbone import Backbone, read_backbone
from lime_edge.compiler.formats.checkpoint import pair
from lime_edge.compiler.maths.layers import routing_for
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.model.reference import DEFAULT_ALPHA, split_state
from lime_edge.errors import Faults, LimeEdgeError

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
    *ROUTING,
)
TRAINING = ("dropout", "jitter_noise", "LiME_init_std", "track_aux", "peft_dtype", "moe_dtype")
WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
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
)


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
    from lime_edge.compiler.formats.peft import read_peft

    if not source.exists():
        raise LimeEdgeError(f"{source}: no such file or directory", "pass a checkpoint's directory or its weights")
    peft = source.is_dir() and (source / "adapter_config.json").is_file()
    imported = read_peft(source, options) if peft else read_state(source, options)
    with stage_directory(output, replace=options.force) as stage, _naming(source, stage):
        base = imported.base
        if imported.backbone is not None:
            base = _write_backbone(stage / "backbone", imported)
        if base is not None:
            imported.config["base_fingerprint"] = base.fingerprint()
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


def read_state(source: Path, options: ImportOptions) -> Imported:
    """Read a full state dict of the authors' code.

    Source: names and hyper-parameters: conformance README; defaults: Kowsher/LiME at 82f981f.
    """
    directory = source if source.is_dir() else source.parent
    hyper = read_hyper(directory, options)
    state = read_weights(source)
    with Faults(str(source), "hyper-parameters come from --hyper FILE.json and --set KEY=VALUE") as faults:
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
    if hyper.get("variant") not in PARTS:
        faults.add("variant", " or ".join(PARTS), hyper.get("variant", "nothing"))
        return
    check_routing(hyper, "", faults)
    alpha = hyper.get("alpha", DEFAULT_ALPHA)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        faults.add("alpha", "a number", repr(alpha))


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
        "routing": name_selection(routing_for(variant, hyper)),
        **given,
    }


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


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    """Read a state dict: one safetensors file, its shards, or a PyTorch file read without running code."""
    file = source
    if source.is_dir():
        found = [source / name for name in WEIGHTS if (source / name).is_file()]
        if not found:
            raise LimeEdgeError(f"{source}: holds none of {', '.join(WEIGHTS)}", "name the weight file itself")
        file = found[0]
    try:
        if file.suffix == ".json":
            shards = sorted(set(read_json(file)["weight_map"].values()))
            return {name: t for shard in shards for name, t in load_file(file.parent / shard).items()}
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        OSError,
        KeyError,
        AttributeError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise LimeEdgeError(
            f"{file}: not a readable state dict: {error}", "copy it again; it must hold tensors only"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise LimeEdgeError(
            f"{file}: expected a state dict (name -> tensor), found something else",
            "save model.state_dict(), not the model",
        )
    return dict(state)


def _refuse_prompts(hyper: Mapping[str, Any], state: Mapping[str, torch.Tensor], faults: Faults) -> None:
    if hyper.get("variant") == "prompt_tuning" or any(name.endswith("prompt_base") for name in state):
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
    variant = hyper["variant"]
    slicefine = variant == "slicefine"
    wanted = {*PARTS[variant], "LiMEs"} | ({"part_F"} if slicefine else set())
    optional = {"LiME_shared", "gamma"} | ({"bias"} if slicefine else set())
    for name, found in sites.items():
        for part in sorted(wanted - found.keys()):
            faults.add(f"{name}.{part} is missing (variant {variant})")
        for part in sorted(found.keys() - wanted - optional):
            faults.add(f"{name}.{part} is not a tensor of variant {variant}")
        if found["LiMEs"].shape[0] != hyper.get("num_experts", found["LiMEs"].shape[0]):
            faults.add(f"{name}.LiMEs: num_experts", hyper["num_experts"], found["LiMEs"].shape[0])
        shared = "LiME_shared" in found
        if shared != hyper.get("use_shared_LiME", shared):
            faults.add(f"{name}.LiME_shared: use_shared_LiME", hyper["use_shared_LiME"], shared)


def _is_embedding(name: str, state: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> bool:
    if "part_T" not in found:
        return f"{name}.embedding.weight" in state
    return found["part_T"].shape[0] + found["part_F"].shape[0] != found["LiMEs"].shape[1]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LimeEdgeError(f"{file}: not a readable JSON file: {error}", "copy it again, or mend it by hand") from None
    if not isinstance(read, dict):
        raise LimeEdgeError(
            f"{file}: expected a JSON object, found {type(read).__name__}", 'write it as {"name": value, ...}'
        )
    return read


def _read_model_config(directory: Path, model: Path | None, hyper: Mapping[str, Any]) -> dict[str, Any]:
    places = [place / "config.json" for place in (directory, model) if place is not None]
    found = [place for place in places if place.is_file()]
    if not found:
        raise LimeEdgeError(f"{directory}: config.json is missing", "pass the base model's directory with --model")
    config = read_json(found[0])
    if "architecture" in hyper:
        config["architectures"] = [hyper["architecture"]]
    return config


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
    """Write a transformers directory; returns it read back where it is a decoder of ours."""
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
    decoder = (imported.backbone_config or {}).get("model_type") in FAMILIES
    return read_backbone(stage) if decoder else None
