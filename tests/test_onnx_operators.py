"""The operators compiled for this machine: each against its function's own nodes and against torch, call by call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_graphs import (
    EPSILON,
    TOLERANCE,
    Shape,
    assert_equal,
    compute_pinned,
    compute_routed,
    describe,
    draw_inputs,
    load,
    run,
    write_call,
    write_pinned,
    write_routed,
)

from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.exporters.onnx.functions import BRANCH_NORM, make_branch_norm, make_swiglu
from lime_edge.runtimes.onnx import operators as onnx_operators

ROWS = (
    (1, 1),
    (1, 8),
    (2, 1),
    (1, 9),
    (3, 11),
    (13, 1),
    (1, 0),
    (0, 1),
    (1, 1),
)  # in one session, one after the other: shapes change
SHAPES = {
    "one vector": Shape(64, (64,), (8,)),
    "float16": Shape(64, (64,), (8,), half=True),
    "odd everything": Shape(37, (19,), (3,)),
    "odd everything, float16": Shape(37, (19,), (3,), half=True),
    "narrow": Shape(1, (1,), (1,)),
    "two vectors": Shape(66, (40, 24), (8, 8)),
    "three vectors": Shape(65, (33, 9, 7), (8, 8, 8), half=True),
    "uneven ranks": Shape(31, (17, 8, 23), (1, 12, 6)),
    "many ranks": Shape(35, (24, 10), (20, 13)),
    "many ranks, float16": Shape(39, (24, 10), (32, 1), half=True),
    "most ranks": Shape(9, (13,), (1024,)),
    "eight members": Shape(16, (3, 8, 5, 16, 1, 9, 24, 2), (1, 2, 3, 4, 5, 6, 7, 8)),
}
GAPS = {
    "q and v": Shape(64, (64, 32, 32), (4, 0, 4)),
    "first is none": Shape(33, (7, 19), (0, 5), half=True),
    "last is none": Shape(33, (19, 7), (40, 0)),
    "most are none": Shape(16, (9, 8, 7, 11), (0, 0, 3, 0)),
}
SELECTIONS = {
    "soft": RoutingConfig(),
    "soft, gamma 0": RoutingConfig(gamma_routing=0.0, soft_topk_temperature=0.05),
    "soft, gamma 1": RoutingConfig(gamma_routing=1.0, temperature=0.3, top_k=3),
    "auto": RoutingConfig(auto_topk=True, soft_topk_temperature=0.1),
    "hard": RoutingConfig(soft_topk=False),
    "top 1": RoutingConfig(sparse_mode=True, top_k=1),
    "sparse": RoutingConfig(sparse_mode=True, top_k=3),
    "sparse auto": RoutingConfig(sparse_mode=True, auto_topk=True, top_k=2, auto_topk_threshold=0.8, temperature=0.2),
    "windows": RoutingConfig(n_gram=3),
    "sparse windows": RoutingConfig(sparse_mode=True, n_gram=4, temperature=0.5),
    "wide windows": RoutingConfig(n_gram=100, auto_topk=True, gamma_routing=0.3),
}
BOTH = (True, False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def test_library_is_built_with_this_installation() -> None:
    """Without it everything below would compare the functions with themselves."""
    found = onnx_operators.find_library()
    assert found is not None and found.is_file(), "build it: pip install -e . with a C compiler at hand"


# against the functions' own nodes, and against torch


def check_pinned(file: Path, shape: Shape, what: str, threads: int = 1) -> None:
    """All of ROWS, with one expert for all and with one for each, with the operators and without them."""
    model = write_pinned(file, shape)
    for operators in BOTH:
        session = load(file, operators, threads)
        for seed, (rows, mixed) in enumerate(product(ROWS, BOTH)):
            feeds = draw_inputs(shape, rows, model.sites.total, seed, rows[0] if mixed else 1)
            wanted = compute_pinned(model, shape, feeds)
            assert_equal(run(session, feeds)[0], wanted, f"{what}, {rows}, mixed {mixed}, operators {operators}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [*SHAPES, *GAPS])
def test_branch(name: str, threads: int, file: Path) -> None:
    check_pinned(file, (SHAPES | GAPS)[name], name, threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_branch_and_norm(name: str, threads: int, file: Path) -> None:
    shape = SHAPES[name]
    gain = np.linspace(0.5, 1.5, shape.width, dtype=np.float32)
    model = write_pinned(file, shape, gain=gain)
    for operators in BOTH:
        session = load(file, operators, threads)
        for seed, (rows, mixed) in enumerate(product(ROWS, BOTH)):
            feeds = draw_inputs(shape, rows, model.sites.total, seed, rows[0] if mixed else 1)
            total = compute_pinned(model, shape, feeds) + torch.from_numpy(feeds["stream"]).double()
            wanted = torch.nn.functional.rms_norm(total, (shape.width,), torch.from_numpy(gain).double(), EPSILON)
            normalised, summed = run(session, feeds)
            assert_equal(summed, total, f"{name}, {rows}, operators {operators}, the sum")
            assert_equal(normalised, wanted, f"{name}, {rows}, operators {operators}")


members = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=4).filter(
    lambda parts: any(rank for _, rank in parts)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(inputs=st.integers(1, 50), parts=members, half=st.booleans())
def test_any_branch(
    inputs: int, parts: list[tuple[int, int]], half: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    widths, ranks = (tuple(part[index] for part in parts) for index in (0, 1))
    shape = Shape(inputs, widths, ranks, half)
    check_pinned(tmp_path_factory.mktemp("any") / "model.onnx", shape, str(shape))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SELECTIONS)
def test_routed_branch(name: str, threads: int, file: Path) -> None:
    """The scales are those of the whole call: rows and batches must not be routed one by one."""
    config, shape = SELECTIONS[name], Shape(33, (17, 20, 9), (3, 0, 5), experts=6)
    model = write_routed(file, shape, config)
    for operators in BOTH:
        session = load(file, operators, threads)
        for seed, rows in enumerate(rows for rows in ROWS if all(rows)):
            feeds = draw_inputs(shape, rows, seed=seed)
            wanted = compute_routed(model, shape, config, feeds)
            assert_equal(run(session, feeds)[0], wanted, f"{name}, {rows}, operators {operators}")


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(16, (8,), (4,), experts=8),
        Shape(16, (9, 300), (40, 2), experts=9, half=True),
        Shape(16, (12, 13, 14), (8, 8, 8), experts=12, half=True),
        Shape(16, (2,), (2,), experts=2),
        Shape(16, (256,), (5,), experts=256),
        Shape(16, (17,), (30,), experts=17),
    ],
    ids=str,
)
def test_routed_shapes(shape: Shape, variant: str, file: Path) -> None:
    """Numbers of experts that are no multiple of 8, the most there may be, and top_k of all of them."""
    for config in (RoutingConfig(), RoutingConfig(sparse_mode=True, top_k=shape.experts)):
        model = write_routed(file, shape, config, variant=variant)
        feeds = draw_inputs(shape, (2, 13))
        wanted = compute_routed(model, shape, config, feeds)
        for operators in BOTH:
            found = run(load(file, operators, 2), feeds)[0]
            assert_equal(found, wanted, f"{shape}, {variant}, {config}, operators {operators}")


def test_routing_of_an_empty_call(file: Path) -> None:
    shape = Shape(33, (17,), (3,))
    write_routed(file, shape, RoutingConfig())
    feeds = draw_inputs(shape, (1, 0))
    assert run(load(file, True), feeds)[0].shape == (1, 0, 17)


@pytest.mark.parametrize("width", [1, 7, 8, 96, 101])
def test_gate(width: int, file: Path) -> None:
    """silu(left) * right."""
    x = np.random.default_rng(width).standard_normal((2, 11, 2 * width), np.float32)
    write_call(file, make_swiglu(), {"x": x})
    for operators in BOTH:
        session = load(file, operators, 2)
        for piece in (x, x[:1, :1], x[:, :0]):
            left, right = torch.from_numpy(piece).double().chunk(2, dim=-1)
            wanted = torch.nn.functional.silu(left) * right
            assert_equal(session.run(None, {"x": piece})[0], wanted, f"{piece.shape}, operators {operators}")


def test_gate_of_every_magnitude(file: Path) -> None:
    """Each value by itself, past where e^x is the largest float32 (88.7); ONNX Runtime's own is flat beyond 18."""
    left = np.linspace(-200, 200, 4003, dtype=np.float32)
    x = np.concatenate([left, np.ones_like(left)])[None, None]
    write_call(file, make_swiglu(), {"x": x})
    found = load(file, True).run(None, {"x": x})[0][0, 0]
    wanted = torch.nn.functional.silu(torch.from_numpy(left).double()).numpy()
    off = np.abs(found - wanted) / (np.abs(wanted) + 1e-30)
    assert off.max() < TOLERANCE, f"silu({left[off.argmax()]}) is {found[off.argmax()]}, off by {off.max():.3g} of it"


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
def test_residual_has_the_same_bits_as_numpys(count: int) -> None:
    """From the first value on and from the second: nothing is aligned; every kind of float16 is there."""
    subtract = onnx_operators.find_subtract()
    assert subtract is not None
    random = np.random.default_rng(count)
    stored = random.integers(0, 2**16, count + 1, np.uint16).view(np.float16)
    reference = random.standard_normal(count + 1, np.float32)
    for start in (0, 1):
        vector, base = stored[start : start + count], reference[start : start + count]
        found = np.full(count + 2, 7, np.float32)
        subtract(vector, base, found[1:-1])
        with np.errstate(invalid="ignore"):  # some are signalling NaNs
            wanted = np.concatenate([[7], vector.astype(np.float32) - base, [7]])
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [*SHAPES, *GAPS])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(name: str, threads: int, file: Path) -> None:
    """Whatever is computed beside it, and with whichever expert: batches of 2 to 13 rows, and a prompt of 13 tokens."""
    shape = (SHAPES | GAPS)[name]
    gain = None if name in GAPS else np.linspace(0.5, 1.5, shape.width, dtype=np.float32)
    model = write_pinned(file, shape, gain=gain)
    session = load(file, True, threads)
    for rows in ((2, 1), (3, 1), (4, 1), (7, 1), (13, 1), (1, 13)):
        feeds = draw_inputs(shape, rows, model.sites.total, 3, rows[0])
        together = run(session, feeds)[0].reshape(-1, shape.width)
        flat = {key: value.reshape(-1, 1, value.shape[-1]) for key, value in feeds.items() if key != "expert"}
        for row in range(len(together)):
            own = {key: value[row : row + 1] for key, value in flat.items()}
            alone = run(session, own | {"expert": feeds["expert"][row % rows[0] : row % rows[0] + 1]})[0]
            assert np.array_equal(alone[0, 0], together[row]), f"{name}, {rows}, row {row}"


