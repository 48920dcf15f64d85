"""The benchmark as a page: one HTML file that needs nothing else, its plots beside it as PNGs, and the JSON."""

from __future__ import annotations

import base64
import html
import json
import tempfile
from pathlib import Path

from lime_edge.bench.devices import is_fleet, join_devices, tabulate_devices, tabulate_machines, title_fleet
from lime_edge.bench.plots import PLOTS, find_figure, render
from lime_edge.bench.tables import Facts, Table, describe_setting, tabulate
from lime_edge.bundle.staging import stage_directory, storage_error
from lime_edge.errors import LimeEdgeError

PAGE, DATA = "index.html", "bench.json"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(25rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } img { width: 100%; max-width: 50rem; } figcaption { color: #555; }
@media (max-width: 27rem) { .plots { display: block; } figure { margin: 1.5rem 0; } }
.wide { overflow-x: auto; }
"""


def check_report(path: Path) -> None:
    """Refuse before anything is timed what writing the report would refuse.

    Raises:
        LimeEdgeError: matplotlib is missing, the directory exists, or nothing can be written there.
    """
    find_figure()
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
    drawing = join_devices(document) if is_fleet(document) else document
    plots = {name: render(plot, drawing) if drawing else None for name, plot in PLOTS.items()}
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
        f"<figcaption>{html.escape(PLOTS[name].caption)}</figcaption></figure>"
        for name, png in plots.items()
    ]
    if is_fleet(document):
        title, setting = "lime-edge bench on several devices", title_fleet(document)
        tables = tabulate_devices(document), tabulate_machines(document)
    else:
        title, setting = f"{document['model']}: lime-edge bench", describe_setting(document)
        tables = tabulate(document), _tabulate_machine(document)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title>",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(setting)}</p>",
        f"<p>{html.escape(document['created'])}, lime-edge {html.escape(document['lime_edge'])}. In parentheses: "
        "5th to 95th percentile of the rounds.</p>",
        _write_table(tables[0]),
        '<div class="plots">',
        *figures,
        "</div>",
        _write_table(tables[1]),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _tabulate_machine(document: Facts) -> Table:
    return Table(
        "Machine",
        ["", "value"],
        [
            [key, "-" if value is None else ", ".join(value) if isinstance(value, list) else str(value)]
            for key, value in document["machine"].items()
        ],
    )


def _write_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.headers)
    rows = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows]
    return (
        f'<p>{html.escape(table.title)}</p>\n<div class="wide"><table><tr>{head}</tr>\n'
        + "\n".join(rows)
        + "\n</table></div>"
    )
