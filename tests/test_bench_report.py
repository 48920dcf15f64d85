"""The report: one page that needs nothing else, every plot in it, and nothing half-written."""

from __future__ import annotations

import base64
import copy
import json
import re
import struct
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from test_bench_compare import make_run

from lime_edge.bench import measure as bench
from lime_edge.bench import plots
from lime_edge.bench.lora import size_lora
from lime_edge.bench.plots import PLOTS
from lime_edge.bench.report import DATA, PAGE, check_report, write_report
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.fields import SiteEntry
from lime_edge.cli import app as cli
from lime_edge.errors import LimeEdgeError

PNG = b"\x89PNG\r\n\x1a\n"
ELSEWHERE = {"call_latency", "energy", "peak_memory"}  # of an encoder, of a meter, of several devices (test_remote.py)


def make_document(*runs: dict[str, Any]) -> dict[str, Any]:
    """What `bench_bundle` gives, with every part that is drawn."""
    stage = {"rss_bytes": 50_000_000, "anonymous_bytes": 20_000_000, "peak_bytes": 60_000_000}
    machine = {"cpu": "Cortex-A76 <4 cores>", "cores": 4, "load_1min": 0.1, "packages": ["numpy 2.4", "onnxruntime 1"]}
    filled = []
    for run in runs:
        memory = {
            "net_peak_bytes": 9,
            "artifact_bytes": 7,
            "stages": dict.fromkeys(("python", "opened"), stage),
            "experts": dict.fromkeys(("1", "10", "100"), stage),
        }
        ratio = {"ratio": 1.25, "spread": {"p5": 1.2, "p95": 1.4}}
        added = {
            "memory": memory,
            "baseline": {"bundle": "single.lime", "decode": ratio, "ttft": ratio, "run": None},
            "energy": None,
            "bandwidth": None,
            "temperature_c": None,
            "repeat": 5,
            "cache_dropped": True,
            "switch_to_first_token_ms": {"p50": 30.0, "p95": 31.0, "p99": 32.0},
        }
        filled.append(copy.deepcopy(run | added))
    facts = {
        "schema": 2,
        "lime_edge": "0.1.0",
        "created": "2026-01-01T00:00:00+00:00",
        "bundle": "tiny.lime",
        "model": "tiny & <random>",
        "fingerprint": "f0",
    }
    return {**facts, **filled[0], "machine": machine, "runs": filled}


