"""What is in a bundle, as plain data and as tables."""

from __future__ import annotations

from typing import Any

from lime_edge import terminal
from lime_edge.bundle import Bundle, expert_file


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Everything `lime-edge inspect --json` prints."""
    m = bundle.manifest
    return {
        "path": str(bundle.path), "fingerprint": m.fingerprint, "model": m.model, "adapter": m.adapter,
        "quantization": m.quantization, "device": m.device, "versions": m.versions,
        "total_bytes": bundle.total_bytes, "sum_h": m.sites.total, "sites_hash": m.sites.hash,
        "sites": [{"name": s.name, "width": s.width, "offset": s.offset} for s in m.sites],
        "experts": [{"name": n, "bytes": m.files[expert_file(n)].size} for n in m.experts],
        "targets": {name: facts | {"bytes": target_bytes(bundle, name)} for name, facts in m.targets.items()},
        "files": {name: {"bytes": entry.size, "sha256": entry.sha256} for name, entry in m.files.items()},
    }  # fmt: skip


def target_bytes(bundle: Bundle, target: str) -> int:
    """Size of one target's folder in bytes."""
    return sum(e.size for n, e in bundle.manifest.files.items() if n.startswith(f"{target}/"))


def print_bundle(bundle: Bundle, sites: bool) -> None:
    """Print the tables of `lime-edge inspect`."""
    m, size = bundle.manifest, terminal.show_size
    facts = [
        ["model", f"{m.model['name']} ({m.model['family']}, {m.model['layers']} layers)"],
        ["fingerprint", m.fingerprint],
        ["adapter", f"{m.adapter['variant']} rank {m.adapter['rank']}, alpha {m.adapter['alpha']:g}"],
        ["fold", m.adapter["fold"] + (" (single)" if m.adapter["single"] else "")],
        ["quantization", _quantization(m.quantization)],
        ["weight hash", m.quantization["weight_hash"]],
        ["sites", f"{len(m.sites)}, sum_H {m.sites.total}"],
        ["device", m.device],
        ["total size", size(bundle.total_bytes)],
    ]
    terminal.print_table(str(bundle.path), {"": "left", "value": "left"}, facts)
    rows = [
        [name, size(target_bytes(bundle, name)), ", ".join(f["providers"]), f["weight_hash"][:16]]
        for name, f in m.targets.items()
    ]
    columns = {"target": "left", "size": "right", "providers": "left", "weight hash": "left"}
    terminal.print_table("targets", columns, rows)
    rows = [[name, size(m.files[expert_file(name)].size)] for name in m.experts]
    terminal.print_table("experts", {"expert": "left", "size": "right"}, rows)
    if sites:
        rows = [[s.name, str(s.width), str(s.offset)] for s in m.sites]
        terminal.print_table("sites", {"site": "left", "H": "right", "offset": "right"}, rows)


def _quantization(facts: dict[str, Any]) -> str:
    if facts["quant"] == "none":
        return "none (float32)"
    counts = ", ".join(f"{count} {kind}" for kind, count in facts["matrices"].items() if count)
    how = facts["rounding"] + (f", calibrated on {facts['calibration']} text" if facts["calibration"] else "")
    return f"{facts['quant']} {facts['scheme']}, group {facts['group']} ({counts} matrices; {how})"
