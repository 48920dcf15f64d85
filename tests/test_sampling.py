"""Sampling: the vectors that every language must meet, against a second implementation without numpy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lime_edge.errors import LimeEdgeError
from lime_edge.session.sampling import SplitMix64, choose_likeliest, make_sampler, weigh

ROOT = Path(__file__).parent.parent
VECTORS = json.loads((ROOT / "tests" / "vectors" / "sampling.json").read_text())
LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def numbers(seed: int) -> Any:
    """SplitMix64 once more, after docs/sampling.md."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


def read_logits(name: str) -> list[float]:
    if name == "long":
        rule, source = VECTORS["long"], numbers(int(VECTORS["long"]["seed"]))
        return [(next(source) >> 40) / 2**20 for _ in range(rule["count"])]
    return [float(np.float32(float(value))) for value in VECTORS["logits"][name]]


def draw_plainly(logits: list[float], case: dict[str, Any]) -> tuple[int, list[int]]:
    """Step by step as docs/sampling.md says: how many are kept, and the tokens."""
    count, temperature = len(case["tokens"]), case["temperature"]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        return 1, [order[0]] * count
    order = order[: case["top_k"] or None]
    weights = {token: math.exp((logits[token] - logits[order[0]]) / temperature) for token in order}
    if case["top_p"] < 1:
        goal, held, taken = case["top_p"] * sum(weights[token] for token in sorted(order)), 0.0, []
        for token in order:
            taken.append(token)
            held += weights[token]
            if held >= goal:
                break
        order = taken
    source, tokens = numbers(int(case["seed"])), []
    total = sum(weights[token] for token in sorted(order))
    for _ in range(count):
        level, running = (next(source) >> 11) * 2.0**-53 * total, 0.0
        for token in sorted(order):
            running += weights[token]
            if running > level:
                break
        tokens.append(token)
    return len(order), tokens


def test_the_generator_is_the_published_one() -> None:
    """The numbers of seed 1234567 are those that other implementations print."""
    random = SplitMix64(1234567)
    assert [random.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for entry in VECTORS["generator"]:
        source = numbers(int(entry["seed"]))
        assert [str(next(source)) for _ in entry["numbers"]] == entry["numbers"]
        source = numbers(int(entry["seed"]))
        assert [(next(source) >> 11) / 2**53 for _ in entry["uniform"]] == entry["uniform"]


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda c: f"{c['logits']}-{c['temperature']}-{c['top_k']}")
def test_vectors_are_met_by_both(case: dict[str, Any]) -> None:
    logits = read_logits(case["logits"])
    kept, tokens = draw_plainly(logits, case)
    assert tokens == case["tokens"], "the vectors are not what docs/sampling.md says"
    assert kept == case.get("kept", 1)
    pick = make_sampler(case["temperature"], case["top_k"], case["top_p"], int(case["seed"]))
    row = np.array(logits, np.float32)
    assert [pick(row) for _ in tokens] == tokens


def test_the_file_is_what_its_tool_writes() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "sampling_vectors.py"), "--check"], check=False)
    assert done.returncode == 0, "run python tools/sampling_vectors.py"


def share(*options: Any) -> np.ndarray:
    """Probabilities of LOGITS' four tokens."""
    ids, weights = weigh(LOGITS, *options)
    found = np.zeros(LOGITS.size)
    found[ids] = weights / weights.sum()
    return found


def test_temperature_is_a_softmax() -> None:
    expected = np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345
    np.testing.assert_allclose(share(0.5, 0, 1.0), expected, rtol=1e-6)


def test_top_k_keeps_the_likeliest_and_of_equal_ones_the_first() -> None:
    np.testing.assert_allclose(share(1.0, 2, 1.0), [2 / 3, 1 / 3, 0, 0], rtol=1e-6)
    assert choose_likeliest(np.array([1.0, 3, 2, 3, 2, 2]), 4).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.89, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p: float, kept: int) -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    assert weigh(logits, 1.0, 0, top_p)[0].tolist() == list(range(kept))


def test_a_long_tail_is_cut_as_a_full_sort_cuts_it() -> None:
    """Only a few candidates are sorted at first; the borders lie beyond them."""
    logits = np.random.default_rng(0).normal(0, 1, 5000).astype(np.float32)
    weights = np.exp(np.sort(logits.astype(np.float64))[::-1] - logits.max())
    for top_p in (0.01, 0.3, 0.9, 0.999):
        wanted = int(np.searchsorted(np.cumsum(weights), top_p * weights.sum())) + 1
        ids = weigh(logits, 1.0, 0, top_p)[0]
        assert ids.tolist() == sorted(np.argsort(-logits, kind="stable")[:wanted].tolist())


def test_sampling_follows_the_probabilities_and_the_seed() -> None:
    def draw(seed: int | None) -> list[int]:
        pick = make_sampler(1.0, seed=seed)
        return [pick(LOGITS) for _ in range(4000)]

    drawn = draw(3)
    assert drawn == draw(3)
    np.testing.assert_allclose(np.bincount(drawn) / 4000, np.exp(LOGITS), atol=0.03)
    assert drawn != draw(4) and drawn != draw(None) and draw(None) != draw(None)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-300])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_pick_nothing(temperature: float, bad: float) -> None:
    for row in (np.array([1, bad, 2], np.float32), np.full(3, -np.inf, np.float32)):
        with pytest.raises(LimeEdgeError, match="logits hold .*: no token can be picked"):
            make_sampler(temperature, top_k=2, seed=1)(row)
    masked = np.array([-np.inf, 1, -np.inf], np.float32)
    assert make_sampler(temperature, top_p=0.9, seed=1)(masked) == 1


def test_extreme_temperatures_neither_overflow_nor_forget() -> None:
    row = np.array([1, 3e38, -3e38, 2.9e38], np.float32)
    assert {make_sampler(1e-300, seed=1)(row) for _ in range(20)} == {1}
    pick = make_sampler(1e300, seed=1)
    assert {pick(row) for _ in range(200)} == {0, 1, 2, 3}