class Page(HTMLParser):
    """What a browser would load, and the text of the cells."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.images: dict[str, bytes] = {}
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            if given.get(name) is not None:
                self.references.append(given[name] or "")
        if tag == "img":
            kind, _, data = (given["src"] or "").partition(",")
            assert kind == "data:image/png;base64"
            self.images[given["alt"] or ""] = base64.b64decode(data, validate=True)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "out"
    write_report(path, make_document(make_run(), make_run(decode=4.0, prompt_tokens=512)))
    return path


def test_the_page_holds_every_plot(report: Path) -> None:
    page = Page((report / PAGE).read_text())
    assert set(page.images) == set(PLOTS) - ELSEWHERE
    for name, png in page.images.items():
        assert png == (report / f"{name}.png").read_bytes(), name
        assert png.startswith(PNG), name
        width, height = struct.unpack(">II", png[16:24])
        assert width > 600 and height > 200 and len(png) > 5000, name
    files = {f"{name}.png" for name in page.images} | {PAGE, DATA}
    assert {file.name for file in report.iterdir()} == files


def test_the_page_refers_to_nothing(report: Path) -> None:
    text = (report / PAGE).read_text()
    page = Page(text)
    assert len(page.references) == len(page.images) > 0
    assert all(reference.startswith("data:") for reference in page.references)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    bare = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|//|url\(|@import", bare)


def test_the_page_tells_the_numbers(report: Path) -> None:
    text = (report / PAGE).read_text()
    cells = [cell.strip() for cell in Page(text).cells]
    place = cells.index("decode, tokens/s")
    assert cells[place + 1].startswith("200.0 (") and cells[place + 2].startswith("250.0 (")
    assert "1.250 (1.200..1.400)" in cells
    assert "tiny &amp; &lt;random&gt;" in text and "<random>" not in text
    assert json.loads((report / DATA).read_text())["runs"][1]["prompt_tokens"] == 512


def test_a_plot_shows_what_it_is_given(tmp_path: Path) -> None:
    """Other numbers, other pictures; the same numbers, the same picture."""
    for name, decode in (("a", 5.0), ("b", 5.0), ("c", 2.0)):
        write_report(tmp_path / name, make_document(make_run(decode=decode)))
    pictures = {name: (tmp_path / name / "decode.png").read_bytes() for name in "abc"}
    assert pictures["a"] == pictures["b"] != pictures["c"]
    assert (tmp_path / "a" / "first_token.png").read_bytes() == (tmp_path / "c" / "first_token.png").read_bytes()


def test_an_encoder_draws_its_calls(tmp_path: Path) -> None:
    empty: dict[str, Any] = {
        "ttft_ms": None,
        "decode_tokens_per_s": None,
        "prefill_tokens_per_s": None,
        "token_ms": None,
    }
    run = make_run(**empty, prompt_tokens=None, run_ms={"p50": 1.0, "p95": 2.0, "p99": 3.0})
    run["rounds"] = run["rounds"] | {"decode_ms": [], "run_ms": [1.0, 1.1]}
    write_report(tmp_path / "out", make_document(run))
    names = {file.stem for file in (tmp_path / "out").glob("*.png")}
    assert "call_latency" in names and not {"decode", "prefill", "first_token", "token_latency"} & names


def test_nothing_is_replaced_or_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for refuse in (check_report, lambda path: write_report(path, make_document(make_run()))):
        with pytest.raises(LimeEdgeError, match="already exists"):
            refuse(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"

    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lime_edge.bench.report.write_page", fail)
    with pytest.raises(LimeEdgeError) as caught:
        write_report(tmp_path / "out", make_document(make_run()))
    assert caught.value.exit_code == 5
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_what_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(bench, "bench_bundle", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr("sys.argv", ["lime-edge", "bench", "any.lime", "--report", str(tmp_path / "file" / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 5 and "cannot write" in capsys.readouterr().err
    check_report(tmp_path / "new" / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_without_matplotlib_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(bench, "bench_bundle", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr("sys.argv", ["lime-edge", "bench", "any.lime", "--report", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 4 and "pip install 'lime-edge[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# the pictures


def draw(name: str, document: dict[str, Any]) -> Any:
    """The figure of one plot, before it becomes pixels."""
    from matplotlib.figure import Figure

    kept: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            kept.append(self)

    patch = pytest.MonkeyPatch()
    patch.setattr(plots, "find_figure", lambda: Kept)
    try:
        assert plots.render(PLOTS[name], document)
    finally:
        patch.undo()
    return kept[0]


@pytest.mark.parametrize("name", sorted(set(PLOTS) - ELSEWHERE))
def test_every_picture_names_model_and_machine_and_is_read_at_400_pixels(name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    document = make_document(make_run(), make_run(decode=4.0, prompt_tokens=512))
    figure = draw(name, document)
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    said = " ".join(text.get_text() for text in texts)
    for word in (PLOTS[name].title, "tiny & <random> int4", "expert movie", "Cortex-A76 <4 cores>", "2 threads"):
        assert word in " ".join(said.split()), f"{name}: {word!r} is nowhere in {said!r}"
    for text in texts:
        pixels = text.get_fontsize() / 72 * 400 / figure.get_size_inches()[0]
        assert pixels >= 9.9, f"{name}: {text.get_text()!r} is {pixels:.1f} pixels high"
    width, height = figure.get_size_inches()
    drawn = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    assert drawn.x0 > -0.02 and drawn.y0 > -0.02 and drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02, "cut off"


def test_lines_that_coincide_are_told_apart() -> None:
    """Two runs with the same numbers: both lines show, the lower one is wider, in other dashes and markers."""
    figure = draw("rounds", make_document(make_run(), make_run(prompt_tokens=512)))
    lower, upper = figure.axes[0].get_lines()
    assert list(lower.get_ydata()) == list(upper.get_ydata())
    assert lower.get_linewidth() >= upper.get_linewidth() + 1 and lower.get_markersize() > upper.get_markersize()
    assert lower.get_color() != upper.get_color() and lower.get_marker() != upper.get_marker()
    assert lower.get_linestyle() != upper.get_linestyle()


def test_bars_stand_beside_their_baseline() -> None:
    run = make_run(decode=5.0, ttft=100.0)
    run["rounds"]["baseline_decode_ms"], run["rounds"]["baseline_ttft_ms"] = [4.0] * 5, [80.0] * 5
    for name, values in (("decode", (200.0, 250.0)), ("first_token", (100.0, 80.0)), ("prefill", (1280.0, 1600.0))):
        widths = [bar.get_width() for bar in draw(name, make_document(run)).axes[0].patches]
        assert widths == pytest.approx(values), name
    ratios = draw("overhead", make_document(run)).axes[0].patches
    assert [bar.get_x() for bar in ratios] == [1.0, 1.0] and ratios[0].get_width() == pytest.approx(0.25)


def test_many_skills_stand_beside_loras() -> None:
    run = make_run(expert_bytes={"file": 1_000, "lora": 50_000})
    document = make_document(run)
    for line in document["runs"]:
        line["memory"]["artifact_bytes"] = 2_000_000
    disk = {line.get_label(): list(line.get_ydata()) for line in draw("skills_bytes", document).axes[0].get_lines()}
    assert disk["LiME experts"] == pytest.approx([2.001, 2.01, 2.1])
    assert disk["LoRA of the same rank (calculated)"] == pytest.approx([2.05, 2.5, 7.0])
    memory = {line.get_label(): list(line.get_ydata()) for line in draw("skills_memory", document).axes[0].get_lines()}
    assert memory["LiME experts, onnx"] == pytest.approx([50.0] * 3)
    assert memory["LoRA of the same rank (calculated)"] == pytest.approx([50.05, 50.5, 55.0])


def test_the_bytes_of_a_lora_are_those_of_its_tensors(
    tiny_bundle: Callable[..., Path], tiny_adapter: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    from safetensors.numpy import load_file

    for targets in (
        ("q_proj", "v_proj"),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ):
        adapter = tiny_adapter(None, targets=targets)
        manifest = Bundle.open(tiny_bundle(tiny_model(), adapter)).manifest
        tensors = load_file(adapter / "adapter_model.safetensors")
        numbers = sum(t.size for name, t in tensors.items() if name.endswith((".A", ".B")))
        assert numbers and size_lora(manifest) == 2 * numbers, targets
    other = structs.replace(manifest, site_list=(SiteEntry(name="encoder.query", width=8, offset=0),))
    assert size_lora(other) is None
