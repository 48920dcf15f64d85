"""Two documents of `lime-edge bench`, before and after: ratios, and whether they mean anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lime_edge.bench.devices import is_fleet, list_documents
from lime_edge.bench.measure import SCHEMA
from lime_edge.bench.tables import Facts, Table, name_run, pick
from lime_edge.bundle.documents import parse_json, read_text
from lime_edge.errors import Faults, LimeEdgeError

NOTICEABLE = 0.02  # a ratio nearer to 1 is called equal
FEWEST = 5  # rounds below which a spread says nothing
LOWER, HIGHER = "lower", "higher"
# key -> which way is better, and where its spread over the rounds lies ("" for what is counted, not timed)
METRICS: dict[str, tuple[str, str]] = {
    "load_ms": (LOWER, "load_ms"),
    "load_cold_ms": (LOWER, "load_cold_ms"),
    "ttft_ms": (LOWER, "ttft_ms"),
    "prefill_tokens_per_s": (HIGHER, "prefill_tokens_per_s"),
    "decode_tokens_per_s": (HIGHER, "decode_tokens_per_s"),
    "run_ms.p50": (LOWER, "run_ms"),
    "switch_us.p50": (LOWER, "switch_us"),
    "switch_to_first_token_ms.p50": (LOWER, "switch_to_first_token_ms"),
    "peak_rss_bytes": (LOWER, ""),
    "memory.net_peak_bytes": (LOWER, ""),
    "memory.artifact_bytes": (LOWER, ""),
    "energy.decode_joules_per_token": (LOWER, ""),
    "energy.joules_per_run": (LOWER, ""),
    "expert_bytes.file": (LOWER, ""),
    "bundle_bytes": (LOWER, ""),
}
ROUNDS = {"prefill_tokens_per_s": "ttft_ms", "decode_tokens_per_s": "decode_ms"}  # whose rounds a rate comes from
MATCHED = ("kind", "target", "prompt_tokens", "depth")  # runs of two documents belong together when these agree
SAME_RUN = ("kind", "target", "provider", "expert", "quant", "threads", "prompt_tokens", "gen_tokens", "depth")
SAME_MACHINE = ("cpu", "cores", "arch", "board", "governor")


@dataclass(frozen=True)
class Document:
    """A file and what it holds. device: whose, in a file of several devices; else empty."""

    path: Path
    facts: Facts
    device: str = ""


def read_documents(path: Path) -> list[Document]:
    """Read what `lime-edge bench --json` wrote: one document, or one of each device that was measured.

    Raises:
        LimeEdgeError: not such a document, or of another schema; no device was measured.
    """
    hint = "write one with lime-edge bench BUNDLE --json > FILE"
    facts = parse_json(read_text(path, hint), str(path), hint)
    if not isinstance(facts, dict) or "schema" not in facts or not ("switch_us" in facts or is_fleet(facts)):
        raise LimeEdgeError(f"{path}: not a document of lime-edge bench", hint)
    if facts["schema"] != SCHEMA:
        raise LimeEdgeError(
            f"{path}: schema: expected {SCHEMA}, found {facts['schema']}",
            "measure again with this lime-edge: different schemas are not compared",
        )
    documents = [Document(path, one, device) for device, one in list_documents(facts).items()]
    with Faults(str(path), hint) as faults:
        if not documents:
            faults.add("documents of devices", "one or more", "none: every device failed")
        for document in documents:
            for key in ("runs", "machine", "fingerprint"):
                found = document.facts.get(key) if isinstance(document.facts, dict) else None
                if not isinstance(found, {"runs": list, "machine": dict}.get(key, str)) or not found:
                    faults.add(f"{document.device}: {key} is missing, or of another kind".removeprefix(": "))
    return documents


def compare_files(before: Path, after: Path) -> dict[str, Any]:
    """Compare two documents run by run; of two with several devices each device with itself, else each with the one.

    Returns:
        {"schema", "a", "b", "warnings": [...], "runs": [{"run", "metrics": [{"metric", "better", "a", "b", "ratio",
        "a_spread", "b_spread", "verdict"}]}]}; ratio is B / A; verdict is "better", "worse", "equal" (within
        NOTICEABLE), "within the spread" (the p5..p95 of the rounds overlap) or "too few rounds".
    Raises:
        LimeEdgeError: unreadable, of another schema, or without a run in common.
    """
    mine, others = read_documents(before), read_documents(after)
    try:
        return _compare(mine, others)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise LimeEdgeError(
            f"{before} and {after}: one of them is damaged: {error!r}", "measure again with lime-edge bench --json"
        ) from None


def _compare(mine: list[Document], others: list[Document]) -> dict[str, Any]:
    pairs = _pair_devices(mine, others)
    warnings: list[str] = []
    results: list[dict[str, Any]] = []
    if alone := sorted({one.device for one in [*mine, *others]} - {one.device for pair in pairs for one in pair}):
        warnings.append(f"devices in one document only: {', '.join(alone)}")
    for a, b in pairs:
        label = " and ".join(dict.fromkeys(one.device for one in (a, b) if one.device))
        found, said = _compare_runs(a, b)
        results += [entry | {"run": f"{label}: {entry['run']}" if label else entry["run"]} for entry in found]
        warnings += [f"{label}: {text}" if label else text for text in said]
    return {"schema": SCHEMA, "a": str(mine[0].path), "b": str(others[0].path), "warnings": warnings, "runs": results}


def _pair_devices(mine: list[Document], others: list[Document]) -> list[tuple[Document, Document]]:
    """Devices of the same name; where one side has no names, everything beside everything."""
    if not (mine[0].device and others[0].device):
        return [(a, b) for a in mine for b in others]
    pairs = [(a, b) for a in mine for b in others if a.device == b.device]
    if not pairs:
        names = [", ".join(document.device for document in side) for side in (mine, others)]
        hint = f"devices match by name: {names[0]}; {names[1]}"
        raise LimeEdgeError(f"{mine[0].path} and {others[0].path}: no device in common", hint)
    return pairs


def _compare_runs(a: Document, b: Document) -> tuple[list[dict[str, Any]], list[str]]:
    """The runs that two documents have in common, and warnings."""
    pairs = _match(a, b)
    warnings = _warn(a, b)
    if alone := len(a.facts["runs"]) + len(b.facts["runs"]) - 2 * len(pairs):
        warnings.append(f"{alone} runs are in one document only")
    results = []
    for mine, other in pairs:
        name = name_run(mine, a.facts["runs"])
        for key in SAME_RUN:
            if mine.get(key) != other.get(key):
                warnings.append(f"{name}: different {key}: {mine.get(key)} and {other.get(key)}")
        found = [judge(metric, mine, other) for metric in METRICS]
        results.append({"run": name, "metrics": [entry for entry in found if entry]})
    return results, warnings


def _match(a: Document, b: Document) -> list[tuple[Facts, Facts]]:
    """Runs that belong together; two single runs always do."""
    mine, others = a.facts["runs"], b.facts["runs"]
    if len(mine) == len(others) == 1:
        return [(mine[0], others[0])]
    known = {tuple(run.get(key) for key in MATCHED): run for run in others}
    keys = [tuple(run.get(key) for key in MATCHED) for run in mine]
    pairs = [(run, known[key]) for run, key in zip(mine, keys, strict=True) if key in known]
    if not pairs:
        hint = f"runs match when {', '.join(MATCHED)} agree: measure both with the same options"
        raise LimeEdgeError(f"{a.path} and {b.path}: no run in common", hint)
    return pairs


def _warn(a: Document, b: Document) -> list[str]:
    """What makes the comparison one of apples and pears."""
    mine, other = a.facts, b.facts
    warnings = []
    if mine["fingerprint"] != other["fingerprint"]:
        warnings.append(f"different models: {mine['model']} and {other['model']}")
    for key in SAME_MACHINE:
        if mine["machine"].get(key) != other["machine"].get(key):
            warnings.append(f"different machines: {key}: {mine['machine'].get(key)} and {other['machine'].get(key)}")
    for label, facts in (("A", mine), ("B", other)):
        if facts.get("throttled"):
            warnings.append(f"{label} was throttled: {', '.join(facts['throttled'])}")
    return warnings


def judge(metric: str, mine: Facts, other: Facts) -> dict[str, Any] | None:
    """One metric of two runs; None where it applies to neither or only one has it."""
    better, key = METRICS[metric]
    a, b = pick(mine, metric), pick(other, metric)
    if not a or b is None:
        return None
    ratio, spreads = b / a, [pick(run, f"spread.{key}") if key else None for run in (mine, other)]
    rounds = [len(run["rounds"].get(ROUNDS.get(key, key), ())) if key else FEWEST for run in (mine, other)]
    return {
        "metric": metric,
        "better": better,
        "a": a,
        "b": b,
        "ratio": ratio,
        "a_spread": spreads[0],
        "b_spread": spreads[1],
        "verdict": _decide(ratio, better, spreads, min(rounds)),
    }


def _decide(ratio: float, better: str, spreads: list[Any], rounds: int) -> str:
    if rounds < FEWEST:
        return "too few rounds"
    if abs(ratio - 1) <= NOTICEABLE:
        return "equal"
    if None not in spreads and max(s["p5"] for s in spreads) <= min(s["p95"] for s in spreads):
        return "within the spread"
    return "better" if (ratio < 1) == (better == LOWER) else "worse"


def tabulate_comparison(comparison: dict[str, Any]) -> list[Table]:
    """A table per run."""
    headers = ["metric", "A", "B", "B / A", "verdict"]
    return [
        Table(
            f"A {comparison['a']}, B {comparison['b']}: {entry['run']}",
            headers,
            [
                [
                    m["metric"],
                    _show(m["a"], m["a_spread"]),
                    _show(m["b"], m["b_spread"]),
                    f"{m['ratio']:.3f}",
                    m["verdict"],
                ]
                for m in entry["metrics"]
            ],
        )
        for entry in comparison["runs"]
    ]


def _show(value: float, spread: dict[str, float] | None) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown if spread is None else f"{shown} ({spread['p5']:.4g}..{spread['p95']:.4g})"
