"""Options, stop strings, streaming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lime_edge.errors import LimeEdgeError
from lime_edge.session.generate import (
    GenerationOptions,
    TextStream,
    stream_tokens,
)


def test_bad_options_are_all_named() -> None:
    with pytest.raises(LimeEdgeError) as caught:
        GenerationOptions(max_new_tokens=0, temperature=-1, top_k=-1, top_p=0, seed=-1, stop=("",))
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop strings"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_k": 1.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"top_p": None},
        {"seed": 2**64},
        {"seed": 0.5},
        {"stop": (3,)},
        {"stop": 3},
        {"stop": ""},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(LimeEdgeError, match=f"generation options: {next(iter(bad))}"):
        GenerationOptions(**bad)


def test_the_whole_range_is_taken() -> None:
    GenerationOptions(10**9, 1e-300, 10**9, 1e-300, 2**64 - 1)
    GenerationOptions(np.int64(3), np.float32(0.5), np.int32(4), 1, 0)  # type: ignore[arg-type]


def test_one_stop_string_is_one() -> None:
    assert GenerationOptions(stop="END").stop == ("END",)
    assert GenerationOptions(stop=["a", "b"]).stop == ("a", "b")


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
