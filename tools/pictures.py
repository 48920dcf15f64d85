"""The drawings of the documentation: the fold in one picture, and what many skills take, from what was measured.

`make pictures` writes docs/pictures/*.svg and the tables of docs/comparison.md. Both are the same at every run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURES, COMPARISON = ROOT / "docs" / "pictures", ROOT / "docs" / "comparison.md"
MEASURED = ROOT / "docs" / "benchmarks-2-cores.json"
METHODS = {
    "lime": "LiME experts, rank 8",
    "lora": "LoRA, rank 64",
    "copies": "merged copies",
    "prompt": "prompt tuning, 20 tokens",
}
GREEN, BLUE, GREY, PAPER, INK = "#2f7d4f", "#3566a8", "#e7eaee", "#ffffff", "#222222"


# the fold


@dataclass(frozen=True)
class Box:
    """A rounded box with lines of text in its middle; the first line is bold."""

    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...]
    fill: str = GREY
    ink: str = INK

    def draw(self) -> str:
        """As SVG."""
        middle, step = self.x + self.width / 2, 17
        top = self.y + self.height / 2 - step * (len(self.lines) - 1) / 2 + 5
        texts = "".join(
            f'<text x="{middle:g}" y="{top + step * place:g}" text-anchor="middle" fill="{self.ink}" '
            f'font-weight="{"normal" if place else "bold"}">{_mark(line)}</text>'
            for place, line in enumerate(self.lines)
        )
        return (
            f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="8" '
            f'fill="{self.fill}" stroke="#8891a0"/>{texts}'
        )


def _mark(text: str) -> str:
    """p_ref with a lowered index."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"_(\w+)", r'<tspan dy="4" font-size="11">\1</tspan><tspan dy="-4">&#8203;</tspan>', text)


def _arrow(*points: tuple[float, float]) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>'


def _text(x: float, y: float, text: str, size: int = 14, **more: str) -> str:
    given = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{given}>{_mark(text)}</text>'


def draw_fold() -> str:
    """Above, what was trained; below, what runs on the device: the same sum, cut at another place."""
    boxes = [
        Box(135, 62, 185, 48, ("W", "frozen, 16 bits")),
        Box(135, 132, 185, 48, ("s B A", "shared, rank 8"), BLUE, PAPER),
        Box(360, 132, 130, 48, ("p of an expert", "one per skill"), GREEN, PAPER),
        Box(135, 290, 185, 62, ("W' = W + p_ref s B A", "int4, quantized once")),
        Box(135, 374, 185, 48, ("s B A", "float16"), BLUE, PAPER),
        Box(360, 374, 130, 48, ("d = p - p_ref", "an input"), GREEN, PAPER),
    ]
    parts = [
        _text(20, 32, "Trained", 18, font_weight="bold"),
        _text(290, 32, "y = W x + p * (s B A x)", 15),
        _text(20, 262, "On the device", 18, font_weight="bold"),
        _text(290, 262, "y = W' x + d * (s B A x)", 15),
        _text(490, 262, "the same y, for every p", 13, fill="#555555"),
        *(box.draw() for box in boxes),
        *(_draw_sum(top, low) for top, low in ((86, 156), (321, 398))),
        _arrow((225, 182), (225, 286)),
        _text(234, 212, "the mean of all skills, p_ref,", 13, fill="#555555"),
        _text(234, 229, "goes into the weights", 13, fill="#555555"),
    ]
    skills = ("plural", "past", "negate", "month", "...")
    for place, skill in enumerate(skills):
        x = 220 + 84 * place
        parts.append(Box(x, 470, 74, 32, (skill,), GREEN, PAPER).draw())
    parts.append(_arrow((425, 470), (425, 426)))
    parts.append(_text(20, 484, "skills on the disk", 14, font_weight="bold"))
    parts.append(_text(20, 502, "92 kB each", 14))
    parts.append(_text(434, 448, "switching: bind another one, microseconds", 13, fill="#555555"))
    head = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 520" role="img" font-size="14"',
        ' font-family="system-ui, sans-serif">',
        "<title>The fold: a shared adapter and the mean of all skills go into the quantized weights; what differs is",
        "an input</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="720" height="520" fill="{PAPER}"/>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _draw_sum(top: float, low: float) -> str:
    """x into both rows, the lower one times its vector, both added to y."""
    return "".join(
        [
            _text(46, (top + low) / 2 + 5, "x", 18, font_style="italic"),
            _arrow((62, (top + low) / 2), (100, (top + low) / 2), (100, top), (131, top)),
            _arrow((100, (top + low) / 2), (100, low), (131, low)),
            _arrow((322, top), (560, top), (560, (top + low) / 2 - 14)),
            _arrow((322, low), (356, low)),
            _arrow((492, low), (560, low), (560, (top + low) / 2 + 14)),
            f'<circle cx="560" cy="{(top + low) / 2:g}" r="12" fill="{PAPER}" stroke="{INK}" stroke-width="1.5"/>',
            _text(560, (top + low) / 2 + 6, "+", 18, text_anchor="middle"),
            _arrow((573, (top + low) / 2), (622, (top + low) / 2)),
            _text(630, (top + low) / 2 + 5, "y", 18, font_style="italic"),
        ]
    )


