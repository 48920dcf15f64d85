"""The benchmark's pictures: small ones that are still read at 400 pixels, each with its title, model and machine."""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lime_edge.bench.tables import Facts, describe_setting, name_run, pick
from lime_edge.errors import need

WIDTH, HEIGHT, DPI = 5.0, 3.3, 160  # inches: 800 pixels wide; shown at 400, letters of 10 points are 11 pixels high
COLOURS = ("#3566a8", "#d98032", "#4f9153", "#8a5ba6", "#b5493b", "#6b6b6b")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (1, 1)), (0, (4, 1)))
GREY, RED = "#9aa4b0", "#c0504d"
STYLE = {"font.size": 10, "axes.titlesize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 9}
LORA = "LoRA of the same rank (calculated)"


@dataclass(frozen=True)
class Plot:
    """One picture: its title, the sentence under it on the page, what draws it (False: there is nothing to draw)."""

    title: str
    caption: str
    draw: Callable[[Any, list[Facts]], bool]


def find_figure() -> Any:
    """matplotlib's Figure.

    Raises:
        LimeEdgeError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise need("matplotlib", "report") from None
    return Figure


def render(plot: Plot, document: Facts) -> bytes | None:
    """A PNG, or None where there is nothing to draw."""
    figure_class = find_figure()
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = figure_class(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        if not plot.draw(axes, document["runs"]):
            return None
        figure.suptitle(plot.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        setting = "\n".join(textwrap.fill(part, 64) for part in describe_setting(document).split("; "))
        axes.set_title(setting, loc="left", x=0, fontsize=9, color="#444444", wrap=True)
        _align_title(figure, axes)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi="figure")
    return data.getvalue()


def _align_title(figure: Any, axes: Any) -> None:
    """Put the subtitle at the figure's left edge, not at the axes', which begins behind the names."""
    figure.draw_without_rendering()
    axes.set_title(
        axes.get_title(loc="left"),
        loc="left",
        x=-axes.get_position().x0 / axes.get_position().width + 0.015,
        fontsize=9,
        color="#444444",
    )


def _names(runs: list[Facts]) -> list[str]:
    return [name_run(run, runs).replace(", ", ",\n") for run in runs]


def _bars(axes: Any, rows: Sequence[tuple[str, float, Any, float | None]], unit: str) -> None:
    """Horizontal bars with p5..p95 whiskers; a grey one under each that has a baseline.

    Args:
        rows: name, value, spread or None, baseline's value or None.
    """
    based = any(base is not None for *_, base in rows)
    height = 0.36 if based else 0.6
    for place, (_, value, spread, base) in enumerate(rows):
        middle = place - (height / 2 if based else 0)
        axes.barh(middle, value, color=COLOURS[0], height=height, label=None if place else "with the expert")
        if spread is not None:
            below, above = max(0.0, value - spread["p5"]), max(0.0, spread["p95"] - value)
            axes.errorbar(value, middle, xerr=[[below], [above]], color="black", capsize=3, linewidth=1)
        axes.annotate(
            f"{value:.4g}", (0, middle), va="center", color="white", xytext=(4, 0), textcoords="offset points"
        )
        if base is not None:
            axes.barh(place + height / 2, base, color=GREY, height=height, label=None if place else "branchless")
            axes.annotate(
                f"{base:.4g}", (0, place + height / 2), va="center", xytext=(4, 0), textcoords="offset points"
            )
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(unit)
    _grow(axes, 0.5 * (len(rows) - 3))
    if based:
        _legend(axes)


def _legend(axes: Any) -> None:
    """Below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(
        handles, labels, loc="outside lower left", ncols=1 if max(map(len, labels)) > 22 else 3, frameon=False
    )


def _grow(axes: Any, inches: float) -> None:
    """Make the picture higher, for what does not fit the usual height."""
    axes.figure.set_size_inches(WIDTH, HEIGHT + max(0.0, inches))


def _lines(axes: Any, lines: Sequence[tuple[str, Sequence[Any], Sequence[float]]]) -> bool:
    """Lines that are told apart where they coincide: the lower ones are wider, the upper ones dashed.

    Args:
        lines: label, x, y of each.
    """
    for place, (label, x, y) in enumerate(lines):
        turn = place % len(COLOURS)
        axes.plot(
            x,
            y,
            label=label,
            color=COLOURS[turn],
            linestyle=DASHES[turn],
            linewidth=max(1.2, 4.5 - 1.3 * place),
            marker=MARKERS[turn],
            markersize=max(4.0, 10.0 - 2 * place),
            alpha=0.9,
        )
    if lines:
        _grow(axes, 0.16 * (len(lines) - 2))
        _legend(axes)
    return bool(lines)


def _from_zero(axes: Any) -> None:
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)


def _baseline(run: Facts, metric: str) -> float | None:
    """The branchless bundle's value of a metric, from its rounds."""
    key = {"decode_tokens_per_s": "baseline_decode_ms", "run_ms": "baseline_run_ms"}.get(metric, "baseline_ttft_ms")
    values = run["rounds"].get(key) or ()
    if not values or metric == "load_ms":
        return None
    median = statistics.median(values)
    if metric == "decode_tokens_per_s":
        return 1e3 / median
    return run["prompt_tokens"] * 1e3 / median if metric == "prefill_tokens_per_s" else median


