"""What is in a bundle, as plain data and as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from lime_edge import terminal
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.fields import Fit, Manifest, Quantization, SiteSurvival, Survival
from lime_edge.bundle.golden import FILE as GOLDEN
from lime_edge.errors import EXIT_MISSING, LimeEdgeError
from lime_edge.session.engines import Placement
from lime_edge.session.open import explain_operators, open_any
from lime_edge.targets.facts import TargetFacts

LOUD = 1.0  # median error of a kind of layer above which the rounding is louder than the experts
LOST = 0.75  # median share of the effect below which it counts as rounded away
SURVIVAL_HINT = "measure with lime-edge eval; `keep_int8`, `calibration`, `fold=none` or `quant=int8` hold more"


def show_bundle(path: Path, as_json: bool, sites: bool, verify: bool = False, placement: bool = False) -> None:
    """Print a bundle's facts as tables or JSON."""
    opened = Bundle.open(path, verify)
    places = find_places(opened) if placement else {}
    if as_json:
        found = {"verified": True} if verify else {}
        terminal.print_json(describe_bundle(opened) | found | ({"placement": places} if placement else {}))
        return
    print_bundle(opened, sites)
    for target, place in places.items():
        print_places(target, place)
    if verify:
        terminal.tell(f"all {len(opened.manifest.files)} files are as they were written (sha256)")


def find_places(bundle: Bundle) -> dict[str, Placement | None]:
    """Where the nodes of every target's model run on this machine; None: the engine is not here, or tells nothing.

    Raises:
        LimeEdgeError: a model that its engine refuses.
    """
    found: dict[str, Placement | None] = {}
    for target in bundle.manifest.targets:
        try:
            found[target] = open_any(bundle, target).placement
        except LimeEdgeError as error:
            if error.exit_code != EXIT_MISSING:
                raise
            found[target] = None
    return found


def print_places(target: str, places: Placement | None) -> None:
    """A line per provider and type of node, most frequent first."""
    if places is None:
        terminal.tell(f"{target}: its engine is not here, or does not tell where nodes run")
        return
    rows = [[provider, node, str(count)] for provider, nodes in places.items() for node, count in nodes.items()]
    columns = {"provider": "left", "node": "left", "how many": "right"}
    terminal.print_table(f"where the nodes of {target} run here", columns, rows)


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Everything `lime-edge inspect --json` prints."""
    m = bundle.manifest
    return {
        "path": str(bundle.path),
        **{
            key: value
            for key, value in msgspec.to_builtins(m).items()
            if key not in ("experts", "sites", "targets", "files")
        },
        "total_bytes": bundle.total_bytes,
        "sum_h": m.sites.total,
        "sites": [{"name": s.name, "width": s.width, "offset": s.offset} for s in m.sites],
        "experts": [{"name": n, "bytes": m.find_expert(n).size} for n in m.experts],
        "targets": {
            name: msgspec.to_builtins(facts) | {"bytes": target_bytes(bundle, name)}
            for name, facts in m.targets.items()
        },
        "files": {name: {"bytes": entry.size, "sha256": entry.sha256} for name, entry in m.files.items()},
    }


def target_bytes(bundle: Bundle, target: str) -> int:
    """Size of one target's folder in bytes."""
    return sum(e.size for n, e in bundle.manifest.files.items() if n.startswith(f"{target}/"))


def describe_making(facts: TargetFacts) -> str:
    """What a target's artifact was made for: "cache 1024, prompts 32/128, iOS18, all", "cache 1024, xnnpack"."""
    length = getattr(facts, "max_length", None)
    parts = [f"cache {length}"] if length else []
    prompts = [str(length) for length in getattr(facts, "lengths", ()) if length > 1]  # 1 is the next token's
    parts += [f"prompts {'/'.join(prompts)}"] if prompts else []
    parts += [getattr(facts, key) for key in ("minimum", "compute_units", "backend") if getattr(facts, key, None)]
    return ", ".join(parts)


