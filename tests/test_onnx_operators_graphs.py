"""Which graphs the operators run, and which they refuse; whole bundles with them and without them."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import Make
from manifests import reseal
from models import ALL_LINEARS, draw_ids
from operator_graphs import (
    EPSILON,
    Arrays,
    Shape,
    assert_equal,
    compute_pinned,
    compute_routed,
    draw_inputs,
    find_operators,
    load,
    run,
    write_call,
    write_pinned,
    write_routed,
)

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.compiler.maths.routing import RoutingConfig, plan_routing
from lime_edge.exporters.onnx import experts as onnx_experts
from lime_edge.exporters.onnx import functions as onnx_functions
from lime_edge.exporters.onnx.functions import (
    BRANCH_NORM,
    EXPERT_BRANCH,
    GAPPED_BRANCH,
    ROUTED_BRANCH,
    SWIGLU,
    make_branch,
    make_branch_norm,
    make_gapped_branch,
    make_routed_branch,
    make_swiglu,
)
from lime_edge.exporters.onnx.graph import LIME
from lime_edge.runtimes.onnx import decoder as onnx_decoder
from lime_edge.runtimes.onnx import operators as onnx_operators
from lime_edge.session.generate import GenerationOptions
from lime_edge.targets.entries import OnnxFacts

SOURCES = Path(__file__).parents[1] / "runtimes" / "onnx" / "operators"
BOTH = (True, False)
PROMPT, NEW = 20, 24
BLEND = {"expert0": 0.7, "expert2": 0.5, "expert3": -0.2}
BUNDLES: dict[str, dict[str, Any]] = {
    "all linears": {"targets": ALL_LINEARS, "rank": 8},
    "q and v": {"targets": ("q_proj", "v_proj"), "rank": 3},
    "routed": {"targets": ALL_LINEARS, "rank": 12, "routing": {"top_k": 2}},
    "routed in windows": {"targets": ("q_proj", "v_proj", "o_proj"), "routing": {"top_k": 2, "n_gram": 3}},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


# which of the two runs


@pytest.mark.parametrize("name", [EXPERT_BRANCH, GAPPED_BRANCH, BRANCH_NORM, ROUTED_BRANCH, SWIGLU])
def test_operator_takes_the_functions_place(name: str, file: Path) -> None:
    """What ONNX Runtime will run, as it writes it: one node of ours, or none."""
    shape = Shape(16, (9, 8), (3, 0 if name == GAPPED_BRANCH else 2))
    if name == ROUTED_BRANCH:
        write_routed(file, shape, RoutingConfig())
    elif name == SWIGLU:
        write_call(file, make_swiglu(), {"x": np.zeros((1, 1, 16), np.float32)})
    else:
        write_pinned(file, shape, gain=np.ones(shape.width, np.float32) if name == BRANCH_NORM else None)
    for operators in BOTH:
        optimized = file.with_name("optimized.onnx")
        load(file, operators, optimized=optimized)
        ours = {kind for kind in find_operators(optimized) if kind.startswith(LIME)}
        assert ours == ({f"{LIME}.{name}"} if operators else set()), f"operators {operators}"


@pytest.mark.parametrize(
    "shape",
    [
        Shape(9, (13, 8), (600, 600)),
        Shape(9, (13, 8, 5), (600, 0, 600), half=True),
    ],
    ids=str,
)
def test_more_ranks_than_the_operator_takes(shape: Shape, file: Path) -> None:
    name = GAPPED_BRANCH if 0 in shape.ranks else EXPERT_BRANCH
    model = write_pinned(file, shape)
    feeds = draw_inputs(shape, (1, 3), model.sites.total)
    check_large(file, compute_pinned(model, shape, feeds), feeds, name)
    if name == EXPERT_BRANCH:
        gain = np.ones(shape.width, np.float32)
        total = compute_pinned(write_pinned(file, shape, gain=gain), shape, feeds) + torch.from_numpy(feeds["stream"])
        check_large(file, torch.nn.functional.rms_norm(total, (shape.width,), eps=EPSILON), feeds, BRANCH_NORM)


def test_more_experts_than_the_operator_takes(file: Path) -> None:
    shape, config = Shape(9, (260,), (3,), experts=257), RoutingConfig(sparse_mode=True)
    model, feeds = write_routed(file, shape, config), draw_inputs(shape, (1, 3))
    check_large(file, compute_routed(model, shape, config, feeds), feeds, ROUTED_BRANCH)


def check_large(file: Path, wanted: torch.Tensor, feeds: Arrays, name: str) -> None:
    """The function's name is none of the operators', which are registered, and its nodes run."""
    assert f"{LIME}.{onnx_functions.LARGE}{name}" in find_operators(file)
    session = load(file, True, optimized=file.with_name("optimized.onnx"))
    assert not [kind for kind in find_operators(file.with_name("optimized.onnx")) if kind.startswith(LIME)]
    assert_equal(run(session, feeds)[0], wanted, name)


# graphs that are not ours


def zeros(*size: int, kind: type = np.float32) -> np.ndarray:
    return np.zeros(size, kind)


BRANCH = {"x": zeros(1, 2, 16), "y": zeros(1, 2, 24), "a": zeros(16, 8), "b": zeros(8, 24), "expert": zeros(1, 1, 24)}
NORM = BRANCH | {"stream": zeros(1, 2, 24), "gain": zeros(24)}
GAPPED = BRANCH | {"places": zeros(24, kind=np.int64)}
ROUTED = BRANCH | {
    "expert": zeros(4, 24),
    "recovery": zeros(4),
    "columns": zeros(4, kind=np.int64),
    "read": zeros(12, 8),
}
FACTS: dict[str, Any] = {"widths": [24], "ranks": [4], "offsets": [0], "start": [0], "end": [24]}
ROUTING: dict[str, Any] = {
    "widths": [24],
    "ranks": [4],
    "experts": 4,
    "selection": 3,
    "top_k": 2,
    "n_gram": 1,
    "frozen_share": 0.5,
    "adapted_share": 0.5,
    "threshold": 0.5,
    "heat": 0.5,
}
GROUP = "a \\(K, R\\) and b \\(R, N\\) do not fit each other"
ROW = "x \\(B, S, K\\) and y \\(B, S, N\\) do not fit"
KIND, RANK, LENGTH = "must both be float32 or both be float16", "rank of a must be a multiple of 8", "differ in length"
ROWS = "the expert must have one row, or one for each row of y"
EXPERT, STREAM = "the expert is shorter", "stream \\(B, S, N\\) and gain \\(N,\\) do not fit"
COUNT, BANK, SITE = "1 to 256 experts, top_k of them", "bank \\(G E, N\\) and recovery", "a site has fewer"
LIMITS, FLOAT, DIMENSIONS = "a width outside", "a float32 tensor is expected", "1 to 8 dimensions"
PINNED_FAULTS: list[tuple[dict[str, np.ndarray], dict[str, Any], str]] = [
    ({"b": zeros(16, 24)}, {}, GROUP),
    ({"a": zeros(16, 16)}, {}, GROUP),
    ({"b": zeros(8, 23)}, {}, GROUP),
    ({"a": zeros(8)}, {}, GROUP),
    ({"b": zeros(1, 8, 24)}, {}, GROUP),
    ({"a": zeros(17, 8)}, {}, ROW),
    ({"a": zeros(16, 8, kind=np.float64), "b": zeros(8, 24, kind=np.float64)}, {}, KIND),
    ({"a": zeros(16, 8, kind=np.int32)}, {}, KIND),
    ({"b": zeros(8, 24, kind=np.float16)}, {}, KIND),
    ({"a": zeros(16, 4), "b": zeros(4, 24)}, {}, RANK),
    ({"a": zeros(16, 1032), "b": zeros(1032, 24)}, {}, RANK),
    ({}, {"ranks": [9]}, RANK),
    ({"x": zeros(1, 3, 16)}, {}, ROW),
    ({"x": zeros(1, 2, 15)}, {}, ROW),
    ({"y": zeros(1, 2, 23)}, {}, "attribute widths"),
    ({"y": zeros()}, {}, DIMENSIONS),
    ({"y": zeros(1, 1, 1, 1, 1, 1, 1, 2, 24)}, {}, DIMENSIONS),
    ({"y": zeros(2, 24)}, {}, "attribute widths"),
    ({"y": zeros(1, 1, 2, 24)}, {}, "attribute widths"),
    ({"x": zeros(2, 1, 16)}, {}, ROW),
    ({"x": zeros(2, 16)}, {}, ROW),
    ({"x": zeros(0, 2, 16)}, {}, ROW),
    ({"a": zeros(0, 8), "x": zeros(1, 0, 2)}, {}, ROW),
    ({"expert": zeros(1, 1, 23)}, {}, EXPERT),
    ({"expert": zeros(1, 1, 0)}, {}, EXPERT),
    ({"expert": zeros(24)}, {}, ROWS),
    ({"expert": zeros(1, 24)}, {}, ROWS),
    ({"expert": zeros(0, 1, 24)}, {}, ROWS),
    ({"expert": zeros(1, 0, 24)}, {}, ROWS),
    ({"expert": zeros(1, 2, 24)}, {}, ROWS),
    ({"expert": zeros(2, 1, 24)}, {}, ROWS),
    ({}, {"offsets": [1]}, EXPERT),
    ({}, {"offsets": [2**63 - 8]}, EXPERT),
    ({}, {"offsets": [-1]}, "offset below 0"),
    ({}, {"widths": [23]}, "attribute widths"),
    ({}, {"widths": [12, 12]}, LENGTH),
    ({}, {"ranks": [2, 2]}, LENGTH),
    ({}, {"offsets": [0, 0]}, LENGTH),
    ({}, {"widths": [0]}, LIMITS),
    ({}, {"ranks": [-1]}, LIMITS),
    ({}, {"widths": [4, 4, 8, 8], "ranks": [2**62] * 4, "offsets": [0] * 4}, LIMITS),
    ({}, {"widths": [2**63 - 1, 2**63 - 1, 26], "ranks": [0, 0, 4], "offsets": [0] * 3}, LIMITS),
    ({}, {"widths": [3] * 9, "ranks": [1] * 9, "offsets": [0] * 9}, "buffer is not large enough"),
]
ROUTED_FAULTS: list[tuple[dict[str, np.ndarray], dict[str, Any], str]] = [
    ({}, {"top_k": 5}, COUNT),
    ({}, {"top_k": 0}, COUNT),
    ({}, {"experts": 257}, COUNT),
    ({}, {"experts": 0}, COUNT),
    ({}, {"n_gram": 0}, COUNT),
    ({}, {"experts": 25}, SITE),
    ({}, {"experts": 5}, BANK),
    ({"expert": zeros(4, 23)}, {}, BANK),
    ({"expert": zeros(96)}, {}, BANK),
    ({"expert": zeros(0, 24)}, {}, BANK),
    ({"recovery": zeros(0, 4)}, {}, BANK),
    ({"recovery": zeros(1, 4)}, {}, BANK),
    ({"recovery": zeros(3)}, {}, BANK),
    ({"recovery": zeros(4, kind=np.float64)}, {}, FLOAT),
    ({"a": zeros(16, 8, kind=np.int8)}, {}, KIND),
    ({}, {"ranks": [2, 2]}, LENGTH),
]


def refuse(
    file: Path, function: onnx.FunctionProto, inputs: Arrays, message: str, outputs: int = 1, **facts: Any
) -> None:
    """Loading or running raises, with the operator's words."""
    write_call(file, function, inputs, outputs, **facts)
    with pytest.raises(Exception, match=message):  # onnxruntime's exceptions share no public base
        load(file, True).run(None, inputs)


