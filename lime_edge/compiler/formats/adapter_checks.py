"""The rules of an adapter directory, each one a fault when it is broken. No file is read here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import torch

from lime_edge.bundle.fields import Always, FromGenerationPrompt
from lime_edge.bundle.names import check_name
from lime_edge.compiler.maths.prompt_tuning import CONDITIONING
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.maths.variants import VARIANTS, find_variant
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.targets.values import PLAIN_TEXT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALWAYS = "always"
Activation = Always | FromGenerationPrompt
VECTORS = ("LiMEs", "LiME_shared", "gamma")  # what an expert delivered later consists of
IMPORT = "lime-edge import CHECKPOINT -o imported/, then export imported/backbone --adapter imported/adapter"
PROMPT = "prompt"  # the one site of prompt tuning: the virtual tokens before the model
SELECTIONS = ("soft_topk", "hard_topk", "auto_topk", "sparse_topk", "sparse_auto_topk")
MOST_EXPERTS, MOST_RANK, MOST_ALPHA, MOST_TEXT = 65536, 1 << 20, 1e9, 512  # what the manifest takes
# field -> (types, required); documented one by one in docs/adapter-format.md
FIELDS: dict[str, tuple[tuple[type, ...], bool]] = {
    "peft_type": ((str,), True),
    "variant": ((str,), True),
    "base_model_name_or_path": ((str, type(None)), False),
    "base_fingerprint": ((str, type(None)), False),
    "base_sketch": ((dict, type(None)), False),
    "target_modules": ((list,), True),
    "embedding_modules": ((list,), False),
    "pad_token_id": ((int, type(None)), False),
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
    "input_conditioned": ((bool,), False),
    "input_conditioning_mode": ((str,), False),
    "activation": ((dict, str), False),
    "training": ((dict, type(None)), False),
    "license": ((str, type(None)), False),
}


def check_adapter(
    config: dict[str, Any], tensors: Mapping[str, torch.Tensor], faults: Faults
) -> dict[str, dict[str, torch.Tensor]]:
    """Note every fault of both halves; what can be checked is checked whatever else is wrong.

    Args:
        config: the fields. tensors: `SITE.PART` -> tensor.
    Returns:
        site -> part -> float32 tensor, complete and of the right shapes when there are no faults.
    """
    refuse_strangers(tensors, faults.where)
    typed = _check_types(config, faults)
    sites: dict[str, dict[str, torch.Tensor]] = {}
    if typed.get("variant") in VARIANTS and "r" in typed and "num_experts" in typed:
        sites = _check_tensors(typed, tensors, faults)
    if all(name in typed for name, (_, required) in FIELDS.items() if required):
        _check_values(typed, faults)
    return sites


def refuse_strangers(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Name what else a directory is, in place of a fault for every tensor.

    Raises:
        LimeEdgeError: expert vectors alone, a whole checkpoint of the authors' code, or a PEFT LoRA.
    """
    parts = {name.rpartition(".")[2] for name in tensors}
    if parts and parts <= set(VECTORS):
        raise LimeEdgeError(
            f"{where}: holds expert vectors alone: the shared adapter they belong to is in a bundle",
            f"lime-edge experts add BUNDLE {where}",
        )
    if any(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors):
        raise LimeEdgeError(
            f"{where}: holds a PEFT LoRA, not a LiME adapter",
            f"lime-edge import {where} -o imported/, then --adapter imported/adapter",
        )
    if parts & {"weight", "part_F"}:
        refuse_checkpoint(tensors, where, "an adapter")


def refuse_checkpoint(names: Iterable[str], where: str, wanted: str) -> None:
    """Refuse a state dict of the authors' code, backbone and adapter in one, where half of it is wanted.

    Raises:
        LimeEdgeError: one of the tensors is an expert's.
    """
    if any(name.endswith(".LiMEs") for name in names):
        raise LimeEdgeError(f"{where}: holds a whole checkpoint of the LiME authors' code, not {wanted}", IMPORT)


def name_selection(config: RoutingConfig) -> str:
    """The selection that a routing configuration makes, one of SELECTIONS."""
    if config.sparse_mode:
        return "sparse_auto_topk" if config.auto_topk else "sparse_topk"
    if config.auto_topk:
        return "auto_topk"
    return "soft_topk" if config.soft_topk else "hard_topk"


