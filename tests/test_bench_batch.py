"""Rows of a batch, timed: documented keys, ratios worked out anew, and what cannot be measured is refused."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bench import leaves, read_keys

from lime_edge.bench import batch
from lime_edge.bench.batch import BatchOptions, Steps, bench_batch, tabulate_batch
from lime_edge.bench.tables import write_markdown
from lime_edge.cli import app as cli
from lime_edge.errors import LimeEdgeError

Make = Callable[..., Path]
SIZES, TOKENS, STEPS, ROUNDS = (1, 3, 6), 7, 3, 4


@pytest.fixture(scope="module")
def document(tiny_bundle: Make) -> dict[str, Any]:
    return bench_batch(tiny_bundle(), None, 1, BatchOptions(SIZES, TOKENS, STEPS, ROUNDS))


def test_keys_are_the_documented_ones(document: dict[str, Any]) -> None:
    documented = read_keys("Rows of a batch")
    sizes = {key.removeprefix("sizes[].") for key in documented if key.startswith("sizes[].")}
    assert leaves(*document["sizes"]) == sizes
    assert set(document) - {"sizes"} == {key for key in documented if not key.startswith("sizes[].")}
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["operators"] is True and document["experts"] == 4


def test_every_size_was_measured(document: dict[str, Any]) -> None:
    assert [size["rows"] for size in document["sizes"]] == list(SIZES)
    row = document["sizes"][0]["cache_bytes"]
    for size in document["sizes"]:
        assert size["cache_bytes"] == size["rows"] * row
        assert set(size["rounds"]) == {"mixed", "one_expert", "plain_nodes"}
        for rounds in size["rounds"].values():
            assert all(len(values) == ROUNDS and min(values) > 0 for values in rounds.values())
        median = np.median(size["rounds"]["mixed"]["step_ms"])
        assert size["tokens_per_s"] == pytest.approx(size["rows"] * 1e3 / median)


def test_ratios_are_those_of_the_rounds(document: dict[str, Any]) -> None:
    """Inside each round, then the median: worked out anew from the rounds."""
    least = document["sizes"][0]
    for size in document["sizes"]:
        for clock, key in (("clock", "step_ms"), ("cpu", "cpu_ms")):
            own = np.array(size["rounds"]["mixed"][key])
            one = np.array(least["rounds"]["mixed"][key])
            found = size["speedup"][clock]["ratio"]
            assert found == pytest.approx(np.median(one / own) * size["rows"]), f"{size['rows']} rows, {clock}"
            for kind in ("one_expert", "plain_nodes"):
                wanted = np.median(own / np.array(size["rounds"][kind][key]))
                assert size[f"to_{kind}"][clock]["ratio"] == pytest.approx(wanted), f"{size['rows']} rows, {kind}"
    assert least["speedup"] == {"rows": 1, "clock": least["speedup"]["clock"], "cpu": least["speedup"]["cpu"]}
    assert least["speedup"]["clock"]["ratio"] == 1


def test_rows_have_the_experts_they_are_said_to_have(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed: each its own, from the first again where there are more rows; else the first for all."""
    seen: dict[int, set[str]] = {}
    timed = Steps.time_round

    def watch(self: Steps, *arguments: Any, **named: Any) -> None:
        timed(self, *arguments, **named)
        chosen = [round(float(residual.sum()), 4) for residual in self.residuals]
        seen.setdefault(len(chosen), set()).add(str(len(set(chosen))))
        experts = self.rows._experts[: len(chosen)]  # type: ignore[attr-defined]
        assert [round(float(row.sum()), 4) for row in experts] == chosen

    monkeypatch.setattr(Steps, "time_round", watch)
    bench_batch(tiny_bundle(), None, 1, BatchOptions((1, 3, 6), 4, 1, 1))
    assert seen == {1: {"1"}, 3: {"1", "3"}, 6: {"1", "4"}}


def test_without_operators_nothing_is_compared_with_itself(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIME_EDGE_OPERATORS", "0")
    found = bench_batch(tiny_bundle(), None, 1, BatchOptions((2,), 4, 1, 1))
    assert found["operators"] is False and found["sizes"][0]["to_plain_nodes"] is None
    assert "without operators" in tabulate_batch(found).title and tabulate_batch(found).rows[0][-1] == "-"


def test_the_environment_is_left_as_it_was(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIME_EDGE_OPERATORS", raising=False)
    with batch._without_operators():
        pass
    assert "LIME_EDGE_OPERATORS" not in batch.os.environ
    monkeypatch.setenv("LIME_EDGE_OPERATORS", "1")
    with batch._without_operators():
        assert batch.os.environ["LIME_EDGE_OPERATORS"] == "0"
    assert batch.os.environ["LIME_EDGE_OPERATORS"] == "1"


# the command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`lime-edge bench ...`: the exit code and all that was printed."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["lime-edge", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + (printed.err if ended.value.code else "")

    return call


def test_the_command_prints_every_form(
    run: Callable[..., tuple[int, str]], tiny_bundle: Make, document: dict[str, Any]
) -> None:
    few = ["--batch", "1,2", "--prompt-tokens", "4", "--gen-tokens", "2", "--repeat", "2", "--threads", "1"]
    bundle = str(tiny_bundle())
    code, table = run(bundle, *few)
    assert code == 0 and "mixed / one expert" in table, table
    lines = run(bundle, *few, "--md")[1].splitlines()
    assert len(lines) == 6 and lines[-1].startswith("| 2 |")
    rows = list(csv.DictReader(io.StringIO(run(bundle, *few, "--csv")[1])))
    assert [row["rows"] for row in rows] == ["1", "2"] and all(float(row["speedup"]) > 0 for row in rows)
    assert [size["rows"] for size in json.loads(run(bundle, *few, "--json")[1])["sizes"]] == [1, 2]
    assert re.search(r"\| 6 \| \d+ \| \d+\.\d, \d+\.\d \|", write_markdown(tabulate_batch(document)))


def test_what_cannot_be_measured_is_refused(run: Callable[..., tuple[int, str]], tiny_bundle: Make) -> None:
    bundle = tiny_bundle()
    for arguments, message in (
        (("--batch", "0"), "1 or more"),
        (("--batch", "two"), "1 or more"),
        (("--batch", "2,2"), "each number once"),
        (("--batch", "1", "--expert", "expert1"), "goes without"),
        (("--batch", "1", "--report", "r"), "goes without"),
        (("--batch", "1", "--prompt-tokens", "4,8"), "one length"),
        (("--batch", "1", "--target", "onnx,coreml"), "one --target"),
        (("--batch", "1", "--prompt-tokens", "100000"), "max_length"),
    ):
        code, printed = run(str(bundle), *arguments)
        assert code and message in " ".join(printed.split()), (arguments, printed)
    with pytest.raises(LimeEdgeError, match="expected|no expert|single"):
        bench_batch(tiny_bundle(fold="expert0", single=True), None, 1, BatchOptions((0,)))
