"""The benchmark: its document is what the docs say, its arithmetic is right, and what cannot be measured is refused."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_trees import plant_rapl, plant_thermal
from msgspec import structs

from lime_edge.bench import energy as bench_energy
from lime_edge.bench import measure as bench
from lime_edge.bench.measure import FIRST, BenchOptions, bench_bundle
from lime_edge.bench.memory import MemoryRequest, Stage, find_imports, measure_stages, read_memory
from lime_edge.bench.rounds import Series, summarize
from lime_edge.bench.tables import flatten, tabulate, write_csv, write_markdown
from lime_edge.bench.timing import compare_rounds, find_spread, percentiles, time_first_token, time_round, time_switches
from lime_edge.bundle.bundle import Bundle
from lime_edge.cli import app as cli
from lime_edge.errors import LimeEdgeError
from lime_edge.session.engines import SessionOptions
from lime_edge.session.open import open_decoder
from lime_edge.session.switching import ExpertSwitch
from lime_edge.targets.entries import TARGETS

Make = Callable[..., Path]
SCHEMA_PAGE = Path(__file__).parent.parent / "docs" / "bench-schema.md"
SINGLE = {"fold": "expert0", "single": True}


@pytest.fixture(scope="module")
def document(tiny_bundle: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two prompt lengths of a tiny bundle beside its branchless one, on a machine with every sensor."""
    root = tmp_path_factory.mktemp("sys")
    plant_rapl(root)
    plant_thermal(root)
    before, bench_energy.LONG = bench_energy.LONG, 0.02
    options = BenchOptions((6, 12), 5, 3, depth=9, baseline=tiny_bundle(**SINGLE), sysfs=root)
    try:
        return bench_bundle(tiny_bundle(), None, "expert1", 1, options)
    finally:
        bench_energy.LONG = before


@pytest.fixture(scope="module")
def encoder_document(tmp_path_factory: pytest.TempPathFactory, encoder_bundle: Make) -> dict[str, Any]:
    """A tiny encoder beside its branchless bundle."""
    root, path = tmp_path_factory.mktemp("encoder"), encoder_bundle("bert-lora-cls")
    plant_rapl(root / "sys")
    single = encoder_bundle("bert-lora-cls", fold=Bundle.open(path).manifest.experts[0], single=True)
    before, bench_energy.LONG = bench_energy.LONG, 0.02
    try:
        return bench_bundle(path, "onnx", FIRST, 1, BenchOptions(7, repeat=3, baseline=single, sysfs=root / "sys"))
    finally:
        bench_energy.LONG = before


# the schema


def read_section(title: str) -> str:
    return SCHEMA_PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def read_keys(title: str) -> set[str]:
    """The keys in the first column of a section's table, names that stand for several written out."""
    several = {}
    for line in read_section("Names that stand for several").splitlines():
        names = re.findall(r"`([^`]+)`", line)
        if names:
            several[names[0]] = names[1:]
    found = set()
    for line in read_section(title).splitlines():
        for key in re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("|") else ():
            choices = [several.get(part, [part]) for part in key.split(".")]
            found |= {".".join(parts) for parts in itertools.product(*choices)}
    return found


def leaves(*documents: dict[str, Any]) -> set[str]:
    """Dotted keys of all documents; an object that is null somewhere counts by its inner keys."""
    keys = {key for document in documents for key in flatten(document)}
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


def test_a_run_has_the_documented_keys(document: dict[str, Any], encoder_document: dict[str, Any]) -> None:
    runs = [*document["runs"], *encoder_document["runs"]]
    assert leaves(*runs) == read_keys("A run")
    assert len({tuple(sorted(run)) for run in runs}) == 1, "every run has the same keys"


