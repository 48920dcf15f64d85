"""Calls that no exporter of ours writes: any shape, any attribute, changing from call to call.

The operators compute what the functions' nodes compute, or refuse; under `make sanitize` a read or write beyond a
tensor ends the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_graphs import EPSILON, Arrays, load, write_call
from test_onnx_operators_graphs import make_routed

from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.exporters.onnx.functions import (
    BRANCH_NORM,
    EXPERT_BRANCH,
    GAPPED_BRANCH,
    ROUTED_BRANCH,
    SWIGLU,
    make_branch,
    make_branch_norm,
    make_gapped_branch,
    make_swiglu,
)

Sizes = tuple[int, ...]
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CALLS = 4  # of one session, its inputs changing
# what a good call looks like: batch 2, tokens 3, K 16, two members of 9 and 7, R 8
PINNED: dict[str, Sizes] = {"x": (2, 3, 16), "y": (2, 3, 16), "a": (16, 8), "b": (8, 16), "expert": (2, 1, 19)}
NORM: dict[str, Sizes] = PINNED | {"stream": (2, 3, 16), "gain": (16,)}
GAPPED: dict[str, Sizes] = PINNED | {"places": (16,)}
ROUTED: dict[str, Sizes] = {**PINNED, "expert": (8, 16), "recovery": (8,), "columns": (8,), "read": (16, 16)}
FACTS: dict[str, Any] = {"widths": [9, 7], "ranks": [3, 2], "offsets": [2, 11]}
SPAN: dict[str, Any] = {"start": [2], "end": [18]}
ROUTING: dict[str, Any] = {
    "widths": [9, 7],
    "ranks": [3, 2],
    "experts": 4,
    "selection": 3,
    "top_k": 2,
    "n_gram": 1,
    "frozen_share": 0.5,
    "adapted_share": 0.5,
    "threshold": 0.5,
    "heat": 0.5,
}
INTEGERS = ("places", "columns")

dimension = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 18, 19, 20, 24, 40])
number = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 4, 8, 9, 16, 17, 1024, 1025, 2**31, 2**62, 2**63 - 1])
numbers = st.lists(st.one_of(st.integers(0, 12), number), min_size=1, max_size=9)


@st.composite
def draw_call(draw: st.DrawFn, good: dict[str, Sizes]) -> dict[str, Sizes]:
    """The good call with up to two of its inputs reshaped: one dimension, a dimension more or less, anything."""
    sizes = dict(good)
    for name in draw(st.lists(st.sampled_from(list(good)), max_size=2)):
        shape = list(sizes[name])
        kind = draw(st.sampled_from(["one", "more", "less", "any"]))
        place = draw(st.integers(0, len(shape) - 1)) if shape else 0
        if kind == "one" and shape:
            shape[place] = draw(dimension)
        elif kind == "more":
            shape.insert(place, draw(dimension))
        elif kind == "less":
            shape = shape[1:]
        else:
            shape = draw(st.lists(dimension, max_size=4))
        sizes[name] = tuple(shape)
    return sizes


def draw_arrays(sizes: dict[str, Sizes], seed: int) -> dict[str, np.ndarray]:
    """Each tensor in memory of its own, which ends where it ends."""
    random = np.random.default_rng(seed)
    return {
        name: np.zeros(shape, np.int64) if name in INTEGERS else random.standard_normal(shape, np.float32)
        for name, shape in sizes.items()
    }


def fits_operands(s: dict[str, Sizes], facts: dict[str, Any]) -> bool:
    """What operators.h and docs/bundle-format.md say of x, y, a and b."""
    if len(s["y"]) != 3 or len(s["a"]) != 2:
        return False
    (batch, tokens, width), (inputs, rank) = s["y"], s["a"]
    return (
        s["x"] == (batch, tokens, inputs)
        and s["b"] == (rank, width)
        and width == sum(facts["widths"])
        and rank % 8 == 0
        and sum(facts["ranks"]) <= rank <= 1024
    )


def fits_pinned(s: dict[str, Sizes], facts: dict[str, Any]) -> bool:
    if not fits_operands(s, facts) or len(s["expert"]) != 3:
        return False
    rows, one, total = s["expert"]
    members = zip(facts["widths"], facts["ranks"], facts["offsets"], strict=True)
    ends = [offset + width for width, rank, offset in members if rank]
    return one == 1 and rows in (1, s["y"][0]) and all(end <= total for end in ends)


def fits_norm(s: dict[str, Sizes], facts: dict[str, Any]) -> bool:
    return fits_pinned(s, facts) and s["stream"] == s["y"] and s["gain"] == s["y"][2:]


def fits_routed(s: dict[str, Sizes], facts: dict[str, Any]) -> bool:
    reads = sum(rank > 0 for rank in facts["ranks"]) * facts["experts"]
    return fits_operands(s, facts) and s["expert"] == (reads, s["y"][2]) and s["recovery"] == (reads,)


def fits_attributes(facts: dict[str, Any]) -> bool:
    """What is refused when a graph is loaded."""
    widths, ranks, offsets = facts["widths"], facts["ranks"], facts.get("offsets", facts["widths"])
    if not len(widths) == len(ranks) == len(offsets) <= 8:
        return False
    good = all(1 <= w < 2**31 for w in widths) and all(0 <= r <= 1024 for r in ranks) and min(offsets) >= 0
    if not good or "experts" not in facts:
        return good
    experts, reading = facts["experts"], [w for w, r in zip(widths, ranks, strict=True) if r]
    return 1 <= experts <= 256 and 1 <= facts["top_k"] <= experts <= min([256, *reading]) and facts["n_gram"] >= 1


Fits = Callable[[dict[str, Sizes], dict[str, Any]], bool]
Kind = tuple[onnx.FunctionProto, dict[str, Sizes], dict[str, Any], int, Fits]
KINDS: dict[str, Kind] = {
    EXPERT_BRANCH: (make_branch(EXPERT_BRANCH), PINNED, FACTS | SPAN, 1, fits_pinned),
    GAPPED_BRANCH: (make_gapped_branch(GAPPED_BRANCH), GAPPED, FACTS, 1, fits_pinned),
    BRANCH_NORM: (make_branch_norm(BRANCH_NORM), NORM, FACTS | SPAN | {"epsilon": EPSILON}, 2, fits_norm),
    ROUTED_BRANCH: (make_routed(RoutingConfig(), 4), ROUTED, ROUTING, 1, fits_routed),
}


def check_call(session: ort.InferenceSession, arrays: Arrays, good: bool, what: str) -> list[np.ndarray] | None:
    """It runs, or it is refused in the operator's words; nothing in between."""
    try:
        found = session.run(None, dict(arrays))
    except Exception as error:  # onnxruntime's exceptions share no public base
        assert not good, f"{what}: refused: {error}"
        assert "lime_edge: " in str(error), f"{what}: {error}"
        return None
    assert good, f"{what}: not refused"
    return cast(list[np.ndarray], found)