# memory: what may be overwritten, who else is there, numbers that are none


@pytest.mark.parametrize("gapped", BOTH)
def test_y_that_is_read_elsewhere_is_not_overwritten(gapped: bool, file: Path) -> None:
    shape = Shape(37, (19, 8), (3, 0) if gapped else (3, 2))
    model = write_pinned(file, shape, keep=True)
    feeds = draw_inputs(shape, (2, 11), model.sites.total)
    found, y = run(load(file, True, 2), feeds)
    assert_equal(found, compute_pinned(model, shape, feeds), "the branch")
    assert np.array_equal(y, feeds["y"])


def test_one_tensor_as_several_inputs(file: Path) -> None:
    """x, y and stream are one tensor, made in the graph: nothing of it may be overwritten before it is read."""
    shape = Shape(24, (24,), (8,))
    random = np.random.default_rng(0)
    arrays = {"x": (2, 11, 24), "a": (24, 8), "b": (8, 24), "expert": (1, 1, 24), "gain": (24,)}
    feeds = {name: random.standard_normal(size, np.float32) for name, size in arrays.items()}
    stand_in = feeds | {"y": feeds["x"], "stream": feeds["x"]}
    order = ["x", "y", "a", "b", "expert", "stream", "gain"]
    write_call(
        file,
        make_branch_norm(BRANCH_NORM),
        {name: stand_in[name] for name in order},
        2,
        epsilon=EPSILON,
        **describe(shape),
    )
    model = onnx.load(file)
    call = model.graph.node[0]
    call.input[0] = call.input[1] = call.input[5] = "made"
    model.graph.node.insert(0, onnx.helper.make_node("Neg", ["x"], ["made"]))
    kept = [value for value in model.graph.input if value.name in feeds]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.save(model, file)
    plain, ours = (load(file, operators, 2).run(None, feeds) for operators in (False, True))
    for found, wanted in zip(ours, plain, strict=True):
        assert_equal(found, wanted, "one tensor three times")


