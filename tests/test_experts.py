"""Expert files and the bank: format, checks, blends, residuals."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from lime_edge.bundle.experts import (
    READY_BYTES,
    Expert,
    ExpertBank,
    describe_selection,
    parse_selection,
    read_expert,
)
from lime_edge.errors import LimeEdgeError

ID = "f" * 64
REFERENCE = np.array([1, 2, 3, 4, 5], np.float32)


def make_expert(name: str = "one", values: object = (1, 2, 3, 4, 5), dtype: type = np.float16) -> Expert:
    return Expert(name, np.array(values, dtype), ID)


def make_bank() -> ExpertBank:
    bank = ExpertBank(5, ID, REFERENCE)
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
        "schema": "2",
        "name": "one",
        "adapter_id": ID,
        "note": "",
        "license": "",
    }
    assert header["expert"] == {"dtype": "F16", "shape": [5], "data_offsets": [0, 10]}
    assert data[8 + length :].hex() == "003c00400042004400 45".replace(" ", "")


def test_round_trip(tmp_path: Path) -> None:
    expert = make_expert("two", (0.1, -3, 0, 65504, 1e-7))
    (tmp_path / "x.safetensors").write_bytes(expert.to_bytes())
    read = read_expert(tmp_path / "x.safetensors")
    assert read.name == "two" and read.vector.dtype == np.float16
    assert read.vector.tobytes() == expert.vector.tobytes()


@pytest.mark.parametrize("kept", [0, 7, 60])
def test_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(make_expert().to_bytes()[:kept])
    with pytest.raises(LimeEdgeError, match="not a readable expert file"):
        read_expert(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (make_expert(values=(1, 2, np.nan, 4, 5)), "NaN"),
        (make_expert(values=(1, 2, np.inf, 4, 5)), "infinite"),
        (make_expert(values=(1, 2, 3e38, 4, 5), dtype=np.float32), "values up to 3e[+]38, expected at most 65504"),
        (make_expert(values=[[1, 2]]), "shape: expected one axis"),
        (make_expert(values=[]), "shape: expected one axis"),
        (make_expert("../evil"), "not a valid expert name"),
        (make_expert("routed"), "reserved"),
        (replace(make_expert(), adapter_id="x"), "adapter_id: expected 64 hex digits"),
        (replace(make_expert(), adapter_id="f" * 64 + "\n"), "adapter_id: expected 64 hex digits"),
        (replace(make_expert(), note="a\x1b[31m"), "note: at most 512 characters, none of control"),
        (replace(make_expert(), license="x" * 513), "license: at most 512"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, expert: Expert, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(expert.to_bytes())
    with pytest.raises(LimeEdgeError, match=message):
        read_expert(tmp_path / "x.safetensors")


def make_file(header: object, data: bytes = bytes(10)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


FACTS = {"format": "lime-edge-expert", "schema": "2", "name": "one", "adapter_id": ID}
TENSOR = {"dtype": "F16", "shape": [5], "data_offsets": [0, 10]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (make_file({"expert": TENSOR}), "missing required field `__metadata__`"),
        (make_file({"__metadata__": FACTS}), "missing required field `expert`"),
        (make_file({"__metadata__": FACTS, "expert": TENSOR, "more": TENSOR}), "unknown field `more`"),
        (make_file({"__metadata__": FACTS | {"format": "other"}, "expert": TENSOR}), "not a LiME expert file"),
        (make_file({"__metadata__": FACTS | {"schema": "1"}, "expert": TENSOR}), "older format: pack or export"),
        (make_file({"__metadata__": FACTS | {"schema": "3"}, "expert": TENSOR}), "upgrade"),
        (make_file({"__metadata__": FACTS | {"schema": "9" * 9999}, "expert": TENSOR}), "upgrade"),
        (make_file({"__metadata__": FACTS | {"name": 3}, "expert": TENSOR}), "Expected `str`"),
        (make_file({"__metadata__": FACTS, "expert": TENSOR | {"dtype": "BF16"}}), r"F16, F32\), found BF16"),
        (make_file({"__metadata__": FACTS, "expert": TENSOR | {"dtype": "F32"}}), "bytes of numbers: expected 20"),
        (make_file({"__metadata__": FACTS, "expert": TENSOR | {"shape": [10**18]}}), "<= 268435456"),
        (make_file({"__metadata__": FACTS, "expert": TENSOR | {"shape": [-1]}}), ">= 0"),
        (make_file({"__metadata__": FACTS, "expert": TENSOR | {"data_offsets": [0, 8]}}), "bytes of numbers"),
        (make_file({"__metadata__": FACTS, "expert": TENSOR}, bytes(12)), "bytes of numbers: expected 10, found 12"),
        (make_file(b"[" * 60000), "not a readable expert file"),
        (make_file(b"\xff" * 60), "not a readable expert file"),
        (make_file(b" " * 70000), "no safetensors header"),
        (struct.pack("<Q", 1 << 63) + bytes(99), "no safetensors header"),
        (b"\x80\x04\x95" + bytes(99), "no safetensors header"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(LimeEdgeError, match=message):
        read_expert(tmp_path / "x.safetensors")


def test_a_longer_vector_than_the_bundle_s_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(make_expert().to_bytes())
    assert read_expert(tmp_path / "x.safetensors", 5).vector.size == 5
    with pytest.raises(LimeEdgeError, match="one axis of at most 4"):
        read_expert(tmp_path / "x.safetensors", 4)
    for missing in (tmp_path / "none", tmp_path, Path("/dev/zero")):
        with pytest.raises(LimeEdgeError, match="no such expert file"):
            read_expert(missing)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    for dtype in (np.float16, np.float32):
        expert = make_expert(dtype=dtype)
        assert load(expert.to_bytes())["expert"].tobytes() == expert.vector.tobytes()
        assert expert.to_bytes() == make_expert(dtype=dtype).to_bytes()


def test_all_misfits_are_named_at_once() -> None:
    foreign = Expert("One", np.ones(4, np.float16), "0" * 64)
    with pytest.raises(LimeEdgeError) as caught:
        make_bank().install(foreign)
    text = str(caught.value)
    assert "length: expected 5, found 4" in text and "adapter_id: expected ffff" in text
    assert "'One' and 'one' differ by letter case only" in text


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
    total = READY_BYTES // 8  # half the budget each
    bank = ExpertBank(total, ID, np.zeros(total, np.float32))
    for name in "xyz":
        bank.install(Expert(name, np.full(total, ord(name), np.float16), ID))
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


def test_names_are_checked_whoever_gives_them() -> None:
    for name in ("none", "Routed", "a b", "con"):
        with pytest.raises(LimeEdgeError):
            make_bank().install(make_expert(name))


@pytest.mark.parametrize(
    "blend",
    [
        {"one": 1e300, "two": 1 - 1e300},
        {"one": 60000.0, "two": -59999.0},
        {"one": 10**400},
        {"one": "1"},
        {"one": None},
        {"one": []},
    ],
)
def test_blends_that_no_target_holds_are_refused(blend: dict[str, float]) -> None:
    bank = make_bank()
    before = bank.residual("one").tolist()
    with pytest.raises(LimeEdgeError):
        bank.residual(blend)
    assert bank.residual("one").tolist() == before


def test_a_residual_beyond_float16_is_refused() -> None:
    bank = ExpertBank(5, ID, np.full(5, -40000, np.float32))
    with pytest.raises(LimeEdgeError, match="p - p_ref"):
        bank.install(make_expert(values=[40000] * 5))
    bank.install(make_expert(values=[20000] * 5))
    bank.install(make_expert("two", values=[-40000] * 5))
    with pytest.raises(LimeEdgeError, match="p - p_ref: holds values up to"):
        bank.residual({"one": 1.5, "two": -0.5})


def test_a_lazy_expert_is_read_once_and_checked() -> None:
    bank, calls = make_bank(), list[int]()

    def load() -> Expert:
        calls.append(1)
        return make_expert("three")

    bank.offer("three", load)
    bank.offer("foreign", lambda: replace(make_expert("foreign"), adapter_id="0" * 64))
    assert bank.names == ("one", "two", "three", "foreign") and not calls
    for _ in range(2):
        assert bank.vector("three").tolist() == [1, 2, 3, 4, 5]
    assert calls == [1]
    with pytest.raises(LimeEdgeError, match="adapter_id"):
        bank.residual("foreign")
    bank.remove("foreign")
    assert "foreign" not in bank.names


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
