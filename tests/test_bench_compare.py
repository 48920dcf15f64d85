"""Comparing two measurements: crafted documents whose verdicts are known."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_bench import read_keys

from lime_edge.bench.compare import METRICS, compare_files, tabulate_comparison
from lime_edge.bench.measure import SCHEMA
from lime_edge.bench.rounds import Series, summarize
from lime_edge.bench.tables import write_markdown
from lime_edge.cli import app as cli
from lime_edge.errors import LimeEdgeError

QUIET = (0.99, 1.0, 1.0, 1.0, 1.01)
NOISY = (0.6, 0.9, 1.0, 1.3, 2.0)


def make_run(
    decode: float = 5.0, ttft: float = 100.0, noise: Sequence[float] = QUIET, peak: int = 200_000_000, **changes: Any
) -> dict[str, Any]:
    """A run whose decode step and first token take these milliseconds, times a factor per round."""
    series = Series(tokens=[decode], switches=[3.0] * 5)
    for key, value in (("decode_ms", decode), ("ttft_ms", ttft), ("switch_us", 3.0), ("load_ms", 50.0)):
        series.rounds[key] = [value * factor for factor in noise]
    summary = summarize(series, 128)
    del summary["ratios"]
    facts = {
        "kind": "decoder",
        "target": "onnx",
        "provider": "CPU",
        "expert": "movie",
        "quant": "int4",
        "threads": 2,
        "prompt_tokens": 128,
        "gen_tokens": 64,
        "depth": 128,
        "peak_rss_bytes": peak,
        "bundle_bytes": 1000,
        "memory": {"net_peak_bytes": None, "artifact_bytes": 900},
        "expert_bytes": {"file": 92},
    }
    return facts | summary | changes


def write_document(path: Path, *runs: dict[str, Any], **changes: Any) -> Path:
    machine = {"cpu": "Cortex-A76", "cores": 4, "arch": "aarch64", "board": "Raspberry Pi 5", "governor": "performance"}
    document = {"schema": SCHEMA, "model": "tiny", "fingerprint": "f0", "machine": machine, **runs[0], "runs": runs}
    path.write_text(json.dumps(document | changes))
    return path


def compare(folder: Path, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return compare_files(write_document(folder / "a.json", a), write_document(folder / "b.json", b))


def verdicts(comparison: dict[str, Any], run: int = 0) -> dict[str, tuple[float, str]]:
    return {m["metric"]: (round(m["ratio"], 6), m["verdict"]) for m in comparison["runs"][run]["metrics"]}


def test_a_faster_step_is_better_and_a_later_token_worse(tmp_path: Path) -> None:
    found = verdicts(compare(tmp_path, make_run(), make_run(decode=4.0, ttft=150.0, peak=220_000_000)))
    assert found["decode_tokens_per_s"] == (1.25, "better")
    assert found["prefill_tokens_per_s"] == (round(1 / 1.5, 6), "worse")
    assert found["ttft_ms"] == (1.5, "worse")
    assert found["peak_rss_bytes"] == (1.1, "worse")
    assert found["switch_us.p50"] == found["bundle_bytes"] == (1.0, "equal")
    assert "memory.net_peak_bytes" not in found and "run_ms.p50" not in found, "null on either side says nothing"
    slower = verdicts(compare(tmp_path, make_run(), make_run(decode=5.6)))
    assert slower["decode_tokens_per_s"][1] == "worse"


def test_nearly_the_same_is_equal(tmp_path: Path) -> None:
    found = verdicts(compare(tmp_path, make_run(noise=(1.0,) * 5), make_run(decode=5.05, noise=(1.0,) * 5)))
    assert found["decode_tokens_per_s"][1] == "equal"
    assert verdicts(compare(tmp_path, make_run(), make_run()))["ttft_ms"] == (1.0, "equal")


def test_noise_is_no_verdict(tmp_path: Path) -> None:
    """20% faster in the median, but the rounds of either measurement differ by more."""
    found = verdicts(compare(tmp_path, make_run(noise=NOISY), make_run(decode=4.0, noise=NOISY)))
    assert found["decode_tokens_per_s"] == (1.25, "within the spread")
    assert (
        verdicts(compare(tmp_path, make_run(), make_run(decode=4.0, noise=NOISY)))["decode_tokens_per_s"][1]
        == "within the spread"
    )


def test_few_rounds_are_no_verdict(tmp_path: Path) -> None:
    found = verdicts(compare(tmp_path, make_run(), make_run(decode=2.5, noise=(1.0, 1.0))))
    assert found["decode_tokens_per_s"] == (2.0, "too few rounds")
    assert found["peak_rss_bytes"] == (1.0, "equal"), "bytes are counted, not timed"


def test_another_schema_is_refused(tmp_path: Path) -> None:
    good = write_document(tmp_path / "a.json", make_run())
    old = write_document(tmp_path / "old.json", make_run(), schema=SCHEMA - 1)
    for pair in ((good, old), (old, good)):
        with pytest.raises(LimeEdgeError, match=f"old.json: schema: expected {SCHEMA}, found {SCHEMA - 1}"):
            compare_files(*pair)
    for text, message in (("{", "not readable JSON"), ("[]", "not a document"), ('{"schema": 2}', "not a document")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(LimeEdgeError, match=message):
            compare_files(good, tmp_path / "bad.json")
    with pytest.raises(LimeEdgeError, match="no such file"):
        compare_files(good, tmp_path / "nothing.json")


def test_apples_and_pears_are_named(tmp_path: Path) -> None:
    a = write_document(tmp_path / "a.json", make_run())
    machine = json.loads(a.read_text())["machine"] | {"cpu": "Cortex-A72", "governor": "powersave"}
    run = make_run(expert="plural", quant="int8", target="executorch")
    b = write_document(tmp_path / "b.json", run, machine=machine, fingerprint="f1", model="small")
    warnings = "\n".join(compare_files(a, b)["warnings"])
    for words in (
        "different models: tiny and small",
        "cpu: Cortex-A76 and Cortex-A72",
        "governor: performance and powersave",
        "expert: movie and plural",
        "quant: int4 and int8",
        "target: onnx and executorch",
    ):
        assert words in warnings, words
    assert compare_files(a, a)["warnings"] == []


def test_runs_are_matched_by_what_ran(tmp_path: Path) -> None:
    short, long = make_run(), make_run(prompt_tokens=512, depth=512, decode=8.0)
    a = write_document(tmp_path / "a.json", short, long)
    b = write_document(tmp_path / "b.json", make_run(prompt_tokens=512, depth=512, decode=4.0), make_run(depth=7))
    comparison = compare_files(a, b)
    assert [entry["run"] for entry in comparison["runs"]] == ["onnx, prompt 512"]
    assert verdicts(comparison)["decode_tokens_per_s"] == (2.0, "better")
    assert "2 runs are in one document only" in comparison["warnings"]
    other = write_document(tmp_path / "c.json", make_run(prompt_tokens=64), make_run(prompt_tokens=32))
    with pytest.raises(LimeEdgeError, match="no run in common"):
        compare_files(a, other)


def test_the_comparison_has_the_documented_keys(tmp_path: Path) -> None:
    comparison = compare(tmp_path, make_run(), make_run(decode=4.0, target="coreml"))
    found = {key for key in comparison if key != "runs"}
    for run in comparison["runs"]:
        found |= {f"runs[].{key}" for key in run if key != "metrics"}
        found |= {f"runs[].metrics[].{key}" for metric in run["metrics"] for key in metric}
    assert found == read_keys("The comparison")
    known = {key.removesuffix(".p50") for key in METRICS}
    assert known <= {key.removesuffix(".p50") for key in read_keys("A run")}, "every metric is a documented key"


def test_the_table_shows_both_and_the_verdict(tmp_path: Path) -> None:
    (table,) = tabulate_comparison(compare(tmp_path, make_run(), make_run(decode=4.0)))
    rows = {
        cells[1]: cells[2:-1]
        for line in write_markdown(table).splitlines()
        if len(cells := [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]) > 5
    }
    a, b, ratio, verdict = rows["decode_tokens_per_s"]
    assert (a.split()[0], b.split()[0], ratio, verdict) == ("200", "250", "1.250", "better")


def test_the_command_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_document(tmp_path / "a.json", make_run())
    b = write_document(tmp_path / "b.json", make_run(decode=4.0, threads=4))

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["lime-edge", "bench", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (int(end.value.code or 0), *capsys.readouterr())

    code, out, err = call("--compare", a, b, "--json")
    assert code == 0 and json.loads(out) == compare_files(a, b)
    assert "different threads: 2 and 4" in " ".join(err.split())
    assert "| decode_tokens_per_s |" in call("--compare", a, b, "--md")[1]
    assert "better" in call("--compare", a, b)[1]
    for words in (("--compare", a, b, "--csv"), (tmp_path, "--compare", a, b), ()):
        code, _, err = call(*words)
        assert code == 2 and "error:" in err
