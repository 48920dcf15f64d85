"""The benchmark as a page: one HTML file that needs nothing else, its plots beside it as PNGs, and the JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lime_edge.bench.tables import Facts, Table, name_run, pick, tabulate
from lime_edge.bundle.staging import stage_directory, storage_error
from lime_edge.errors import LimeEdgeError, need

PAGE, DATA = "index.html", "bench.json"
BLUE, GREY, RED = "#3566a8", "#9aa4b0", "#c0504d"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; } img { max-width: 100%; } figcaption { color: #555; }
"""


def check_report(path: Path) -> None:
    """Refuse before anything is timed what writing the report would refuse.

    Raises:
        LimeEdgeError: matplotlib is missing, the directory exists, or nothing can be written there.
    """
    _find_figure()
    try:
        if path.exists():
            raise LimeEdgeError(f"{path}: already exists", "choose another name: a report replaces nothing")
        there = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryDirectory(prefix=".lime-edge.", dir=there):
            pass
    except OSError as error:
        raise storage_error(path, error) from None


def write_report(path: Path, document: Facts) -> None:
    """Write the page, a PNG per plot and the JSON into a new directory; it appears whole or not at all.

    Raises:
        LimeEdgeError: matplotlib is missing, the directory exists, or nothing can be written.
    """
    plots = {name: _render(draw, document["runs"]) for name, (_, draw) in PLOTS.items()}
    drawn = {name: png for name, png in plots.items() if png is not None}
    with stage_directory(path) as stage:
        for name, png in drawn.items():
            (stage / f"{name}.png").write_bytes(png)
        (stage / DATA).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (stage / PAGE).write_text(write_page(document, drawn), encoding="utf-8")


def write_page(document: Facts, plots: dict[str, bytes]) -> str:
    """The HTML: the table, every plot inside the file, the machine.

    Args:
        plots: name -> PNG.
    """
    figures = [
        f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(PLOTS[name][0])}</figcaption></figure>"
        for name, png in plots.items()
    ]
    machine = Table(
        "Machine",
        ["", "value"],
        [
            [key, "-" if value is None else ", ".join(value) if isinstance(value, list) else str(value)]
            for key, value in document["machine"].items()
        ],
    )
    title = f"{document['model']}: lime-edge bench"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(document['created'])}, lime-edge {html.escape(document['lime_edge'])}. In parentheses: "
        "5th to 95th percentile of the rounds.</p>",
        _write_table(tabulate(document)),
        *figures,
        _write_table(machine),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _write_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.headers)
    rows = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows]
    return f"<p>{html.escape(table.title)}</p>\n<table><tr>{head}</tr>\n" + "\n".join(rows) + "\n</table>"


def _find_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise need("matplotlib", "report") from None
    return Figure


def _render(draw: Callable[[Any, list[Facts]], bool], runs: list[Facts]) -> bytes | None:
    """A PNG, or None where there is nothing to draw."""
    figure = _find_figure()(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    if not draw(axes, runs):
        return None
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _names(runs: list[Facts]) -> list[str]:
    return [name_run(run, runs) for run in runs]


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], spreads: Sequence[Any], unit: str) -> None:
    """Horizontal bars with p5..p95 whiskers."""
    places = range(len(names))
    axes.barh(places, values, color=BLUE, height=0.6)
    for place, value, spread in zip(places, values, spreads, strict=True):
        if spread is not None:
            below, above = max(0.0, value - spread["p5"]), max(0.0, spread["p95"] - value)
            axes.errorbar(value, place, xerr=[[below], [above]], color="black", capsize=4)
        axes.annotate(f" {value:.4g}", (value, place), va="bottom", xytext=(4, 6), textcoords="offset points")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.margins(x=0.15)


def _from_zero(axes: Any) -> tuple[float, float]:
    return 0.0, axes.get_ylim()[1] * 1.1


def _draw_metric(metric: str, unit: str) -> Callable[[Any, list[Facts]], bool]:
    def draw(axes: Any, runs: list[Facts]) -> bool:
        kept = [run for run in runs if run[metric] is not None]
        _bars(
            axes,
            [name_run(run, runs) for run in kept],
            [run[metric] for run in kept],
            [run["spread"][metric] for run in kept],
            unit,
        )
        return bool(kept)

    return draw


