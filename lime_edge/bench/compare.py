"""Two documents of `lime-edge bench`, before and after: ratios, and whether they mean anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    "expert_bytes.file": (LOWER, ""),
    "bundle_bytes": (LOWER, ""),
}
ROUNDS = {"prefill_tokens_per_s": "ttft_ms", "decode_tokens_per_s": "decode_ms"}  # whose rounds a rate comes from
MATCHED = ("kind", "target", "prompt_tokens", "depth")  # runs of two documents belong together when these agree
SAME_RUN = ("kind", "target", "provider", "expert", "quant", "threads", "prompt_tokens", "gen_tokens", "depth")
SAME_MACHINE = ("cpu", "cores", "arch", "board", "governor")


@dataclass(frozen=True)
class Document:
    """A file and what it holds."""

    path: Path
    facts: Facts


def read_document(path: Path) -> Document:
    """Read what `lime-edge bench --json` wrote.

    Raises:
        LimeEdgeError: not such a document, or of another schema.
    """
    hint = "write one with lime-edge bench BUNDLE --json > FILE"
    facts = parse_json(read_text(path, hint), str(path), hint)
    if not isinstance(facts, dict) or "schema" not in facts or "switch_us" not in facts:
        raise LimeEdgeError(f"{path}: not a document of lime-edge bench", hint)
    if facts["schema"] != SCHEMA:
        raise LimeEdgeError(
            f"{path}: schema: expected {SCHEMA}, found {facts['schema']}",
            "measure again with this lime-edge: different schemas are not compared",
        )
    with Faults(str(path), hint) as faults:
        for key in ("runs", "machine", "fingerprint"):
            if not isinstance(facts.get(key), {"runs": list, "machine": dict}.get(key, str)) or not facts[key]:
                faults.add(f"{key} is missing, or of another kind")
    return Document(path, facts)


def compare_files(before: Path, after: Path) -> dict[str, Any]:
    """Compare two documents run by run.

    Returns:
        {"schema", "a", "b", "warnings": [...], "runs": [{"run", "metrics": [{"metric", "better", "a", "b", "ratio",
        "a_spread", "b_spread", "verdict"}]}]}; ratio is B / A; verdict is "better", "worse", "equal" (within
        NOTICEABLE), "within the spread" (the p5..p95 of the rounds overlap) or "too few rounds".
    Raises:
        LimeEdgeError: unreadable, of another schema, or without a run in common.
    """
    a, b = read_document(before), read_document(after)
    try:
        return _compare(a, b)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise LimeEdgeError(
            f"{before} and {after}: one of them is damaged: {error!r}", "measure again with lime-edge bench --json"
        ) from None


def _compare(a: Document, b: Document) -> dict[str, Any]:
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
    return {"schema": SCHEMA, "a": str(a.path), "b": str(b.path), "warnings": warnings, "runs": results}


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
