"""The benchmark's document as a table for people (terminal, Markdown, HTML) and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lime_edge import terminal

NOTHING = "-"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A title, one header per column (the first names the rows), and the cells."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def name_run(run: Facts, runs: list[Facts]) -> str:
    """A column's header: what tells a run from the others."""
    if "device" in run:  # of several devices, see devices.py
        where, same = run["device"], [one for one in runs if one["device"] == run["device"]]
        own = [{key: value for key, value in one.items() if key != "device"} for one in same]
        mine = own[next(place for place, one in enumerate(same) if one is run)]
        return f"{where}, {name_run(mine, own)}" if len(own) > 1 else str(where)
    tokens = run["prompt_tokens"]
    several = len({one["target"] for one in runs}) > 1
    if tokens is None or (several and len({one["prompt_tokens"] for one in runs}) == 1):
        return str(run["target"])
    return f"{run['target']}, prompt {tokens}"


def tabulate(document: Facts) -> Table:
    """One column per run; rows that apply to none are left out."""
    runs = document["runs"]
    rows = [[label, *(show(run) for run in runs)] for label, show in ROWS]
    rows = [row for row in rows if set(row[1:]) != {NOTHING}]
    return Table(describe(document), ["", *(name_run(run, runs) for run in runs)], rows)


def describe(document: Facts) -> str:
    """What was measured, where, in one line."""
    machine, first = document["machine"], document["runs"][0]
    count, rounds = first["threads"], first["repeat"]
    providers = {run["target"]: run["provider"] for run in document["runs"]}
    several = len(providers) > 1
    engines = ", ".join(f"{target} on {name}" if several else name for target, name in providers.items())
    if any(run.get("operators") is False for run in document["runs"]):
        engines += ", without compiled operators"
    threads = "the engine's own threads" if count is None else f"{count} thread{'s' if count > 1 else ''}"
    slowed = f"; THROTTLED: {', '.join(document['throttled'])}" if document.get("throttled") else ""
    return (
        f"{document['bundle']} ({first['quant']}, {engines}, expert {first['expert']}, "
        f"{rounds} round{'s' if rounds > 1 else ''}, {threads}; {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load_1min']}{slowed})"
    )


def describe_setting(document: Facts) -> str:
    """Model and machine, as a picture's subtitle says them."""
    machine, first = document["machine"], document["runs"][0]
    threads = f", {first['threads']} thread{'s' if first['threads'] > 1 else ''}" if first["threads"] else ""
    if "names" in machine:  # of several devices
        return f"{document['model']} {first['quant']}, expert {first['expert']}; {', '.join(machine['names'])}{threads}"
    where = machine.get("board") or machine["cpu"]
    return f"{document['model']} {first['quant']}, expert {first['expert']}; {where}, {machine['cores']} cores{threads}"


def write_markdown(table: Table) -> str:
    """A Markdown table under its title."""
    lines = [
        f"**{_escape(table.title)}**",
        "",
        _join(table.headers),
        _join(["---"] + ["---:"] * (len(table.headers) - 1)),
    ]
    return "\n".join([*lines, *map(_join, table.rows)])