def print_bundle(bundle: Bundle, sites: bool) -> None:
    """Print the tables of `lime-edge inspect`."""
    m, size = bundle.manifest, terminal.show_size
    facts = [
        ["model", _model(m)],
        ["fingerprint", terminal.show_hash(m.backbone.fingerprint)],
        ["fit", _fit(m.backbone.fit)],
        ["adapter", f"{m.adapter.variant} rank {m.adapter.rank}, alpha {m.adapter.alpha:g}"],
        ["adapter_id", terminal.show_hash(m.adapter_id)],
        ["opens with", m.default],
        ["fold", m.adapter.fold + (" (single)" if m.adapter.single else "")],
        ["quantization", _quantization(m.quantization)],
        ["weight hash", terminal.show_hash(m.quantization.weight_hash)],
        ["sites", f"{len(m.sites)}, sum_H {m.sites.total}"],
        ["device", m.device],
        ["golden outputs", "yes: lime-edge verify compares with them" if GOLDEN in m.files else "no"],
        ["total size", size(bundle.total_bytes)],
    ]
    if (vision := m.vision) is not None:
        whose = "each expert sees for itself" if vision.adapts_tower else "what is seen serves all experts"
        facts.insert(1, ["pictures", f"tiles of {vision.tile} x {vision.tile} pixels; {whose}"])
    for name, target in m.targets.items():
        if getattr(target, "functions", ()) and (absent := explain_operators(name)) is not None:
            facts.append(["operators here", absent or f"yes: the {name} graph's functions run compiled"])
    terminal.print_table(str(bundle.path), {"": "left", "value": "left"}, facts)
    rows = [
        [
            name,
            size(target_bytes(bundle, name)),
            ", ".join(f.providers),
            describe_making(f),
            "yes" if f.routed else "no",
            f.weight_hash[:16],
        ]
        for name, f in m.targets.items()
    ]
    columns = {
        "target": "left",
        "size": "right",
        "providers": "left",
        "made for": "left",
        "routed": "left",
        "weight hash": "left",
    }
    terminal.print_table("targets", columns, rows)
    rows = [[name, size(m.find_expert(name).size)] for name in m.experts]
    terminal.print_table("experts", {"expert": "left", "size": "right"}, rows)
    survival = m.quantization.survival
    if survival:
        print_survival(survival)
    if sites:
        found = survival.sites if survival else {}
        rows = [[s.name, str(s.width), str(s.offset), *_site_survival(found.get(s.name))] for s in m.sites]
        columns = {
            "site": "left",
            "H": "right",
            "offset": "right",
            "worst error": "right",
            "of": "left",
            "least kept": "right",
        }
        terminal.print_table("sites", columns, rows)


def print_survival(survival: Survival) -> None:
    """How much of the experts' effect the rounded weights hold, per kind of layer (docs/folding.md)."""
    columns = {
        "layers": "left",
        "bits": "left",
        "sites": "right",
        "error": "right",
        "worst": "right",
        "kept": "right",
        "least": "right",
    }
    rows = [
        [
            kind,
            ", ".join(f"int{b}" for b in f.bits),
            str(f.sites),
            f"{f.error:.2f}",
            f"{f.worst_error:.2f}",
            f"{f.kept:.1%}",
            f"{f.worst_kept:.1%}",
        ]
        for kind, f in survival.kinds.items()
    ]
    over = f"inputs of the {survival.inputs} text" if survival.inputs else "all inputs alike"
    terminal.print_table(f"the experts' effect after rounding ({over}; medians over sites and experts)", columns, rows)


def find_losses(survival: Survival | None) -> list[str]:
    """What to know before trusting a bundle: kinds of layers where rounding drowned the experts."""
    lines = []
    for kind, facts in survival.kinds.items() if survival else ():
        bits = "/".join(f"int{b}" for b in facts.bits)
        if facts.error > LOUD:
            lines.append(f"{kind} ({bits}): the rounding is {facts.error:.1f} times as loud as the experts")
        elif facts.kept < LOST:
            lines.append(f"{kind} ({bits}): {1 - facts.kept:.0%} of the experts' effect was rounded away")
    return lines


def _site_survival(facts: SiteSurvival | None) -> list[str]:
    return [f"{facts.error:.2f}", facts.expert, f"{facts.kept:.1%}"] if facts else ["", "", ""]


def _model(manifest: Manifest) -> str:
    if (encoder := manifest.encoder) is not None:
        return f"{manifest.backbone.name} ({encoder.architecture}, {encoder.task})"
    return f"{manifest.backbone.name} ({manifest.backbone.family}, {manifest.backbone.layers} layers)"


def _fit(fit: Fit) -> str:
    """How the adapter was found to belong to the backbone."""
    if fit.vectors is None or fit.matrices is None:
        return fit.verdict
    text = f"{fit.verdict}: matrices {fit.matrices:.2%} away, norms {fit.vectors:.2%}"
    return "; ".join([text, *fit.misfits])


def _quantization(facts: Quantization) -> str:
    if facts.quant == "none":
        return "none (float32)"
    counts = ", ".join(f"{count} {kind}" for kind, count in facts.matrices.items() if count)
    how = facts.rounding + (f", calibrated on {facts.calibration} text" if facts.calibration else "")
    return f"{facts.quant} {facts.scheme}, group {facts.group} ({counts} matrices; {how})"