def _draw_percentiles(metric: str, unit: str) -> Callable[[Any, list[Facts]], bool]:
    def draw(axes: Any, runs: list[Facts]) -> bool:
        kept = [run for run in runs if run[metric] is not None]
        for place, run in enumerate(kept):
            for shift, (key, colour) in enumerate((("p50", BLUE), ("p95", GREY), ("p99", RED))):
                value = run[metric][key]
                height = place + (shift - 1) * 0.25
                axes.barh(height, value, height=0.22, color=colour, label=None if place else key)
                axes.annotate(f" {value:.3g}", (value, height), va="center", fontsize=8)
        axes.set_yticks(range(len(kept)), [name_run(run, runs) for run in kept])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.1)
        if kept:
            axes.legend(loc="upper right")
        return bool(kept)

    return draw


def _draw_rounds(axes: Any, runs: list[Facts]) -> bool:
    """Every round's median: drift and disturbance show here."""
    drawn = False
    for run, name in zip(runs, _names(runs), strict=True):
        for key in ("decode_ms", "run_ms"):
            if values := run["rounds"][key]:
                axes.plot(range(1, len(values) + 1), values, marker="o", label=name)
                drawn = True
            if base := run["rounds"][f"baseline_{key}"]:
                axes.plot(range(1, len(base) + 1), base, marker=".", linestyle="--", label=f"{name}, branchless")
    axes.set(xlabel="round", ylabel="ms", ylim=_from_zero(axes))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if drawn:
        axes.legend()
    return drawn


def _draw_overhead(axes: Any, runs: list[Facts]) -> bool:
    names, found = [], []
    for run, name in zip(runs, _names(runs), strict=True):
        for key, what in (("decode", "decode"), ("ttft", "first token"), ("run", "call")):
            if ratio := pick(run, f"baseline.{key}"):
                names.append(f"{name}: {what}")
                found.append(ratio)
    _bars(axes, names, [one["ratio"] for one in found], [one["spread"] for one in found], "time / time of branchless")
    axes.axvline(1.0, color=RED, linewidth=1)
    return bool(found)


def _draw_stages(axes: Any, runs: list[Facts]) -> bool:
    drawn = False
    for run, name in zip(runs, _names(runs), strict=True):
        stages = run["memory"]["stages"]
        if all(stage["rss_bytes"] is not None for stage in stages.values()):
            (line,) = axes.plot(list(stages), [s["rss_bytes"] / 1e6 for s in stages.values()], marker="o", label=name)
            axes.plot(
                list(stages),
                [s["peak_bytes"] / 1e6 for s in stages.values()],
                linestyle=":",
                color=line.get_color(),
                label=f"{name}, peak so far",
            )
            drawn = True
    axes.set(ylabel="MB", ylim=_from_zero(axes))
    if drawn:
        axes.legend(fontsize=8)
    return drawn


def _draw_experts(axes: Any, runs: list[Facts]) -> bool:
    drawn = False
    for run, name in zip(runs, _names(runs), strict=True):
        found = run["memory"]["experts"]
        if found and found["1"]["rss_bytes"] is not None:
            sizes = [found[count]["rss_bytes"] / 1e6 for count in found]
            axes.plot(list(found), sizes, marker="o", label=name)
            drawn = True
    axes.set(xlabel="experts installed", ylabel="resident MB", ylim=_from_zero(axes))
    if drawn:
        axes.legend()
    return drawn


PLOTS: dict[str, tuple[str, Callable[[Any, list[Facts]], bool]]] = {
    "decode": (
        "Decoding, tokens per second: median of the rounds, 5th to 95th percentile.",
        _draw_metric("decode_tokens_per_s", "tokens/s"),
    ),
    "prefill": ("Reading the prompt, tokens per second.", _draw_metric("prefill_tokens_per_s", "tokens/s")),
    "first_token": ("Time to the first token.", _draw_metric("ttft_ms", "ms")),
    "token_latency": ("Every decode step of every round.", _draw_percentiles("token_ms", "ms per token")),
    "call_latency": ("Every call.", _draw_percentiles("run_ms", "ms per call")),
    "rounds": ("The median of each round: drift and disturbance show here.", _draw_rounds),
    "overhead": ("What the expert costs beside the branchless bundle: the ratio inside a round.", _draw_overhead),
    "switch": ("Switching the expert, the bare swap.", _draw_percentiles("switch_us", "us")),
    "switch_to_first_token": (
        "Switching the expert, up to the first token under it.",
        _draw_percentiles("switch_to_first_token_ms", "ms"),
    ),
    "memory": ("Resident memory by stage, in a fresh process.", _draw_stages),
    "experts": ("Resident memory by number of experts, in a fresh process.", _draw_experts),
    "load": ("Loading, files in the page cache.", _draw_metric("load_ms", "ms")),
}