def is_named(site: str, modules: list[str]) -> bool:
    """Whether a list of module names means this site: by its full name or by its last part."""
    return site in modules or site.rsplit(".", 1)[-1] in modules


def check_routing(values: Mapping[str, Any], prefix: str, faults: Faults) -> bool:
    """Note every routing hyper-parameter that is out of range, also those a variant ignores."""
    try:
        RoutingConfig.from_mapping(values)
    except LimeEdgeError as error:
        for line in error.problem.split("\n  - ")[1:] or [error.problem]:
            faults.add(prefix + line.removeprefix("routing hyper-parameters: "))
        return False
    return True


def _check_types(config: dict[str, Any], faults: Faults) -> dict[str, Any]:
    """The known fields of the right type; a fault for every other one."""
    typed: dict[str, Any] = {}
    for name in sorted(set(config) - set(FIELDS)):
        faults.add(f"{CONFIG}: unknown field {name!r}")
    for name, (types, required) in FIELDS.items():
        value = config.get(name)
        if name not in config:
            if required:
                faults.add(f"{CONFIG}: field {name!r} is missing")
        elif not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            faults.add(f"{CONFIG}: {name}", wanted, repr(value))
        else:
            typed[name] = value
    return typed


def _check_values(config: dict[str, Any], faults: Faults) -> None:
    if config["peft_type"] != "LIME":
        faults.add(f"{CONFIG}: peft_type", "LIME", config["peft_type"])
    if config["variant"] not in VARIANTS:
        faults.add(f"{CONFIG}: variant", " or ".join(VARIANTS), config["variant"])
    if not 1 <= config["r"] <= MOST_RANK:
        faults.add(f"{CONFIG}: r", f"at least 1 and at most {MOST_RANK}", config["r"])
    if not 0 < config["lora_alpha"] <= MOST_ALPHA:
        faults.add(f"{CONFIG}: lora_alpha", f"a number above 0, at most {MOST_ALPHA:g}", config["lora_alpha"])
    if not 1 <= config["num_experts"] <= MOST_EXPERTS:
        faults.add(f"{CONFIG}: num_experts", f"at least 1 and at most {MOST_EXPERTS}", config["num_experts"])
    for name in ("base_model_name_or_path", "license"):
        text = config.get(name) or ""
        if len(text) > MOST_TEXT or not re.search(PLAIN_TEXT, text):
            faults.add(f"{CONFIG}: {name}: at most {MOST_TEXT} characters, none of control")
    for name in ("target_modules", "embedding_modules"):
        for module in config.get(name, []):
            if not isinstance(module, str):
                faults.add(f"{CONFIG}: {name}", "module names", repr(module))
    names = config["expert_names"]
    if len(names) != config["num_experts"]:
        faults.add(f"{CONFIG}: expert_names", f"{config['num_experts']} names", len(names))
    if len(set(map(str, names))) != len(names):
        faults.add(f"{CONFIG}: expert_names are not unique", found=names)
    for name in names:
        problem = check_name(name)
        if problem:
            faults.add(f"{CONFIG}: expert_names: {problem}")
    mode = config.get("input_conditioning_mode", "mean")
    if mode not in CONDITIONING:
        faults.add(f"{CONFIG}: input_conditioning_mode", " or ".join(CONDITIONING), repr(mode))
    _check_activation(config, faults)
    _check_routing(config, faults)


def _check_activation(config: dict[str, Any], faults: Faults) -> None:
    """On which tokens the experts act; what cannot be switched off acts always."""
    given = config.get("activation", ALWAYS)
    if given == ALWAYS:
        return
    try:
        found = msgspec.convert({} if isinstance(given, str) else given, FromGenerationPrompt | Always)
    except msgspec.ValidationError as error:
        wanted = f'"{ALWAYS}" or {{"kind": "generation_prompt", "tokens": N, "text": TEXT}}'
        faults.add(f"{CONFIG}: activation", wanted, f"{given!r:.120}" + (f" ({error})" if given else ""))
        return
    variant = VARIANTS.get(config["variant"])
    if variant is not None and isinstance(found, FromGenerationPrompt) and not variant.switches_off:
        faults.add(f"{CONFIG}: activation: a {variant.name} adapter cannot be switched off: it acts always")