def test_a_document_has_the_documented_keys(document: dict[str, Any], encoder_document: dict[str, Any]) -> None:
    for one in (document, encoder_document):
        assert one["schema"] == bench.SCHEMA
        own = {key: value for key, value in one.items() if key not in one["runs"][0]}
        assert leaves(own) == read_keys("The document")
        assert {key: one[key] for key in one["runs"][0]} == one["runs"][0]
    assert f"Schema {bench.SCHEMA}." in SCHEMA_PAGE.read_text()
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_the_promised_keys_are_there(document: dict[str, Any]) -> None:
    """What scripts may rely on in every schema."""
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_ms", "peak_rss_bytes"):
        assert document[key] > 0, key
    assert 0 < document["switch_us"]["p50"] <= document["switch_us"]["p95"] <= document["switch_us"]["p99"]


def test_a_run_says_what_ran(document: dict[str, Any]) -> None:
    assert [run["prompt_tokens"] for run in document["runs"]] == [6, 12]
    for run in document["runs"]:
        assert (run["expert"], run["gen_tokens"], run["depth"], run["threads"]) == ("expert1", 5, 9, 1)
        rounds = run["rounds"]
        assert {key: len(values) for key, values in rounds.items() if key.startswith("load")}["load_ms"] == 3
        for key in ("ttft_ms", "decode_ms", "switch_us", "switch_to_first_token_ms", "baseline_decode_ms"):
            assert len(rounds[key]) == 3, key
        assert rounds["run_ms"] == [] and run["run_ms"] is None
        ratio = statistics.median(a / b for a, b in zip(rounds["decode_ms"], rounds["baseline_decode_ms"], strict=True))
        assert run["baseline"]["decode"]["ratio"] == pytest.approx(ratio)
        assert run["decode_tokens_per_s"] == pytest.approx(1e3 / statistics.median(rounds["decode_ms"]))
        assert run["temperature_c"] == {"before": 51.5, "after": 51.5}
        assert run["energy"]["source"] == "rapl"


def test_an_encoder_has_what_applies(encoder_document: dict[str, Any]) -> None:
    one = encoder_document
    assert one["kind"] == "encoder" and one["prompt_tokens"] == 7
    for key in ("ttft_ms", "decode_tokens_per_s", "token_ms", "switch_to_first_token_ms", "bandwidth", "depth"):
        assert one[key] is None, key
    assert one["run_ms"]["p50"] > 0 and one["switch_us"]["p50"] > 0 and one["peak_rss_bytes"] > 0
    assert one["baseline"]["run"]["ratio"] > 0 and one["baseline"]["decode"] is None


