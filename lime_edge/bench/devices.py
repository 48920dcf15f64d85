"""A document of several devices: a row each, their plots in one page, and one fleet beside another."""

from __future__ import annotations

from typing import Any

from lime_edge import terminal
from lime_edge.bench.tables import NOTHING, Facts, Table, name_run, pick


def is_fleet(document: Facts) -> bool:
    """Whether a document is one of several devices."""
    return isinstance(document.get("devices"), list)


def list_documents(document: Facts) -> dict[str, Facts]:
    """Device -> its document, of those that have one; a document of one machine has no device's name."""
    if not is_fleet(document):
        return {"": document}
    entries = [entry for entry in document["devices"] if isinstance(entry, dict) and entry.get("document") is not None]
    return {str(entry.get("name")): entry["document"] for entry in entries}


def join_devices(fleet: Facts) -> Facts | None:
    """One document with the runs of all devices, their names with them, for tables and plots; None where all failed."""
    documents = list_documents(fleet)
    if not documents:
        return None
    first = next(iter(documents.values()))
    runs = [run | {"device": mark_device(name, facts)} for name, facts in documents.items() for run in facts["runs"]]
    return first | {"runs": runs, "machine": {"names": list(documents)}}


def mark_device(name: str, facts: Facts) -> str:
    """A device's name, and that it was throttled where it was."""
    return f"{name} (throttled)" if facts.get("throttled") else name


def tabulate_devices(fleet: Facts) -> Table:
    """A row per device and run, and one for each device that failed."""
    rows = []
    for entry in fleet["devices"]:
        facts = entry["document"]
        if facts is None:
            problem = (entry["error"] or {}).get("problem", "nothing came back")
            rows.append([entry["name"], f"failed: {problem.splitlines()[0]}", *[NOTHING] * (len(COLUMNS) - 1)])
            continue
        for run in facts["runs"]:
            rows.append([entry["name"], name_run(run, facts["runs"]), *(show(run, facts) for _, show in COLUMNS[1:])])
    keep = [place for place in range(len(COLUMNS) + 1) if place < 2 or any(row[place] != NOTHING for row in rows)]
    headers = ["device", *(header for header, _ in COLUMNS)]
    return Table(title_fleet(fleet), [headers[i] for i in keep], [[row[i] for i in keep] for row in rows])


def title_fleet(fleet: Facts) -> str:
    """What was measured, in one line."""
    documents = list_documents(fleet)
    if not documents:
        return f"{len(fleet['devices'])} devices, none measured"
    first = next(iter(documents.values()))
    return (
        f"{first['bundle']} ({first['quant']}, expert {first['expert']}, {first['repeat']} rounds), "
        f"{len(documents)} of {len(fleet['devices'])} devices"
    )


def tabulate_machines(fleet: Facts) -> Table:
    """The devices' machines beside each other."""
    documents = list_documents(fleet)
    keys = dict.fromkeys(key for facts in documents.values() for key in facts["machine"])
    rows = [[key, *(_show_fact(facts["machine"].get(key)) for facts in documents.values())] for key in keys]
    slowed = [_show_throttled({}, facts) for facts in documents.values()]
    return Table("Machines", ["", *documents], [*rows, ["throttled", *slowed]])


def _show_fact(value: Any) -> str:
    return NOTHING if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _show(path: str, text: str) -> Any:
    def show(run: Facts, _: Facts) -> str:
        value = pick(run, path)
        return NOTHING if value is None else text.format(value)

    return show


def _show_bytes(run: Facts, _: Facts) -> str:
    return NOTHING if run["peak_rss_bytes"] is None else terminal.show_size(run["peak_rss_bytes"])


def _show_heat(run: Facts, _: Facts) -> str:
    heat = run["temperature_c"]
    return NOTHING if heat is None else f"{heat['before']:.0f} to {heat['after']:.0f} C"


def _show_throttled(_: Facts, facts: Facts) -> str:
    slowed = facts.get("throttled")
    return NOTHING if slowed is None else ", ".join(slowed) or "no"


COLUMNS: tuple[tuple[str, Any], ...] = (
    ("run", None),
    ("first token, ms", _show("ttft_ms", "{:.1f}")),
    ("prefill, tokens/s", _show("prefill_tokens_per_s", "{:.0f}")),
    ("decode, tokens/s", _show("decode_tokens_per_s", "{:.1f}")),
    ("call p50, ms", _show("run_ms.p50", "{:.2f}")),
    ("switch p50, us", _show("switch_us.p50", "{:.1f}")),
    ("peak memory", _show_bytes),
    ("decode, J/token", _show("energy.decode_joules_per_token", "{:.3g}")),
    ("temperature", _show_heat),
    ("throttled", _show_throttled),
)
