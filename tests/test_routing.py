"""Routing against a plain-Python restatement, one token at a time, and against its own definition."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lime_edge.compiler.maths import routing
from lime_edge.compiler.maths.route import TensorOperations, find_anchors, measure_logits, route
from lime_edge.compiler.maths.routing import (
    Gate,
    Keep,
    Rank,
    RoutingConfig,
    Selection,
    Share,
    Take,
    choose_selection,
    plan_routing,
    select,
)
from lime_edge.errors import LimeEdgeError

Call = tuple[torch.Tensor, torch.Tensor | None, RoutingConfig]  # frozen, delta, config


def configs(experts: int) -> st.SearchStrategy[RoutingConfig]:
    return st.builds(
        RoutingConfig,
        top_k=st.integers(1, experts),
        temperature=st.floats(0.1, 2),
        soft_topk=st.booleans(),
        gamma_routing=st.floats(0, 1),
        n_gram=st.integers(1, 5),
        soft_topk_temperature=st.floats(0.1, 1),
        auto_topk=st.booleans(),
        auto_topk_threshold=st.floats(0.1, 1),
        sparse_mode=st.booleans(),
    )


@st.composite
def calls(draw: st.DrawFn) -> Call:
    batch, tokens, experts = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 6))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    frozen, delta = (torch.randn(batch, tokens, experts, generator=random) for _ in range(2))
    return frozen, delta if draw(st.booleans()) else None, draw(configs(experts))


def weigh_token(probs: list[float], config: RoutingConfig) -> list[float]:
    """The selections, restated on one token's softmax weights."""
    ranked = sorted(probs, reverse=True)
    best = ranked[0]
    if config.sparse_mode and config.auto_topk:
        kept = ranked[: min(2 * config.top_k, len(probs))]
        weights = [w if w in kept and w >= config.auto_topk_threshold * best else 0.0 for w in probs]
    elif config.sparse_mode or not (config.auto_topk or config.soft_topk):
        weights = [w if w in ranked[: config.top_k] else 0.0 for w in probs]
    else:
        threshold = config.auto_topk_threshold * best if config.auto_topk else ranked[config.top_k - 1]
        weights = [w / (1 + math.exp(-(w - threshold) / config.soft_topk_temperature)) for w in probs]
    return [w / sum(weights) for w in weights]