def test_several_threads_in_one_session(file: Path) -> None:
    """Calls of different shapes at once, with different experts: each gets its own answer."""
    shape = Shape(37, (19, 30), (3, 5))
    model = write_pinned(file, shape)
    session = load(file, True, 2)
    calls = [draw_inputs(shape, (1 + seed % 2, 1 + 4 * (seed % 5)), model.sites.total, seed) for seed in range(20)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for found, feeds in zip(pool.map(lambda feeds: run(session, feeds)[0], calls), calls, strict=True):
                assert_equal(found, compute_pinned(model, shape, feeds), f"{feeds['x'].shape}")


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38, -3e38])
@pytest.mark.parametrize("name", [*SELECTIONS, "pinned", "norm"])
def test_numbers_that_are_none_stay_in_their_row(name: str, poison: float, file: Path) -> None:
    """No crash, and other rows are as they were; routing's scales are of the whole call, so there only no crash."""
    shape = Shape(33, (17, 9), (3, 5), experts=6)
    if name in SELECTIONS:
        write_routed(file, shape, SELECTIONS[name])
        feeds = draw_inputs(shape, (1, 12))
    else:
        gain = np.ones(shape.width, np.float32) if name == "norm" else None
        feeds = draw_inputs(shape, (1, 12), write_pinned(file, shape, gain=gain).sites.total)
    session = load(file, True, 2)
    whole = run(session, feeds)
    for key in ("x", "y"):
        sick = {**feeds, key: feeds[key].copy()}
        sick[key][0, 3, 1::2] = poison
        for found, wanted in zip(run(session, sick), whole, strict=True):
            assert found.shape == wanted.shape
            if name not in SELECTIONS:
                rest = np.arange(12) != 3
                assert np.array_equal(found[:, rest], wanted[:, rest]), f"{name}, {poison} in {key} reached other rows"