def _join(cells: list[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def write_csv(*documents: Facts) -> str:
    """A header of dotted keys and a line per run of every document; rounds are left out, empty cells are null."""
    lines = []
    for document in documents:
        shared = {key: value for key, value in document.items() if key not in {*document["runs"][0], "runs"}}
        lines += [flatten(shared | run) for run in document["runs"]]
    header = list(dict.fromkeys(key for line in lines for key in line if not key.startswith("rounds.")))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def flatten(value: Facts, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values; lists joined by "; "."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            found |= flatten(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = "; ".join(map(str, inner)) if isinstance(inner, list) else inner
    return found


def pick(run: Facts, path: str) -> Any:
    """The value under a dotted key, or None where something on the way is null."""
    value: Any = run
    for key in path.split("."):
        if value is None:
            return None
        value = value.get(key)
    return value


def _number(path: str, text: str) -> Callable[[Facts], str]:
    """A number, and in parentheses the p5..p95 of its rounds."""

    def show(run: Facts) -> str:
        value = pick(run, path)
        if value is None:
            return NOTHING
        spread = run["spread"].get(path)
        around = "" if spread is None else f" ({text.format(spread['p5'])}..{text.format(spread['p95'])})"
        return f"{text.format(value)}{around}"

    return show


def _three(path: str, text: str) -> Callable[[Facts], str]:
    def show(run: Facts) -> str:
        found = pick(run, path)
        return NOTHING if found is None else " / ".join(text.format(found[p]) for p in ("p50", "p95", "p99"))

    return show


def _size(path: str) -> Callable[[Facts], str]:
    def show(run: Facts) -> str:
        value = pick(run, path)
        return NOTHING if value is None else terminal.show_size(value)

    return show


def _ratio(name: str) -> Callable[[Facts], str]:
    def show(run: Facts) -> str:
        found = pick(run, f"baseline.{name}")
        if found is None:
            return NOTHING
        return f"{found['ratio']:.3f} ({found['spread']['p5']:.3f}..{found['spread']['p95']:.3f})"

    return show


def _show_experts(run: Facts) -> str:
    found = pick(run, "memory.experts")
    if found is None or found["1"]["rss_bytes"] is None:
        return NOTHING
    return " / ".join(terminal.show_size(found[count]["rss_bytes"]) for count in ("1", "10", "100"))


def _show_lora(run: Facts) -> str:
    size = pick(run, "expert_bytes.lora")
    return NOTHING if size is None else f"{terminal.show_size(size)} (calculated)"


def _show_stages(run: Facts) -> str:
    sizes = [stage["rss_bytes"] for stage in run["memory"]["stages"].values()]
    return NOTHING if None in sizes else " / ".join(terminal.show_size(size) for size in sizes)


def _show_bandwidth(run: Facts) -> str:
    found = run["bandwidth"]
    if found is None:
        return NOTHING
    read, copied = found["read_bytes_per_s"] / 1e9, found["copy_bytes_per_s"] / 1e9
    return f"{read:.1f} of {copied:.1f} GB/s ({found['fraction']:.0%})"


def _show_cold(run: Facts) -> str:
    if run["load_cold_ms"] is None:
        return "the page cache could not be dropped"
    return COLD(run) + ("" if run["cache_dropped"] else " (unchecked)")


def _show_heat(run: Facts) -> str:
    heat = run["temperature_c"]
    return NOTHING if heat is None else f"{heat['before']:.0f} to {heat['after']:.0f} C"


COLD = _number("load_cold_ms", "{:.0f}")
ROWS: tuple[tuple[str, Callable[[Facts], str]], ...] = (
    ("load, ms", _number("load_ms", "{:.0f}")),
    ("load from storage, ms", _show_cold),
    ("first token, ms", _number("ttft_ms", "{:.1f}")),
    ("prefill, tokens/s", _number("prefill_tokens_per_s", "{:.0f}")),
    ("decode, tokens/s", _number("decode_tokens_per_s", "{:.1f}")),
    ("decode step p50 / p95 / p99, ms", _three("token_ms", "{:.2f}")),
    ("call p50 / p95 / p99, ms", _three("run_ms", "{:.2f}")),
    ("switch p50 / p95 / p99, us", _three("switch_us", "{:.1f}")),
    ("switch to first token p50 / p95 / p99, ms", _three("switch_to_first_token_ms", "{:.1f}")),
    ("decode time / branchless", _ratio("decode")),
    ("first token time / branchless", _ratio("ttft")),
    ("call time / branchless", _ratio("run")),
    ("peak memory", _size("peak_rss_bytes")),
    ("peak memory, net of imports", _size("memory.net_peak_bytes")),
    ("python / imports / opened / prompt / switches", _show_stages),
    ("memory with 1 / 10 / 100 experts", _show_experts),
    ("an expert's file", _size("expert_bytes.file")),
    ("a LoRA of the same rank", _show_lora),
    ("artifact", _size("memory.artifact_bytes")),
    ("bundle", _size("bundle_bytes")),
    ("weights read beside a copy of memory", _show_bandwidth),
    ("prefill, J/token", _number("energy.prefill_joules_per_token", "{:.3g}")),
    ("decode, J/token", _number("energy.decode_joules_per_token", "{:.3g}")),
    ("call, J", _number("energy.joules_per_run", "{:.3g}")),
    ("temperature", _show_heat),
)