def make_routed(config: RoutingConfig, experts: int) -> onnx.FunctionProto:
    return make_routed_branch(ROUTED_BRANCH, plan_routing(config, experts))


def test_what_would_be_refused_otherwise_runs(file: Path) -> None:
    """The calls that the faults below are made in are themselves good."""
    for function, inputs, outputs, facts in (
        (make_branch(EXPERT_BRANCH), BRANCH, 1, FACTS),
        (make_gapped_branch(GAPPED_BRANCH), GAPPED, 1, FACTS),
        (make_branch_norm(BRANCH_NORM), NORM, 2, FACTS | {"epsilon": EPSILON}),
        (make_routed(RoutingConfig(), 4), ROUTED, 1, ROUTING),
        (make_swiglu(), {"x": zeros(1, 2, 6)}, 1, {}),
    ):
        write_call(file, function, inputs, outputs, **facts)
        assert not np.any(load(file, True).run(None, dict(inputs))[0]), function.name


@pytest.mark.parametrize("name", [EXPERT_BRANCH, GAPPED_BRANCH, BRANCH_NORM])
def test_malformed_branches_are_refused(name: str, file: Path) -> None:
    function, inputs, outputs = {
        EXPERT_BRANCH: (make_branch(name), BRANCH, 1),
        GAPPED_BRANCH: (make_gapped_branch(name), GAPPED, 1),
        BRANCH_NORM: (make_branch_norm(name), NORM, 2),
    }[name]
    epsilon = {"epsilon": EPSILON} if name == BRANCH_NORM else {}
    for arrays, changes, message in PINNED_FAULTS:
        refuse(file, function, {**inputs, **arrays}, message, outputs, **FACTS | epsilon | changes)