# what was measured


def read_scaling(model: str) -> list[dict[str, Any]]:
    """The rows of one model: a method with 1, 10 or 100 skills each."""
    (run,) = [run for run in json.loads(MEASURED.read_text())["scaling"] if run["model"] == model]
    return run["rows"]


def tabulate_scaling(model: str) -> list[str]:
    """Rows of a Markdown table."""
    lines = []
    for method, label in METHODS.items():
        for row in (row for row in read_scaling(model) if row["method"] == method):
            switch = row["switch_us"]["p95"] if "switch_us" in row else None
            first = row.get("switch_to_first_token_ms")
            cells = [
                label,
                str(row["experts"]),
                f"{row['bytes'] / 1e6:,.0f} MB",
                f"{row['rss_bytes'] / 1e6:,.0f} MB",
                f"{row['load_ms']:,.0f} ms",
                "-" if switch is None else f"{switch:.1f} us" if switch < 1000 else f"{switch / 1e3:,.0f} ms",
                "-" if first is None else f"{first:.0f} ms",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_tables(page: str) -> str:
    """The comparison's page with its tables as they were measured: below each `<!-- table: MODEL -->`."""

    def replace(found: re.Match[str]) -> str:
        return f"{found[1]}{found[3]}" + "\n".join(tabulate_scaling(found[2])) + "\n"

    return re.sub(r"(<!-- table: (\w+) -->\n\n)((?:\|[^\n]*\n){2})((?:\|[^\n]*\n)*)", replace, page)


def draw_skills(file: Path) -> None:
    """Two panels, both axes logarithmic: bytes on disk, and memory, by the number of skills."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "lime_edge", "svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif"}
    with rc_context(style):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        for axes, key, title in zip(
            figure.subplots(1, 2), ("bytes", "rss_bytes"), ("on disk", "in memory"), strict=True
        ):
            _draw_panel(axes, key, title)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle("SmolLM2-135M int4 with 1, 10 and 100 skills (2 cores, ONNX Runtime)", fontweight="bold")
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor=PAPER)


def _draw_panel(axes: Any, key: str, title: str) -> None:
    styles: Sequence[tuple[str, str, str, float]] = (
        (GREEN, "o", "-", 4.0),
        (BLUE, "s", "--", 2.5),
        ("#8a5ba6", "^", ":", 2.5),
        ("#d98032", "D", "-.", 1.5),
    )
    for (method, label), (colour, marker, dash, width) in zip(METHODS.items(), styles, strict=True):
        rows = [row for row in read_scaling("smollm2") if row["method"] == method]
        counts, sizes = [row["experts"] for row in rows], [row[key] / 1e6 for row in rows]
        axes.plot(counts, sizes, color=colour, marker=marker, linestyle=dash, linewidth=width, label=label, alpha=0.9)
        if method != "prompt":
            axes.annotate(
                f"{sizes[-1]:,.0f}",
                (counts[-1], sizes[-1]),
                ha="right",
                textcoords="offset points",
                xytext=(2, -16 if (method, key) == ("copies", "rss_bytes") else 8),
            )
    axes.set(xscale="log", yscale="log", xlabel="skills", ylabel=f"MB {title}")
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes.set_yticks([100, 1000, 10000], ["100", "1,000", "10,000"])
    axes.set_ylim(60, 16000)
    axes.tick_params(axis="y", which="minor", labelleft=False)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write them all."""
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "fold.svg").write_text(draw_fold(), encoding="utf-8")
    draw_skills(PICTURES / "skills.svg")
    COMPARISON.write_text(write_tables(COMPARISON.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