def route_plainly(frozen: torch.Tensor, delta: torch.Tensor | None, config: RoutingConfig) -> torch.Tensor:
    """Routing restated with loops: windows, scales over the window ends, softmax, selection."""
    batch, tokens, experts = frozen.shape
    ends = [min((t // config.n_gram + 1) * config.n_gram, tokens) - 1 for t in range(tokens)]
    seen = sorted(set(ends))
    h_scale = frozen[:, seen].abs().max().item()
    d_scale = 1.0 if delta is None else delta[:, seen].abs().max().item()
    gamma = 0.0 if delta is None else config.gamma_routing
    out = torch.zeros(batch, tokens, experts, dtype=torch.float64)
    for b in range(batch):
        for t, end in enumerate(ends):
            logits = [
                (1 - gamma) * frozen[b, end, e].item() / h_scale
                + (gamma * delta[b, end, e].item() / d_scale if delta is not None else 0.0)
                for e in range(experts)
            ]
            powers = [math.exp((x - max(logits)) / config.temperature) for x in logits]
            weights = weigh_token([x / sum(powers) for x in powers], config)
            out[b, t] = torch.tensor(weights, dtype=torch.float64)
    return out


@settings(max_examples=150, deadline=None)
@given(calls())
def test_route_equals_restatement(call: Call) -> None:
    frozen, delta, config = call
    frozen = frozen.double()
    delta = None if delta is None else delta.double()
    found, expected = route(frozen, delta, config), route_plainly(frozen, delta, config)
    error = (found - expected).abs().max().item()
    # near a tie of the sparse threshold a rounding decides; draws never get that close
    assert error < 1e-6, f"{config}: worst weight off by {error:.3g}"


@settings(max_examples=60, deadline=None)
@given(calls(), st.integers(1, 6))
def test_padding_on_the_right_changes_nothing(call: Call, padding: int) -> None:
    frozen, delta, config = call
    tokens = frozen.shape[1]
    noise = 100 * torch.ones(frozen.shape[0], padding, frozen.shape[2])
    padded = route(
        torch.cat([frozen, noise], 1),
        None if delta is None else torch.cat([delta, noise], 1),
        config,
        torch.tensor(tokens),
    )
    expected = route(frozen, delta, config)
    assert torch.allclose(padded[:, :tokens], expected, atol=1e-6), config


def test_a_whole_prompt_and_its_tokens_route_differently() -> None:
    """The scale spans a call, so chunking must change the weights: a fixed scale would not."""
    torch.manual_seed(0)
    frozen, delta, config = torch.randn(1, 6, 4), torch.randn(1, 6, 4), RoutingConfig()
    whole = route(frozen, delta, config)
    single = torch.cat([route(frozen[:, t : t + 1], delta[:, t : t + 1], config) for t in range(6)], dim=1)
    assert (whole - single).abs().max() > 0.01


def test_scale_is_one_number_for_the_call() -> None:
    logits = measure_logits((torch.tensor([[[1.0, -4.0]], [[2.0, 0.0]]]),), (1.0,))
    assert logits.tolist() == [[[0.25, -1.0]], [[0.5, 0.0]]]


@pytest.mark.parametrize(
    "tokens, n_gram, expected", [(6, 2, [1, 1, 3, 3, 5, 5]), (7, 3, [2, 2, 2, 5, 5, 5, 6]), (1, 3, [0]), (2, 5, [1, 1])]
)
def test_anchors(tokens: int, n_gram: int, expected: list[int]) -> None:
    assert find_anchors(tokens, n_gram, None, torch.device("cpu")).tolist() == expected


def select_from(probs: list[float], config: RoutingConfig) -> torch.Tensor:
    return select(choose_selection(config, len(probs)), TensorOperations(), torch.tensor(probs))


@pytest.mark.parametrize(
    "mode, expected",
    [
        ({"sparse_mode": True, "top_k": 1}, [0, 1, 0, 0]),
        ({"sparse_mode": True, "top_k": 2}, [0, 5 / 8, 3 / 8, 0]),
        ({"soft_topk": False, "top_k": 3}, [0.15 / 0.95, 0.5 / 0.95, 0.3 / 0.95, 0]),
        ({"sparse_mode": True, "auto_topk": True, "top_k": 2, "auto_topk_threshold": 0.5}, [0, 5 / 8, 3 / 8, 0]),
        ({"sparse_mode": True, "auto_topk": True, "top_k": 1, "auto_topk_threshold": 0.01}, [0, 5 / 8, 3 / 8, 0]),
    ],
)
def test_selections_by_hand(mode: dict[str, Any], expected: list[float]) -> None:
    found = select_from([0.15, 0.5, 0.3, 0.05], RoutingConfig(**mode))
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float), atol=1e-6), found


def test_soft_selections_by_hand() -> None:
    probs = [0.6, 0.4]
    soft = select_from(probs, RoutingConfig(top_k=2, soft_topk_temperature=0.1))
    auto = select_from(probs, RoutingConfig(auto_topk=True, auto_topk_threshold=0.5, soft_topk_temperature=0.1))
    gate = [[1 / (1 + math.exp(-x)) for x in pair] for pair in ((2, 0), (3, 1))]
    for found, (first, second) in zip((soft, auto), gate, strict=True):
        total = 0.6 * first + 0.4 * second
        assert torch.allclose(found, torch.tensor([0.6 * first / total, 0.4 * second / total]), atol=1e-6)


SELECTIONS: list[tuple[dict[str, Any], Selection]] = [
    ({}, Gate(Rank(2), 0.5)),
    ({"soft_topk": False}, Keep(2)),
    ({"soft_topk": False, "top_k": 1}, Keep(1)),
    ({"auto_topk": True, "soft_topk": False}, Gate(Share(0.5), 0.5)),
    ({"sparse_mode": True}, Keep(2)),
    ({"sparse_mode": True, "top_k": 1}, Take()),
    ({"sparse_mode": True, "auto_topk": True}, Keep(3, 0.5)),
    ({"sparse_mode": True, "auto_topk": True, "top_k": 1}, Keep(2, 0.5)),
]


@pytest.mark.parametrize(("mode", "expected"), SELECTIONS)
def test_the_plan_of_every_selection(mode: dict[str, Any], expected: Selection) -> None:
    plan = plan_routing(RoutingConfig(**mode, n_gram=3, gamma_routing=0.25, temperature=0.5), 3)
    assert plan.selection == expected
    assert (plan.window, plan.shares, plan.heated_shares) == (3, (0.75, 0.25), (1.5, 0.5))
    assert plan_routing(RoutingConfig(), 3, operands=1).shares == (1.0,)


def test_exporters_read_the_plan_and_not_the_hyper_parameters() -> None:
    """What is chosen is decided once: an exporter that asks for a switch has a decision tree of its own."""
    root = Path(__file__).parents[1]
    files = [*root.glob("exporters/*/*.py"), *root.glob("lime_edge/compiler/model/*.py"), Path(routing.__file__)]
    readers = {f.name for f in files if re.search(r"\.(sparse_mode|auto_topk|soft_topk)\b", f.read_text())}
    assert readers == {"routing.py"}


def test_faults_are_named_together() -> None:
    with pytest.raises(LimeEdgeError) as fault:
        RoutingConfig(top_k=0, temperature=-1.0, auto_topk_threshold=1.5, sparse_mode="yes")  # type: ignore[arg-type]
    for name in ("top_k", "temperature", "auto_topk_threshold", "sparse_mode"):
        assert name in fault.value.problem
    with pytest.raises(LimeEdgeError, match="top_k"):
        route(torch.ones(1, 1, 2), None, RoutingConfig(top_k=3))


@pytest.mark.parametrize(
    "config",
    [
        RoutingConfig(n_gram=3),
        RoutingConfig(auto_topk=True, n_gram=2),
        RoutingConfig(soft_topk=False),
        RoutingConfig(sparse_mode=True, top_k=1),
        RoutingConfig(sparse_mode=True, auto_topk=True, n_gram=2),
    ],
)
def test_exports_with_symbolic_batch_and_time(config: RoutingConfig) -> None:
    class Routed(torch.nn.Module):
        def forward(self, frozen: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
            return route(frozen, delta, config)

    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("time", max=4096)}
    program = torch.export.export(
        Routed(), (torch.randn(2, 7, 4), torch.randn(2, 7, 4)), dynamic_shapes=(sizes, sizes)
    ).module()
    for batch, tokens in ((3, 11), (1, 4)):
        frozen, delta = torch.randn(batch, tokens, 4), torch.randn(batch, tokens, 4)
        found, expected = program(frozen, delta), route(frozen, delta, config)
        assert torch.allclose(found, expected, atol=1e-6), (batch, tokens)