def test_malformed_norms_gates_and_routings_are_refused(file: Path) -> None:
    for arrays, message in (
        ({"stream": zeros(1, 3, 24)}, STREAM),
        ({"stream": zeros(1, 2, 23)}, STREAM),
        ({"stream": zeros(2, 1, 24)}, STREAM),
        ({"stream": zeros(2, 24)}, STREAM),
        ({"gain": zeros(23)}, STREAM),
        ({"gain": zeros(0, 24)}, STREAM),
        ({"gain": zeros(1, 24)}, STREAM),
        ({"gain": zeros(24, kind=np.float64)}, FLOAT),
    ):
        refuse(file, make_branch_norm(BRANCH_NORM), NORM | arrays, message, 2, **FACTS, epsilon=EPSILON)
    refuse(file, make_swiglu(), {"x": zeros(1, 2, 17)}, "which is odd")
    refuse(file, make_swiglu(), {"x": zeros()}, DIMENSIONS)
    for arrays, changes, message in ROUTED_FAULTS:
        refuse(file, make_routed(RoutingConfig(), 4), ROUTED | arrays, message, **ROUTING | changes)


@pytest.mark.parametrize(
    "change",
    [
        {"expert": zeros(1, 1, 3)},
        {"expert": zeros(0, 1, 24)},
        {"x": zeros(1, 1, 16)},
        {"a": zeros(16, 0), "b": zeros(0, 24)},
        {"a": zeros(9999, 8), "x": zeros(1, 3, 16), "y": zeros(1, 3, 24)},
    ],
    ids=str,
)
def test_tensors_that_shrink_between_calls_are_refused(change: Arrays, file: Path) -> None:
    """Every shape is asked for at every call."""
    write_call(file, make_branch(EXPERT_BRANCH), BRANCH, **FACTS)
    session = load(file, True)
    for inputs, good in ((BRANCH, True), ({**BRANCH, **change}, False), (BRANCH, True)):
        if good:
            assert not session.run(None, inputs)[0].any()
        else:
            with pytest.raises(Exception, match="lime_edge: "):
                session.run(None, inputs)


