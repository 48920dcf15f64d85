"""Sampling, stop strings, streaming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lime_edge.errors import LimeEdgeError
from lime_edge.session.generate import (
    GenerationOptions,
    TextStream,
    filter_probabilities,
    make_sampler,
    stream_tokens,
)

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def test_temperature_is_a_softmax() -> None:
    got = filter_probabilities(LOGITS, GenerationOptions(temperature=0.5))
    expected = np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_top_k_keeps_the_likeliest() -> None:
    got = filter_probabilities(LOGITS, GenerationOptions(temperature=1.0, top_k=2))
    np.testing.assert_allclose(got, [2 / 3, 1 / 3, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.89, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p: float, kept: int) -> None:
    got = filter_probabilities(LOGITS.astype(np.float64), GenerationOptions(temperature=1.0, top_p=top_p))
    assert int((got > 0).sum()) == kept
    assert got.sum() == pytest.approx(1)


def test_sampling_follows_the_probabilities_and_the_seed() -> None:
    options = GenerationOptions(temperature=1.0, seed=3)
    pick, again = make_sampler(options), make_sampler(options)
    drawn = [pick(LOGITS) for _ in range(4000)]
    assert drawn == [again(LOGITS) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, np.exp(LOGITS), atol=0.03)
    assert drawn != [make_sampler(GenerationOptions(temperature=1.0, seed=4))(LOGITS) for _ in range(4000)]


def test_bad_options_are_all_named() -> None:
    with pytest.raises(LimeEdgeError) as caught:
        GenerationOptions(max_new_tokens=0, temperature=-1, top_k=-1, top_p=0, stop=("",))
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "stop strings"):
        assert name in str(caught.value)


def test_tokens_stop_at_eos_and_at_the_limit() -> None:
    def step(token: int) -> np.ndarray:
        return np.eye(5)[(token + 1) % 5]

    start = np.eye(5)[0]
    assert list(stream_tokens(start, step, GenerationOptions(max_new_tokens=9), eos=(3,))) == [0, 1, 2]
    assert list(stream_tokens(start, step, GenerationOptions(max_new_tokens=2), eos=(3,))) == [0, 1]
    ignoring = GenerationOptions(max_new_tokens=6, ignore_eos=True)
    assert list(stream_tokens(start, step, ignoring, eos=(3,))) == [0, 1, 2, 3, 4, 0]


def test_no_step_is_run_for_a_token_nobody_asked_for() -> None:
    fed: list[int] = []

    def step(token: int) -> np.ndarray:
        fed.append(token)
        return np.eye(3)[1]

    assert list(stream_tokens(np.eye(3)[2], step, GenerationOptions(max_new_tokens=3), ())) == [2, 1, 1]
    assert fed == [2, 1]


def spell(alphabet: list[bytes]) -> object:
    def decode(ids: Sequence[int]) -> str:
        return b"".join(alphabet[i] for i in ids).decode("utf-8", errors="replace")

    return decode


def test_half_a_character_is_held_back() -> None:
    stream = TextStream(spell([b"a", b"\xe2\x82", b"\xac"]))  # type: ignore[arg-type]
    assert [stream.push(token) for token in (0, 1, 2, 0)] == ["a", "", "€", "a"]
    assert stream.finish() == ""


def test_stop_string_across_tokens_is_not_printed() -> None:
    stream = TextStream(spell([b"so ", b"EN", b"D", b"!"]), stop=("END",))  # type: ignore[arg-type]
    assert [stream.push(token) for token in (0, 1, 3)] == ["so ", "", "EN!"]
    assert stream.push(1) == "" and not stream.stopped
    assert stream.push(2) == "" and stream.stopped
    assert stream.finish() == ""


def test_held_back_text_comes_at_the_end() -> None:
    stream = TextStream(spell([b"x", b"EN"]), stop=("END",))  # type: ignore[arg-type]
    assert stream.push(0) + stream.push(1) == "x"
    assert stream.finish() == "EN"


def test_earliest_stop_wins() -> None:
    stream = TextStream(spell([b"one. two! three"]), stop=("!", "."))  # type: ignore[arg-type]
    assert stream.push(0) == "one" and stream.stopped
