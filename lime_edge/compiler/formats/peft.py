"""Read a PEFT LoRA or DoRA directory and expert vectors trained on it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lime_edge.bundle.experts import FORMAT, read_expert
from lime_edge.bundle.identity import hash_adapter
from lime_edge.bundle.sites import SiteTable
from lime_edge.compiler.formats.decoder import DecoderBackbone, read_decoder_backbone
from lime_edge.compiler.formats.files import read_json, read_safetensors, reading
from lime_edge.compiler.formats.hyper import (
    Imported,
    ImportOptions,
    check_hyper,
    make_config,
    name_targets,
    read_hyper,
)
from lime_edge.compiler.maths.variants import DORA, LORA, LORA_FA
from lime_edge.errors import Faults, LimeEdgeError

PREFIX = "base_model.model."
SUFFIXES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
PATTERN = re.compile(r"\^?(?:[\w.|-]|\\[.d])+\$?")  # of names: nothing that could take forever to match
# an option of PEFT that changes what a layer computes -> the value that our format stands for
NEUTRAL: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "megatron_config": (None,),
}


def read_peft(source: Path, options: ImportOptions) -> Imported:
    """Read a PEFT directory; without expert vectors it becomes one expert of ones, the LoRA itself.

    Args:
        source: directory of adapter_config.json and adapter_model.safetensors.
        options: `model` and `experts` are used here.
    Raises:
        LimeEdgeError: an option of PEFT that the format does not carry, tensors that do not fit.
    Source: PEFT checkpoint format (huggingface.co/docs/peft, "PEFT checkpoint format").
    """
    config = read_json(source / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        known = config.get("peft_type") == "LIME"
        hint = "this is a LiME adapter already: use it as it is" if known else "only PEFT's LoRA and DoRA are read"
        problem = f"{source}/adapter_config.json: peft_type: expected LORA, found {config.get('peft_type')}"
        raise LimeEdgeError(problem, hint)
    base = None if options.model is None else read_decoder_backbone(options.model)
    dora = bool(config.get("use_dora"))
    hyper = {"variant": DORA.name if dora else LORA.name, **read_hyper(source, options)}
    with Faults(str(source), "docs/adapter-format.md says what an import takes over") as faults:
        _check_options(config, faults)
        _check_invocation(config, hyper, faults)
        check_hyper(hyper, faults)
        sites = _read_sites(source / "adapter_model.safetensors", dora, faults)
        if dora:
            _check_dora(base, sites, faults)
            if hyper["variant"] != DORA.name:
                faults.add("variant: this is a DoRA", DORA.name, hyper["variant"])
        elif hyper["variant"] not in (LORA.name, LORA_FA.name):
            faults.add("variant: this is a LoRA", "lora or lora_fa", hyper["variant"])
        faults.raise_any()
        rank, alpha = _even_out(config, sites, faults), float(config["lora_alpha"])
        faults.raise_any()
        for name, found in {"rank": rank, "alpha": alpha}.items():
            if hyper.get(name, found) != found:
                faults.add(f"{name} of adapter_config.json", hyper[name], found)
        widths = {name: found["B"].shape[0] for name, found in sites.items()}
        vectors, names = _read_vectors(options.experts, widths, base, faults)
        faults.raise_any()
        tensors = {f"{site}.{part}": t for site, found in sites.items() for part, t in found.items()}
        # rsLoRA scales by alpha / sqrt(r), the format by lora_alpha / r
        hyper["alpha"] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
        count = next(t.shape[0] for name, t in vectors.items() if name.endswith(".LiMEs"))
        shared = any(name.endswith(".LiME_shared") for name in vectors)
        made = make_config(hyper, hyper["variant"], rank, count, shared, options.names or tuple(names))
        if not options.experts and not options.names:
            made["expert_names"] = ["lora"]
        if not any(key in hyper for key in ("top_k", "auto_topk", "sparse_mode")):
            made["routing"] = "pinned"
    made["base_model_name_or_path"] = config.get("base_model_name_or_path")
    made["target_modules"] = _name_targets(config, sites, None if base is None else base.layers)
    _check_origin(options.experts, base, made, tensors)
    return Imported(made, tensors | vectors, base=base)


def _check_invocation(config: Mapping[str, Any], hyper: Mapping[str, Any], faults: Faults) -> None:
    """PEFT's activated LoRA acts from its invocation tokens on: here that must be the end of every prompt.

    Source: PEFT, LoraConfig.alora_invocation_tokens.
    """
    if not (tokens := config.get("alora_invocation_tokens")):
        return
    given = hyper.get("activation")
    found = given.get("tokens") if isinstance(given, dict) and given.get("kind") == "generation_prompt" else None
    if found != len(tokens):
        faults.add(
            f"alora_invocation_tokens: {len(tokens)} tokens from which on it acts; where every prompt ends with them: "
            f'`settings` \'activation={{"kind": "generation_prompt", "tokens": {len(tokens)}}}\''
        )


def _check_options(config: Mapping[str, Any], faults: Faults) -> None:
    for name, neutral in NEUTRAL.items():
        if name in config and config[name] not in neutral:
            faults.add(f"adapter_config.json: {name} cannot be carried over", neutral[0], config[name])
    _check_patterns(config, faults)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        faults.add("adapter_config.json: r", "an integer of at least 1", repr(rank))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha <= 0:
        faults.add("adapter_config.json: lora_alpha", "a number above 0", repr(alpha))


def _read_sites(file: Path, dora: bool, faults: Faults) -> dict[str, dict[str, torch.Tensor]]:
    if not file.is_file():
        raise LimeEdgeError(f"{file}: missing", "save the PEFT adapter with safe_serialization=True")
    tensors = read_safetensors(file)
    wanted = ("A", "B", "m") if dora else ("A", "B")
    sites: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        local = name.removeprefix(PREFIX)
        suffix = next((suffix for suffix in SUFFIXES if local.endswith("." + suffix)), None)
        if suffix is None or SUFFIXES[suffix] not in wanted:
            faults.add(f"{file.name}: {name} is not a LoRA tensor of a linear layer")
            continue
        sites.setdefault(local.removesuffix("." + suffix), {})[SUFFIXES[suffix]] = tensor
    if not sites:
        faults.add(f"{file.name} holds no LoRA tensors")
    for site, found in sites.items():
        for part in wanted:
            if part not in found:
                faults.add(f"{file.name}: {site} has no {part}")
            elif part != "m" and found[part].ndim != 2:
                faults.add(f"{file.name}: {site}: {part}", "two axes", tuple(found[part].shape))
    return dict(sorted(sites.items()))


def _even_out(config: Mapping[str, Any], sites: dict[str, dict[str, torch.Tensor]], faults: Faults) -> int:
    """One rank and one scale for all sites, where PEFT's patterns give some their own; returns the rank.

    Smaller ranks are filled up with zeros, and what their scale differs by goes into B: the product stays as it is.

    Args:
        sites: A (r_i, D) and B (H, r_i), changed in place.
    Source: PEFT, get_pattern_key (a pattern matches a name's end) and LoraLayer.update_layer (scaling).
    """
    rank, ranks, alphas = int(config["r"]), config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not ranks and not alphas:
        return rank
    own = {name: _match(ranks, name, rank) for name in sites}
    for name, wanted in own.items():
        if wanted != sites[name]["A"].shape[0]:
            faults.add(f"{name}: A: rows that rank_pattern says", wanted, sites[name]["A"].shape[0])
    faults.raise_any()
    most = max(own.values())

    def scale(alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    for name, site in sites.items():
        ratio = scale(_match(alphas, name, config["lora_alpha"]), own[name]) / scale(config["lora_alpha"], most)
        more = most - own[name]
        site["A"] = torch.nn.functional.pad(site["A"].float(), (0, 0, 0, more))
        site["B"] = torch.nn.functional.pad(site["B"].float() * ratio, (0, more))
    return most


def _match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What the first pattern that fits says."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)


def _check_patterns(config: Mapping[str, Any], faults: Faults) -> None:
    """Note patterns that are none: numbers above 0, by names or simple patterns of them."""
    for key, kinds in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        found = config.get(key) or {}
        if not isinstance(found, dict) or len(found) > 4096:
            faults.add(f"adapter_config.json: {key}", "numbers by name", f"{found!r:.40}")
            continue
        for pattern, value in found.items():
            if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                faults.add(f"adapter_config.json: {key}: {pattern!r:.40}", "a number above 0", f"{value!r:.40}")
            if not PATTERN.fullmatch(pattern):
                faults.add(
                    f"adapter_config.json: {key}: {pattern!r:.40}: expected a name, or names with | between them"
                )


def _check_dora(base: DecoderBackbone | None, sites: Mapping[str, Any], faults: Faults) -> None:
    """PEFT's DoRA leaves the bias alone, LiME's scales it: equal only where there is none."""
    if base is None:
        faults.add("a DoRA needs its base model, to see which layers have a bias: pass `model`")
        return
    biased = [name for name in sites if base.decoder.has_bias(name)]
    if biased:
        faults.add(f"DoRA on layers with a bias is another function in PEFT than in LiME: {', '.join(biased[:4])}")


def _name_targets(config: Mapping[str, Any], sites: Mapping[str, Any], layers: Iterable[str] | None) -> list[str]:
    wanted = config.get("target_modules")
    wanted = wanted if isinstance(wanted, list) else []
    if layers is not None:
        return name_targets(sites, layers, wanted)
    narrowed = any(config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    return list(sites) if narrowed or not wanted else name_targets(sites, [], wanted)


Vectors = tuple[dict[str, torch.Tensor], list[str]]


def _read_vectors(
    files: tuple[Path, ...], widths: Mapping[str, int], base: DecoderBackbone | None, faults: Faults
) -> Vectors:
    """Expert vectors as `SITE.LiMEs` (E, H) and so on, and the experts' names where files say them."""
    if not files:
        return {f"{site}.LiMEs": torch.ones(1, width) for site, width in widths.items()}, []
    flat: dict[str, torch.Tensor] = {}
    per_site: dict[str, torch.Tensor] = {}
    for file in files:
        found = _read_vector_file(file)
        if any(name.endswith(".LiMEs") for name in found):
            per_site |= {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
        else:
            flat |= found
    faults.raise_any()
    if per_site and flat:
        faults.add("`experts`: per-site tensors in one file and flat vectors in another: give one kind")
    elif per_site:
        for site in widths:
            if f"{site}.LiMEs" not in per_site:
                faults.add(f"`experts`: {site}.LiMEs is missing")
        return per_site, []
    faults.raise_any()
    table = _order_sites(widths, base)
    for name, vector in flat.items():
        if tuple(vector.shape) != (table.total,):
            faults.add(f"`experts`: {name}", (table.total,), tuple(vector.shape))
    faults.raise_any()
    stacked = torch.stack([vector.float() for vector in flat.values()])
    return {f"{s.name}.LiMEs": stacked[:, s.offset : s.offset + s.width] for s in table}, list(flat)


def _read_vector_file(file: Path) -> dict[str, torch.Tensor]:
    """One file's tensors; an expert file of ours gives one flat vector."""
    if not _is_expert(file):
        return read_safetensors(file)
    expert = read_expert(file)
    return {expert.name: torch.from_numpy(expert.vector.copy())}


def _is_expert(file: Path) -> bool:
    with reading(f"{file}: not a readable safetensors file"), safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get("format") == FORMAT


def _check_origin(
    files: tuple[Path, ...], base: DecoderBackbone | None, made: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Expert files of ours were made for this very adapter."""
    own = [file for file in files if _is_expert(file)]
    if not own:
        return
    widths = {name.removesuffix(".B"): t.shape[0] for name, t in tensors.items() if name.endswith(".B")}
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    wanted = hash_adapter(made["variant"], made["r"], made["lora_alpha"], _order_sites(widths, base), arrays)
    with Faults("`experts`", "an expert fits the shared adapter it was trained with, and no other") as faults:
        for file in own:
            if (found := read_expert(file).adapter_id) != wanted:
                faults.add(f"{file}: adapter_id", wanted[:16], found[:16])


def _order_sites(widths: Mapping[str, int], base: DecoderBackbone | None) -> SiteTable:
    if base is None:
        raise LimeEdgeError(
            "`experts`: flat vectors follow the base model's order of layers",
            "pass the base model as `model`, or tensors SITE.LiMEs",
        )
    return SiteTable.from_widths((name, widths[name]) for name in base.layers if name in widths)