# what C and Python both say


def read_entries(file: str) -> set[tuple[str, int, int]]:
    """Names, numbers of inputs and of outputs that a library registers."""
    found = re.findall(r'^    \{"(\w+)", (\d+), (\d+), ', (SOURCES / file).read_text(), re.M)
    return {(name, int(inputs), int(outputs)) for name, inputs, outputs in found}


def read_numbers() -> dict[str, int]:
    """NAME = number of every enum in operators.h."""
    return {name: int(value) for name, value in re.findall(r"([A-Z_]+) = (\d+)", (SOURCES / "operators.h").read_text())}


def test_names_and_limits_are_the_same_in_c() -> None:
    functions = [
        make_branch(EXPERT_BRANCH),
        make_gapped_branch(GAPPED_BRANCH),
        make_branch_norm(BRANCH_NORM),
        make_routed(RoutingConfig(n_gram=2), 4),
        make_swiglu(),
    ]
    wanted = {(f.name, len(f.input), len(f.output)) for f in functions}
    assert read_entries("operators.c") == wanted
    half = {(f"Half{name}", inputs, outputs) for name, inputs, outputs in wanted if name != ROUTED_BRANCH}
    assert read_entries("cuda/operators.c") == half, "the GPU has no operator for routing"
    assert {name for name, *_ in half} == onnx_decoder.REPLACED_ON_GPU
    assert {function.domain for function in functions} == {LIME}
    assert f'ORT_CREATE_DOMAIN(api)("{LIME}"' in (SOURCES / "registration.c").read_text()
    numbers = read_numbers()
    for name in ("MOST_RANK", "MOST_EXPERTS", "SPARSE_AUTO_TOPK", "HARD_TOPK", "AUTO_TOPK", "SOFT_TOPK"):
        assert numbers.pop(name) == getattr(onnx_experts, name), name
    assert numbers == {"MOST_PARTS": 8, "ROWS_AT_ONCE": 4}, "a number in operators.h that nothing compares"


# whole bundles