def _draw_metric(metric: str, unit: str) -> Callable[[Any, list[Facts]], bool]:
    def draw(axes: Any, runs: list[Facts]) -> bool:
        rows = [
            (name, run[metric], run["spread"][metric], _baseline(run, metric))
            for run, name in zip(runs, _names(runs), strict=True)
            if run[metric] is not None
        ]
        if rows:
            _bars(axes, rows, unit)
        return bool(rows)

    return draw


def _draw_percentiles(metric: str, unit: str) -> Callable[[Any, list[Facts]], bool]:
    def draw(axes: Any, runs: list[Facts]) -> bool:
        kept = [(run, name) for run, name in zip(runs, _names(runs), strict=True) if run[metric] is not None]
        for place, (run, _) in enumerate(kept):
            for shift, (key, colour) in enumerate((("p50", COLOURS[0]), ("p95", GREY), ("p99", RED))):
                value, height = run[metric][key], place + (shift - 1) * 0.27
                axes.barh(height, value, height=0.25, color=colour, label=None if place else key)
                axes.annotate(f" {value:.3g}", (value, height), va="center", fontsize=9)
        axes.set_yticks(range(len(kept)), [name for _, name in kept])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.15)
        _grow(axes, 0.7 * (len(kept) - 2))
        if kept:
            _legend(axes)
        return bool(kept)

    return draw


def _draw_energy(axes: Any, runs: list[Facts]) -> bool:
    """Joules per token of an answer, or per call."""
    rows = []
    for run, name in zip(runs, _names(runs), strict=True):
        value = pick(run, "energy.decode_joules_per_token") or pick(run, "energy.joules_per_run")
        if value is not None:
            rows.append((name, value, None, None))
    if rows:
        _bars(axes, rows, "J")
    return bool(rows)


def _draw_peak(axes: Any, runs: list[Facts]) -> bool:
    """The largest resident set; beside another machine's only."""
    kept = [(run, name) for run, name in zip(runs, _names(runs), strict=True) if run["peak_rss_bytes"] is not None]
    if len({run.get("device") for run, _ in kept}) < 2:
        return False
    _bars(axes, [(name, run["peak_rss_bytes"] / 1e6, None, None) for run, name in kept], "MB")
    return True


def _draw_rounds(axes: Any, runs: list[Facts]) -> bool:
    """Every round's median: drift and disturbance show here."""
    lines = []
    for run in runs:
        name = name_run(run, runs)
        for key in ("decode_ms", "run_ms"):
            for label, values in (
                (name, run["rounds"][key]),
                (f"{name}, branchless", run["rounds"][f"baseline_{key}"]),
            ):
                if values:
                    lines.append((label, range(1, len(values) + 1), values))
    drawn = _lines(axes, lines)
    axes.set(xlabel="round", ylabel="ms")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _from_zero(axes)
    return drawn


def _draw_overhead(axes: Any, runs: list[Facts]) -> bool:
    """Bars that begin at 1, the branchless bundle."""
    rows = []
    for run, name in zip(runs, _names(runs), strict=True):
        for key, what in (("decode", "decode"), ("ttft", "first token"), ("run", "call")):
            if ratio := pick(run, f"baseline.{key}"):
                where = name.replace("\n", " ")
                rows.append((f"{where}\n{what}" if len(runs) > 1 else what, ratio["ratio"], ratio["spread"]))
    for place, (_, ratio, spread) in enumerate(rows):
        axes.barh(place, ratio - 1, left=1, color=COLOURS[0], height=0.6)
        below, above = max(0.0, ratio - spread["p5"]), max(0.0, spread["p95"] - ratio)
        axes.errorbar(ratio, place, xerr=[[below], [above]], color="black", capsize=3, linewidth=1)
        end = max(ratio, spread["p95"])
        axes.annotate(f"{ratio:.3f}", (end, place), va="center", xytext=(5, 0), textcoords="offset points")
    axes.axvline(1.0, color=RED, linewidth=1.5)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("time / time without a branch (red: 1)")
    axes.margins(x=0.2)
    _grow(axes, 0.5 * (len(rows) - 4))
    return bool(rows)


def _draw_stages(axes: Any, runs: list[Facts]) -> bool:
    """Bars side by side, so that equal ones do not hide each other; a mark for the peak so far."""
    kept = [run for run in runs if all(stage["rss_bytes"] is not None for stage in run["memory"]["stages"].values())]
    width = 0.8 / max(1, len(kept))
    for place, run in enumerate(kept):
        stages = run["memory"]["stages"]
        x = [n - 0.4 + (place + 0.5) * width for n in range(len(stages))]
        colour, label = COLOURS[place % len(COLOURS)], name_run(run, runs)
        axes.bar(x, [s["rss_bytes"] / 1e6 for s in stages.values()], width * 0.92, color=colour, label=label)
        peaks = [stage["peak_bytes"] / 1e6 for stage in stages.values()]
        left, right = ([at + side * width / 2 for at in x] for side in (-0.92, 0.92))
        axes.hlines(peaks, left, right, color="black", linewidth=2, label=None if place else "peak so far")
        axes.set_xticks(range(len(stages)), list(stages))
    axes.set_ylabel("MB")
    if kept:
        _legend(axes)
    return bool(kept)


