"""Puts docs/performance.json into the marked place of docs/performance.md: python tools/performance_page.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lime_edge.bundle.staging import write_file

PAGE, RESULTS = Path("docs/performance.md"), Path("docs/performance.json")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SHOWN = 12  # rows of a profile


def write_page(results: dict[str, Any]) -> None:
    """Replace what is between the marks."""
    text = PAGE.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    write_file(PAGE, f"{head}{BEGIN}\n{describe(results)}\n{END}{tail}".encode())


def describe(results: dict[str, Any]) -> str:
    """The tables as markdown."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"{results['model']}, experts over q/k/v/o at rank 8, with lime_edge's operators unless the row says *plain "
        "nodes*; "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['arch']}; {versions}. Medians over {results['rounds']} "
        f"rounds of {results['steps']} decode steps after {results['prompt_tokens']} tokens, all variants in turn in "
        "one process; a ratio is the median over the rounds of the ratio to the *branchless* graph of the same kind in "
        "the same round, in brackets its quartiles.",
        "" if results["operators"] else "\n**Measured without lime_edge's operators: they were not built.**\n",
        "| variant | nodes, a call as one | predicted | "
        + " | ".join(f"step, ratio: {run['threads']} thread{'s' * (run['threads'] > 1)}" for run in results["decoding"])
        + " |",
        "|---" * (3 + len(results["decoding"])) + "|",
    ]
    for index, first in enumerate(results["decoding"][0]["rows"]):
        name = first["variant"]
        cells = []
        for run in results["decoding"]:
            row = run["rows"][index]
            low, high = row["quartiles"]
            shown = f"{row['ratio']:.3f} ({low:.2f}-{high:.2f})"
            cells.append(f"{row['decode_ms']:.2f} ms" + ("" if results["bases"][name] == name else f": {shown}"))
        lines.append(f"| {name} | {results['nodes'][name]} | {results['predicted'][name]} | {' | '.join(cells)} |")
    for name, rows in results["profiles"].items():
        total = sum(row["us"] for row in rows)
        threads = results["profile_threads"]
        lines += [
            "",
            f"Profile of a decode step, *{name}*, {threads} thread{'s' * (threads > 1)}: {total:.0f} us in "
            "kernels (the profiler's own cost included).",
            "",
            "| operator | nodes | us | share |",
            "|---|---|---|---|",
        ]
        lines += [f"| {r['op']} | {r['nodes']:.0f} | {r['us']:.0f} | {r['us'] / total:.1%} |" for r in rows[:SHOWN]]
    return "\n".join(lines)


if __name__ == "__main__":
    write_page(json.loads(RESULTS.read_text()))