def test_targets_times_lengths_are_runs(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second target that is the same engine under another name: its runs come after the first one's."""
    bundle = Bundle.open(tiny_bundle())
    manifest = structs.replace(bundle.manifest)
    facts = manifest.targets["onnx"]
    manifest.__dict__["targets"] = {"onnx": facts, "twin": facts}
    twice = Bundle(bundle.path, manifest)
    monkeypatch.setattr(Bundle, "open", classmethod(lambda *_: twice))
    monkeypatch.setitem(TARGETS, "twin", TARGETS["onnx"])
    stage = {"rss_bytes": 5, "anonymous_bytes": None, "peak_bytes": 7}
    monkeypatch.setattr(bench, "find_imports", lambda _: ())
    monkeypatch.setattr(bench, "measure_experts", lambda _: dict.fromkeys(("1", "10", "100"), stage))
    monkeypatch.setattr(bench, "measure_stages", lambda _: dict.fromkeys(("imports", "switches"), stage))
    steps: dict[str, list[tuple[int, int]]] = {}
    told = lambda step, done, total: steps.setdefault(step, []).append((done, total))  # noqa: E731
    found = bench_bundle(bundle.path, ["twin", "onnx"], FIRST, 1, BenchOptions((4, 6), 2, 1), told)
    assert [(run["target"], run["prompt_tokens"]) for run in found["runs"]] == [
        ("twin", 4),
        ("twin", 6),
        ("onnx", 4),
        ("onnx", 6),
    ]
    assert found["target"] == "twin" and found["peak_rss_bytes"] == 7 and found["memory"]["net_peak_bytes"] == 2
    assert tabulate(found).headers == ["", "twin, prompt 4", "twin, prompt 6", "onnx, prompt 4", "onnx, prompt 6"]
    assert {"copying memory", "twin loads", "twin rounds", "twin memory", "onnx rounds"} <= set(steps)
    for step, calls in steps.items():
        assert calls[-1][0] == calls[-1][1] and [done for done, _ in calls] == sorted(done for done, _ in calls), step


# arithmetic, against the standard library


def test_percentiles_of_known_numbers() -> None:
    values = np.random.default_rng(1).permutation(101.0 * np.arange(101))
    cuts = statistics.quantiles(values.tolist(), n=100, method="inclusive")
    assert percentiles(values) == pytest.approx({"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]})
    assert find_spread(values.tolist()) == pytest.approx({"p5": cuts[4], "p95": cuts[94]})
    assert find_spread([]) is None


def test_a_ratio_is_taken_inside_a_round() -> None:
    """Rounds of a machine that slows down: the ratio of the medians would be 20, inside a round it is 2."""
    found = compare_rounds([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert found == {"ratio": 2.0, "spread": {"p5": 2.0, "p95": 2.0}}
    assert compare_rounds([3.0, 20.0, 2.0], [1.0, 10.0, 4.0])["ratio"] == 2.0


def test_rates_come_from_the_rounds() -> None:
    series = Series(tokens=[4.0, 5.0, 6.0, 5.0], switches=[1.0, 3.0])
    series.rounds |= {"ttft_ms": [100.0, 50.0, 200.0], "decode_ms": [5.0, 4.0, 8.0], "load_ms": [7.0]}
    found = summarize(series, 20)
    assert (found["ttft_ms"], found["prefill_tokens_per_s"], found["decode_tokens_per_s"]) == (100.0, 200.0, 200.0)
    assert found["spread"]["prefill_tokens_per_s"] == pytest.approx({"p5": 110.0, "p95": 380.0})
    assert found["token_ms"]["p50"] == 5.0 and found["switch_us"]["p50"] == 2.0
    assert found["load_ms"] == 7.0 and found["load_cold_ms"] is None and found["run_ms"] is None
    assert found["ratios"] is None


# timing a session


def test_a_round_decodes_what_the_session_decodes(tiny_bundle: Make) -> None:
    """Timing must not change the answer: the cache afterwards holds the prompt and the greedy tokens."""
    session = open_decoder(Bundle.open(tiny_bundle()), options=SessionOptions(1, 32))
    prompt = [5, 9, 2, 7]
    first, steps = time_round(session, prompt, 6)
    assert first > 0 and steps.shape == (6,) and (steps > 0).all()
    timed = session.extend([1]).copy()
    logits, tokens = session.logits(prompt, keep=1), []
    for _ in range(6):
        tokens.append(int(logits[-1].argmax()))
        logits = session.extend(tokens[-1:])
    np.testing.assert_allclose(timed, session.extend([1]), atol=1e-5)
    time_round(session, prompt, 3, before=[8] * 11)
    assert sum(segment.tokens for segment in session.cache) == 14


def test_switching_restores_the_selection(tiny_bundle: Make) -> None:
    session = open_decoder(Bundle.open(tiny_bundle()), options=SessionOptions(1, 32))
    blend = {"expert0": 0.5, "expert2": 0.5}
    session.use(blend)
    assert time_switches(session, 20).shape == (20,)
    assert session.selection == blend
    assert (time_first_token(session, [3, 4, 5], 1) or 0) > 0
    assert session.selection == blend


def test_a_single_bundle_has_nothing_to_switch_to(tiny_bundle: Make) -> None:
    session = open_decoder(Bundle.open(tiny_bundle(**SINGLE)), options=SessionOptions(1, 32))
    assert time_switches(session).size == 0 and time_first_token(session, [3, 4], 0) is None
    facts = bench_bundle(tiny_bundle(**SINGLE), "onnx", FIRST, 1, BenchOptions(4, 2, 1))
    assert facts["switch_us"] is None and facts["memory"]["experts"] is None and facts["peak_rss_bytes"] > 0
    assert facts["expert"] == "expert0"


# memory


def known(stages: dict[str, Stage]) -> dict[str, dict[str, int]]:
    """Every number of every stage: this platform tells them all."""
    found = {name: {key: x for key, x in stage.items() if x is not None} for name, stage in stages.items()}
    assert all(len(found[name]) == len(stage) for name, stage in stages.items())
    return found


def test_memory_is_a_fresh_process(tiny_bundle: Make) -> None:
    """Whatever this process holds is not in it; stages grow, and no peak lies below what is resident."""
    ballast = np.ones(1 << 28, np.uint8)
    request = MemoryRequest(str(tiny_bundle()), "onnx", "expert1", 1, 8, None, 4)
    stages = known(measure_stages(request))
    assert list(stages) == ["python", "imports", "opened", "prompt", "switches"]
    assert stages["switches"]["peak_bytes"] < ballast.nbytes < known({"here": read_memory()})["here"]["rss_bytes"]
    peaks = [stage["peak_bytes"] for stage in stages.values()]
    assert peaks == sorted(peaks)
    for name, stage in stages.items():
        assert 0 < stage["anonymous_bytes"] < stage["rss_bytes"] <= stage["peak_bytes"] * 1.02, name
    assert stages["imports"]["rss_bytes"] > stages["python"]["rss_bytes"] + (1 << 20), "the engine is imported there"


def test_what_is_imported_late_counts_as_imports(tiny_bundle: Make) -> None:
    """An engine may import itself only when it is used: that is no memory of the model."""
    request = MemoryRequest(str(tiny_bundle()), "onnx", FIRST, 1, 8, None, 4)
    modules = find_imports(request)
    assert {"numpy", "onnxruntime", "lime_edge.runtimes.onnx.decoder"} <= set(modules)
    plain = known(measure_stages(request))
    late = known(measure_stages(replace(request, modules=("email.mime.text", "no_such_module", "matplotlib.pyplot"))))
    for name in ("imports", "opened", "switches"):
        assert late[name]["rss_bytes"] > plain[name]["rss_bytes"] + (4 << 20), name
    assert abs(late["python"]["rss_bytes"] - plain["python"]["rss_bytes"]) < 4 << 20


def test_a_hundred_experts_are_counted(tiny_bundle: Make, document: dict[str, Any]) -> None:
    experts = document["memory"]["experts"]
    assert list(experts) == ["1", "10", "100"] and all(entry["rss_bytes"] > 0 for entry in experts.values())
    sites = Bundle.open(tiny_bundle()).manifest.sites
    assert document["expert_bytes"]["vector"] == document["expert_bytes"]["ready"] == 4 * sites.total
    assert document["expert_bytes"]["file"] > 4 * sites.total
    assert {Path(name).suffix for name in Bundle.open(tiny_bundle()).manifest.experts} == {""}, "nothing was added"


def test_a_failing_memory_process_is_told(tiny_bundle: Make) -> None:
    with pytest.raises(LimeEdgeError, match="the process that measures memory failed: .*no_such_expert"):
        measure_stages(MemoryRequest(str(tiny_bundle()), "onnx", "no_such_expert", 1, 8, None, 4))


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "branches: expected none"),
        (SINGLE | {"quant": "int8"}, "quant: expected none, found int8"),
    ],
)
def test_a_wrong_baseline_is_refused(tiny_bundle: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LimeEdgeError, match=message):
        bench_bundle(tiny_bundle(), None, FIRST, 1, BenchOptions(4, 2, 1, baseline=tiny_bundle(**options)))


def test_the_title_names_every_engine(document: dict[str, Any]) -> None:
    run = document["runs"][0]
    one = tabulate(document | {"runs": [run | {"repeat": 1}]}).title
    assert f", {run['provider']}, expert expert1, 1 round, 1 thread;" in one, one
    both = tabulate(document | {"runs": [run, run | {"target": "executorch", "provider": "XnnpackBackend"}]}).title
    assert f", onnx on {run['provider']}, executorch on XnnpackBackend, expert expert1, 3 rounds," in both, both


def test_an_interpreter_is_refused(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertSwitch, "provider", property(lambda _: "interpreter"))
    with pytest.raises(LimeEdgeError, match="interpreter") as caught:
        bench_bundle(tiny_bundle(), None, FIRST, 1, BenchOptions(4, 2, 1))
    assert caught.value.exit_code == 4 and caught.value.hint.startswith("leave out `target=onnx`, or run")


def test_too_many_tokens_are_refused_first(tiny_bundle: Make) -> None:
    for options in (BenchOptions((4, 60), 8), BenchOptions(4, 8, depth=60)):
        with pytest.raises(LimeEdgeError, match="expected at most 64, found 68"):
            bench_bundle(tiny_bundle(), None, FIRST, 1, options)
    with pytest.raises(LimeEdgeError, match="targets: expected each once"):
        bench_bundle(tiny_bundle(), ["onnx", "onnx"], FIRST, 1, BenchOptions(4, 2))
    with pytest.raises(LimeEdgeError, match="(?s)prompt tokens.*repeat"):
        BenchOptions((0, 3), repeat=0)


# what is printed


def test_csv_parses_back(document: dict[str, Any], encoder_document: dict[str, Any]) -> None:
    for one in (document, encoder_document):
        lines = list(csv.DictReader(io.StringIO(write_csv(one))))
        assert len(lines) == len(one["runs"])
        for line, run in zip(lines, one["runs"], strict=True):
            values = {key: value for key, value in flatten(run).items() if not key.startswith("rounds.")}
            assert values.keys() <= line.keys() and line["machine.cpu"] == one["machine"]["cpu"]
            for key, value in values.items():
                assert line[key] == ("" if value is None else str(value)), key
            assert set(line) & {"runs", "rounds.ttft_ms"} == set()


def test_markdown_parses_back(document: dict[str, Any]) -> None:
    lines = [line for line in write_markdown(tabulate(document)).splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(row) for row in table} == {3} and table[0][1:] == ["onnx, prompt 6", "onnx, prompt 12"]
    cells = {row[0]: row[1:] for row in table[2:]}
    for place, run in enumerate(document["runs"]):
        assert cells["decode, tokens/s"][place].split(" (")[0] == f"{run['decode_tokens_per_s']:.1f}"
        ratio = run["baseline"]["decode"]["ratio"]
        assert cells["decode time / branchless"][place].startswith(f"{ratio:.3f} (")
    assert "call p50 / p95 / p99, ms" not in cells, "what applies to no run is left out"


def test_the_command_prints_what_is_asked(
    tiny_bundle: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, document: dict[str, Any]
) -> None:
    asked: list[Any] = []

    def answer(*given: Any) -> dict[str, Any]:
        asked.append(given)
        return document

    def call(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["lime-edge", "bench", str(tiny_bundle()), *words])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    monkeypatch.setattr(bench, "bench_bundle", answer)
    asked_for = ("--json", "--target=onnx", "--target=coreml", "--prompt-tokens=6,12", "--depth=9", "--expert=none")
    assert call(*asked_for) == 0 and json.loads(capsys.readouterr().out) == document
    assert asked[0][1:4] == (["onnx", "coreml"], None, None)
    assert asked[0][4] == BenchOptions((6, 12), depth=9)
    for form, start in (("--csv", "lime_edge,"), ("--md", "**")):
        assert call(form) == 0 and start in capsys.readouterr().out.splitlines()[0]
    for words, message in ((("--json", "--csv"), "one of them"), (("--prompt-tokens", "12,x"), "'x'")):
        assert call(*words) == 2 and message in capsys.readouterr().err