COUNTS = ("1", "10", "100")


def _draw_skills_bytes(axes: Any, runs: list[Facts]) -> bool:
    """Bytes of a bundle with 1, 10, 100 skills, beside LoRAs of the same rank on the same weights."""
    run = next((one for one in runs if pick(one, "expert_bytes.file") and pick(one, "memory.experts")), None)
    if run is None:
        return False
    base, sizes = run["memory"]["artifact_bytes"], run["expert_bytes"]
    return _draw_skills(axes, base, [("LiME experts", sizes["file"]), (LORA, sizes.get("lora"))], "MB on disk")


def _draw_skills_memory(axes: Any, runs: list[Facts]) -> bool:
    """Measured memory with 1, 10, 100 skills installed, beside LoRAs held in memory."""
    lines = []
    for run in runs:
        found = run["memory"]["experts"]
        if not found or found["1"]["rss_bytes"] is None:
            continue
        values = [found[count]["rss_bytes"] / 1e6 for count in COUNTS]
        name = f"LiME experts, {run['target']}"
        if (name, COUNTS, values) not in lines:  # prompts of several lengths share the measurement
            lines.append((name, COUNTS, values))
        if lora := pick(run, "expert_bytes.lora"):
            least = found["1"]["rss_bytes"]
            beside = (LORA, COUNTS, [(least + int(count) * lora) / 1e6 for count in COUNTS])
    if not lines:
        return False
    if pick(runs[0], "expert_bytes.lora"):
        lines.append(beside)
    _lines(axes, lines)
    axes.set(xlabel="skills installed", ylabel="resident MB")
    _from_zero(axes)
    return True


def _draw_skills(axes: Any, base: int, methods: Sequence[tuple[str, int | None]], unit: str) -> bool:
    lines = [(label, COUNTS, [(base + int(count) * each) / 1e6 for count in COUNTS]) for label, each in methods if each]
    _lines(axes, lines)
    for _, _, values in lines:
        axes.annotate(f"{values[-1]:,.0f}", (2, values[-1]), ha="right", xytext=(0, 7), textcoords="offset points")
    axes.set(xlabel="skills", ylabel=unit)
    axes.margins(y=0.12)
    _from_zero(axes)
    return True


PLOTS: dict[str, Plot] = {
    "decode": Plot(
        "Decoding, tokens per second",
        "Decoding, tokens per second: median of the rounds, 5th to 95th percentile; grey: without a branch.",
        _draw_metric("decode_tokens_per_s", "tokens/s"),
    ),
    "prefill": Plot(
        "Reading the prompt, tokens per second",
        "Reading the prompt, tokens per second.",
        _draw_metric("prefill_tokens_per_s", "tokens/s"),
    ),
    "first_token": Plot("Time to the first token", "Time to the first token.", _draw_metric("ttft_ms", "ms")),
    "token_latency": Plot(
        "A decode step", "Every decode step of every round.", _draw_percentiles("token_ms", "ms per token")
    ),
    "call_latency": Plot("A call", "Every call.", _draw_percentiles("run_ms", "ms per call")),
    "rounds": Plot("Round by round", "The median of each round: drift and disturbance show here.", _draw_rounds),
    "overhead": Plot(
        "What the expert costs",
        "What the expert costs beside the branchless bundle: the ratio inside a round.",
        _draw_overhead,
    ),
    "switch": Plot(
        "Switching the expert", "Switching the expert, the bare swap.", _draw_percentiles("switch_us", "us")
    ),
    "switch_to_first_token": Plot(
        "From a switch to the first token",
        "Switching the expert, up to the first token under it.",
        _draw_percentiles("switch_to_first_token_ms", "ms"),
    ),
    "memory": Plot("Memory by stage", "Resident memory by stage, in a fresh process.", _draw_stages),
    "peak_memory": Plot("Peak memory", "The largest resident set of a fresh process, by device.", _draw_peak),
    "energy": Plot("Energy", "Joules per token of an answer, or per call: what idling takes included.", _draw_energy),
    "skills_bytes": Plot(
        "Many skills on disk",
        "The artifact with 1, 10 and 100 skills; a LoRA of the same rank on the same layers is calculated, in float16.",
        _draw_skills_bytes,
    ),
    "skills_memory": Plot(
        "Many skills in memory",
        "Resident memory with 1, 10 and 100 experts installed, measured in a fresh process; LoRAs are calculated: what "
        "one of float16 takes, once for each, and nothing for the engine's own copies.",
        _draw_skills_memory,
    ),
    "load": Plot("Loading", "Loading, files in the page cache.", _draw_metric("load_ms", "ms")),
}