def read_activation(config: Mapping[str, Any]) -> Activation:
    """On which tokens the experts act, of a configuration that was checked."""
    given = config.get("activation", ALWAYS)
    return Always() if given == ALWAYS else msgspec.convert(given, FromGenerationPrompt | Always)


def _check_routing(config: dict[str, Any], faults: Faults) -> None:
    if not check_routing(config, f"{CONFIG}: ", faults) or config["variant"] not in VARIANTS:
        return
    routing = find_variant(config["variant"]).read_routing(config)
    word = config.get("routing", "pinned")
    if word == "pinned":
        return
    if word != name_selection(routing):
        words = f"pinned, or {name_selection(routing)} as the other fields say"
        faults.add(f"{CONFIG}: routing", words, repr(word))
    if routing.top_k > config["num_experts"]:
        faults.add(f"{CONFIG}: top_k", f"at most num_experts, {config['num_experts']}", routing.top_k)


def _check_tensors(
    config: dict[str, Any], tensors: Mapping[str, torch.Tensor], faults: Faults
) -> dict[str, dict[str, torch.Tensor]]:
    parts = [*find_variant(config["variant"]).parts, "LiMEs"]
    parts += ["LiME_shared", "gamma"] if config.get("use_shared_lime") else []
    parts += ["input_proj"] if any(name == f"{PROMPT}.input_proj" for name in tensors) else []
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        site, _, part = name.rpartition(".")
        if part not in parts or not site:
            faults.add(f"{WEIGHTS}: unknown tensor {name!r}")
            continue
        if not tensor.is_floating_point():
            faults.add(f"{WEIGHTS}: {name}", "floating point", tensor.dtype)
        elif not torch.isfinite(tensor).all():
            faults.add(f"{WEIGHTS}: {name} holds NaN or infinite values")
        grouped.setdefault(site, {})[part] = tensor.float()
    if not grouped:
        faults.add(f"{WEIGHTS} holds no adapter tensors")
    for name, found in grouped.items():
        _check_site(name, found, parts, config, faults)
        vectors = found.get("LiMEs", torch.zeros(1, 1))
        if config.get("routing", "pinned") != "pinned" and vectors.ndim == 2 and vectors.shape[1] < len(vectors):
            faults.add(
                f"{WEIGHTS}: {name}: width (routing reads an output per expert)",
                f"at least {config['num_experts']}",
                vectors.shape[1],
            )
    return grouped


def _check_site(
    name: str, found: dict[str, torch.Tensor], parts: list[str], config: dict[str, Any], faults: Faults
) -> None:
    missing = [part for part in parts if part not in found]
    for part in missing:
        faults.add(f"{WEIGHTS}: {name}.{part} is missing")
    if missing:
        return
    embedding = is_named(name, config.get("embedding_modules", []))
    shapes = _expect_shapes(found, config, embedding)
    wrong = [part for part in parts if not _fits(found[part], shapes[part])]
    for part in wrong:
        expected = "(" + ", ".join("any" if n is None else str(n) for n in shapes[part]) + ")"
        faults.add(f"{WEIGHTS}: {name}.{part}", expected, tuple(found[part].shape))
    if not wrong and "part_T" in found and config["r"] > found["LiMEs"].shape[1]:
        faults.add(f"{WEIGHTS}: {name}.part_T", f"at most H = {found['LiMEs'].shape[1]} rows", config["r"])


def _expect_shapes(
    found: dict[str, torch.Tensor], config: dict[str, Any], embedding: bool
) -> dict[str, tuple[int | None, ...]]:
    """Expected shapes, None for a free axis; H is taken from the tensor that a trainer sizes first."""
    rank = config["r"]
    source = found["LiMEs"] if "B" not in found else found["A"].T if embedding else found["B"]
    width = source.shape[-1 if "B" not in found else 0] if source.ndim == 2 else None
    table = find_variant(config["variant"]).table
    narrow_b = not (embedding and table is not None and table.tall_b)
    return {
        "A": (rank, width if embedding else None),
        "B": (width if narrow_b else None, rank),
        "m": (width,),
        "part_T": (None, rank) if embedding else (rank, None),
        "prompt_base": (rank, width),
        "prompt_delta": (rank, width),
        "input_proj": (width, width),
        "LiMEs": (config["num_experts"], width),
        "LiME_shared": (width,),
        "gamma": (1,),
    }


def _fits(tensor: torch.Tensor, shape: tuple[int | None, ...]) -> bool:
    return tensor.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