@pytest.mark.parametrize("name", KINDS)
def test_any_shapes(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One session, calls of other shapes one after the other: each is right by itself."""
    function, sizes, facts, outputs, fits = KINDS[name]
    file = tmp_path_factory.mktemp("shapes") / "model.onnx"
    ranks: dict[tuple[int, ...], ort.InferenceSession] = {}

    def open_session(call: dict[str, Sizes]) -> ort.InferenceSession:
        """Declared by rank alone: a graph's sizes may be anything."""
        key = tuple(map(len, call.values()))
        if key not in ranks:
            write_call(file, function, draw_arrays(call, 0), outputs, **facts)
            ranks[key] = load(file, True, 2)
        return ranks[key]

    @EXAMPLES
    @given(st.lists(draw_call(sizes), min_size=1, max_size=CALLS), st.integers(0, 99))
    def check(calls: list[dict[str, Sizes]], seed: int) -> None:
        for call in calls:
            arrays = draw_arrays(call, seed)
            found = check_call(open_session(call), arrays, fits(call, facts), f"{name} {call}")
            if found is not None:
                assert all(array.shape == call["y"] for array in found)
                assert name == ROUTED_BRANCH or all(np.isfinite(array).all() for array in found)

    check()


@pytest.mark.parametrize("name", KINDS)
def test_any_attributes(name: str, tmp_path: Path) -> None:
    """Lengths, signs and sums that overflow: refused when loading, when running, or right."""
    function, sizes, facts, outputs, fits = KINDS[name]
    lists = [key for key in ("widths", "ranks", "offsets") if key in facts]
    single = [key for key in ("experts", "top_k", "n_gram", "selection") if key in facts]

    @EXAMPLES
    @given(st.data())
    def check(data: st.DataObject) -> None:
        changed = dict(facts)
        for key in data.draw(st.lists(st.sampled_from(lists + single), min_size=1, max_size=2)):
            changed[key] = data.draw(numbers if key in lists else number)
        arrays = draw_arrays(sizes, 1)
        write_call(tmp_path / "model.onnx", function, arrays, outputs, **changed)
        try:
            session = load(tmp_path / "model.onnx", True)
        except Exception as error:  # onnxruntime's exceptions share no public base
            assert not fits_attributes(changed), f"{changed}: {error}"
            return
        assert fits_attributes(changed), f"{changed}: not refused"
        check_call(session, arrays, fits(sizes, changed), f"{name} {changed}")

    check()


def test_any_gate(tmp_path: Path) -> None:
    @EXAMPLES
    @given(st.lists(dimension, max_size=9), st.integers(0, 99))
    def check(shape: list[int], seed: int) -> None:
        if math.prod(shape) > 10**6:
            return
        x = np.random.default_rng(seed).standard_normal(shape, np.float32)
        write_call(tmp_path / "model.onnx", make_swiglu(), {"x": x})
        good = 1 <= len(shape) <= 8 and shape[-1] % 2 == 0
        found = check_call(load(tmp_path / "model.onnx", True), {"x": x}, good, f"{SWIGLU} {shape}")
        assert found is None or found[0].shape == (*shape[:-1], shape[-1] // 2)

    check()


@pytest.mark.parametrize("name", KINDS)
def test_other_types(name: str, tmp_path: Path) -> None:
    """A tensor of another type is refused when the graph is loaded or run: never read as what it is not."""
    function, sizes, facts, outputs, _ = KINDS[name]
    for key in sizes:
        if key in INTEGERS or key == "read":
            continue  # the operators do not read these
        for kind in (np.float16, np.float64, np.int8, np.int64, np.bool_):
            arrays = draw_arrays(sizes, 2)
            arrays[key] = arrays[key].astype(kind)
            write_call(tmp_path / "model.onnx", function, arrays, outputs, **facts)
            with pytest.raises(Exception, match=r"lime_edge: |Type Error|INVALID_GRAPH|not a registered"):
                load(tmp_path / "model.onnx", True).run(None, arrays)