@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("name", BUNDLES)
def test_bundle_computes_the_same_with_and_without(
    name: str, quant: str, monkeypatch: pytest.MonkeyPatch, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """A prompt, then greedy tokens. int4 products round their activations to int8, where a last digit may decide, so
    only their spread is held; with float32 activations test_quantized_logits_equal_the_oracle holds every logit."""
    model = tiny_model("llama", hidden_size=72, intermediate_size=100, head_dim=16)
    bundle = tiny_bundle(model, tiny_adapter(model, **BUNDLES[name]), quant=quant)
    monkeypatch.delenv("LIME_EDGE_OPERATORS", raising=False)
    ours = lime_edge.open_decoder(bundle, threads=2)
    monkeypatch.setenv("LIME_EDGE_OPERATORS", "0")
    plain = lime_edge.open_decoder(bundle, threads=2)
    ids = draw_ids(PROMPT, seed=4)[0].tolist()
    for selection in ("expert1", BLEND, None, *(["routed"] if name.startswith("routed") else [])):
        rows = []
        for session in (ours, plain):
            monkeypatch.setenv("LIME_EDGE_OPERATORS", "01"[session is ours])
            session.use(selection)  # the first use of "routed" loads its graph
            rows.append(session.logits(ids).copy())
        if quant == "int4":
            drift = (rows[0] - rows[1]).std() / rows[1].std()
            assert drift < 0.03, f"{name}, {selection}: logits drift by {drift:.3g}"
            continue
        off = np.abs(rows[0] - rows[1]) / (1 + np.abs(rows[1]))
        assert off.max() < 1e-4, f"{name}, {selection}: row {off.max(axis=1).argmax()} is off by {off.max():.3g}"
        options = GenerationOptions(NEW, ignore_eos=True)
        tokens = [list(session.generate_ids(ids, options)) for session in (ours, plain)]
        assert tokens[0] == tokens[1], f"{name}, {selection}: other tokens"


@pytest.mark.parametrize("switch", ["1", "0"])
def test_environment_leaves_the_operators_out(
    switch: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Make,
    tiny_adapter: Make,
    tiny_bundle: Make,
) -> None:
    """What ONNX Runtime made of a bundle's two graphs, written by itself."""
    make = ort.SessionOptions
    written: list[Path] = []

    def record() -> ort.SessionOptions:
        options = make()
        written.append(tmp_path / f"{len(written)}.onnx")
        options.optimized_model_filepath = str(written[-1])
        return options

    monkeypatch.setattr(ort, "SessionOptions", record)
    monkeypatch.setenv("LIME_EDGE_OPERATORS", switch)
    model = tiny_model("llama", hidden_size=72, intermediate_size=100, head_dim=16)
    session = lime_edge.open_decoder(tiny_bundle(model, tiny_adapter(model, **BUNDLES["routed"])), threads=1)
    session.use("routed")
    pinned, routed = ({kind for kind in find_operators(file) if kind.startswith(LIME)} for file in written)
    every = {f"{LIME}.{name}" for name in (EXPERT_BRANCH, BRANCH_NORM, SWIGLU)}
    assert pinned == (every if switch == "1" else set())
    assert routed == ({f"{LIME}.{ROUTED_BRANCH}", f"{LIME}.{SWIGLU}"} if switch == "1" else set())


# without the library


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Nothing is remembered about the library, before and after."""
    onnx_operators.find_library.cache_clear()
    yield
    onnx_operators.find_library.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_nothing_built(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Make) -> None:
    wanted = lime_edge.open_decoder(tiny_bundle(), threads=1).logits([5, 6, 7])
    monkeypatch.setattr(onnx_operators, "EXTENSION_SUFFIXES", [".nothing"])
    onnx_operators.find_library.cache_clear()
    assert onnx_operators.find_library() is None
    assert "no C compiler" in onnx_operators.explain_absence()
    session = lime_edge.open_decoder(tiny_bundle(), threads=1)
    assert session.operators is False
    assert np.abs(session.logits([5, 6, 7]) - wanted).max() < 1e-4


@pytest.mark.usefixtures("forgetful")
def test_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(lime_edge_supported=lambda: 0)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: old)
    assert onnx_operators.find_library() is None
    assert "AVX2" in onnx_operators.explain_absence()


@pytest.mark.usefixtures("forgetful")
def test_a_library_of_another_time_or_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the symbol that is asked for, or not to be loaded at all."""
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace())
    assert onnx_operators.find_library() is None and "not usable" in onnx_operators.explain_absence()


def test_a_graph_without_functions_has_no_operators(tiny_bundle: Make, tmp_path: Path) -> None:
    """As a bundle of before has none: the session does not claim what does not run."""
    assert lime_edge.open_decoder(tiny_bundle(), threads=1).operators is True
    old = tmp_path / "old.lime"
    shutil.copytree(tiny_bundle(), old)
    calls = Bundle.open(old).manifest.facts_of(OnnxFacts).functions
    assert calls == ("ExpertRowsBranch", "ExpertRowsBranchNorm", "SwiGLU")
    reseal(old, lambda body: body["targets"][0].update(functions=[]))
    assert lime_edge.open_decoder(old, threads=1).operators is False
