"""Expert files and the bank: format, checks, blends, residuals."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from lime_edge.bundle.experts import (
    READY_BYTES,
    Expert,
    ExpertBank,
    check_name,
    describe_selection,
    parse_selection,
    read_expert,
)
from lime_edge.bundle.sites import SiteTable
from lime_edge.errors import LimeEdgeError

SITES = SiteTable.from_widths([("a", 3), ("b", 2)])
REFERENCE = np.array([1, 2, 3, 4, 5], np.float32)


def make_expert(name: str = "one", values: object = (1, 2, 3, 4, 5), dtype: type = np.float16) -> Expert:
    return Expert(name, np.array(values, dtype), "f" * 64, SITES.hash)


def make_bank() -> ExpertBank:
    bank = ExpertBank(SITES, "f" * 64, REFERENCE)
    bank.install(make_expert("one", (2, 2, 3, 4, 4)))
    bank.install(make_expert("two", (0, 1, 0, 1, 0.5)))
    return bank


def test_golden_bytes() -> None:
    """The file format, byte for byte: a reader of today must read the files of tomorrow."""
    data = make_expert().to_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"] == {
        "format": "lime-edge-expert",
        "schema": "1",
        "name": "one",
        "fingerprint": "f" * 64,
        "sites": SITES.hash,
        "note": "",
    }
    assert header["expert"] == {"dtype": "F16", "shape": [5], "data_offsets": [0, 10]}
    assert data[8 + length :].hex() == "003c00400042004400 45".replace(" ", "")


def test_round_trip(tmp_path: Path) -> None:
    expert = make_expert("two", (0.1, -3, 0, 65504, 1e-7))
    (tmp_path / "x.safetensors").write_bytes(expert.to_bytes())
    read = read_expert(tmp_path / "x.safetensors")
    assert read.name == "two" and read.vector.dtype == np.float16
    assert read.vector.tobytes() == expert.vector.tobytes()


@pytest.mark.parametrize("kept", [0, 7, 60, -3])
def test_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(make_expert().to_bytes()[:kept])
    with pytest.raises(LimeEdgeError, match="not a readable expert file"):
        read_expert(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (make_expert(values=(1, 2, np.nan, 4, 5)), "NaN"),
        (make_expert(values=(1, 2, np.inf, 4, 5)), "infinite"),
        (make_expert(dtype=np.float64), "dtype: expected float16 or float32, found float64"),
        (make_expert(values=[[1, 2]]), "shape: expected one axis"),
        (make_expert("../evil"), "not a valid expert name"),
        (make_expert("routed"), "reserved"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, expert: Expert, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(expert.to_bytes())
    with pytest.raises(LimeEdgeError, match=message):
        read_expert(tmp_path / "x.safetensors")


def test_all_misfits_are_named_at_once() -> None:
    foreign = Expert("x", np.ones(4, np.float16), "0" * 64, "1" * 64)
    with pytest.raises(LimeEdgeError) as caught:
        make_bank().install(foreign)
    text = str(caught.value)
    assert "length: expected 5, found 4" in text
    assert "backbone fingerprint: expected ffff" in text and "site table" in text


def test_residuals_are_vector_minus_reference() -> None:
    bank = make_bank()
    assert bank.residual("one").tolist() == [1, 0, 0, 0, -1]
    assert bank.residual(None).tolist() == [-1, -2, -3, -4, -5]
    assert bank.residual({"one": 0.5, "two": 0.5}).tolist() == [0, -0.5, -1.5, -1.5, -2.75]
    assert bank.residual({"one": 1.5, "two": -0.5}).tolist() == [2, 0.5, 1.5, 1.5, 0.75]


@pytest.mark.parametrize("blend", [{}, {"one": 0.5}, {"one": 0.7, "two": 0.7}, {"one": float("nan")}])
def test_blends_must_sum_to_one(blend: dict[str, float]) -> None:
    with pytest.raises(LimeEdgeError, match="sum to"):
        make_bank().residual(blend)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(LimeEdgeError, match="unknown expert 'three'\n  hint: installed experts: one, two"):
        make_bank().residual("three")


def test_replacing_an_expert_replaces_its_residual() -> None:
    bank = make_bank()
    before = bank.residual("one").copy()
    bank.install(make_expert("one", (9, 9, 9, 9, 9)))
    assert before.tolist() != bank.residual("one").tolist() == [8, 7, 6, 5, 4]


def test_ready_residuals_are_reused_and_bounded() -> None:
    sites = SiteTable.from_widths([("a", READY_BYTES // 8)])  # half the budget each
    bank = ExpertBank(sites, "f", np.zeros(sites.total, np.float32))
    for name in "xyz":
        bank.install(Expert(name, np.full(sites.total, ord(name), np.float16), "f", sites.hash))
    first = bank.residual("x").ctypes.data
    assert bank.residual("x").ctypes.data == first
    last = bank.residual("y")
    assert bank.residual("z").ctypes.data == first and last[0] == ord("y"), "the last one asked for stays"
    assert bank.residual("x")[0] == ord("x") and bank.residual("y")[0] == ord("y")


def test_a_failed_selection_disturbs_nothing() -> None:
    bank = make_bank()
    before = bank.residual("one")
    for bad in ("missing", {"one": 0.3}, {"missing": 1.0}):
        for _ in range(5):
            with pytest.raises(LimeEdgeError):
                bank.residual(bad)
    assert before.tolist() == [1, 0, 0, 0, -1] and bank.residual("two").tolist() == [-1, -1, -3, -3, -4.5]


def test_residuals_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_bank().residual("one")[0] = 7


@pytest.mark.parametrize("name", ["", "a b", "a/b", "none", "Routed", ".hidden", "x" * 65, 5])
def test_bad_names(name: object) -> None:
    assert check_name(name)


def test_selections_read_as_typed() -> None:
    assert parse_selection("none") is None
    assert parse_selection("movie") == "movie"
    assert parse_selection("a=0.5, b=0.25,b=0.25") == {"a": 0.5, "b": 0.5}
    assert describe_selection({"a": 0.5, "b": 0.5}) == "a=0.5,b=0.5"
    with pytest.raises(LimeEdgeError, match="not a number"):
        parse_selection("a=half")


def test_a_blend_is_summed_in_float64() -> None:
    """Every language must get the same numbers: products of float16 vectors are not rounded to float16."""
    bank, weights = make_bank(), {"one": 0.7, "two": 0.3}
    vectors = {name: bank.vector(name).astype(np.float64) for name in weights}
    expected = np.asarray(sum(weight * vectors[name] for name, weight in weights.items()), np.float32)
    np.testing.assert_array_equal(bank.mix(weights), expected)
