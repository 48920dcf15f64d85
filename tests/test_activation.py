"""Experts that act from the generation prompt on: one prefill, every skill; answers as if it were done by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lime_edge
from lime_edge.bundle.experts import Selection
from lime_edge.session.cache import Segment
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions

Make = Callable[..., Path]
HEADER, NEW = 3, 6
OPTIONS = GenerationOptions(NEW, ignore_eos=True)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Make) -> Path:
    return tiny_bundle()


@pytest.fixture
def session(bundle: Path) -> Session:
    return open_session(bundle)


def open_session(path: Path, header: int = HEADER) -> Session:
    session = lime_edge.open_decoder(path, threads=1)
    session._header = header
    return session


def answer_by_hand(session: Session, ids: list[int], selection: Selection, new: int = NEW) -> list[int]:
    """No expert up to the header, then the expert: with the cache kept on purpose, on a session that knows nothing."""
    session.use(None)
    silent = max(0, len(ids) - HEADER)
    if silent:
        session.logits(ids[:silent])
    else:
        session.reset()
    session.use(selection, keep_cache=True)
    logits, found = session.extend(ids[silent:]), []
    for _ in range(new):
        found.append(int(logits[-1].argmax()))
        logits = session.extend([found[-1]])
    return found


def draw_ids(count: int, seed: int) -> list[int]:
    return [random.Random(seed + 1000 * place).randrange(300) for place in range(count)]


@pytest.fixture
def fed(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_calls(session, monkeypatch)


def count_calls(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the engine's calls, as they come."""
    sizes: list[int] = []
    feed = session._engine.feed

    def count(ids: np.ndarray, keep: int) -> np.ndarray:
        sizes.append(ids.size)
        return feed(ids, keep)

    monkeypatch.setattr(session._engine, "feed", count)
    return sizes


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 20])
def test_answers_are_those_of_doing_it_by_hand(bundle: Path, session: Session, length: int) -> None:
    plain, ids = open_session(bundle, 0), draw_ids(length, seed=length)
    differs = False
    for selection in (*session.experts, {"expert0": 0.5, "expert1": 0.5}, None):
        session.use(selection)
        found = list(session.generate_ids(ids, OPTIONS))
        assert found == answer_by_hand(plain, ids, selection)
        plain.use(selection)
        differs |= found != list(plain.generate_ids(ids, OPTIONS))
    assert differs == (length > HEADER), "acting always is another thing"


def test_logits_of_every_position(bundle: Path, session: Session) -> None:
    plain, ids = open_session(bundle, 0), draw_ids(9, seed=1)
    plain.use(None)
    before = plain.logits(ids[:-HEADER])
    plain.use("expert1", keep_cache=True)
    expected = np.concatenate([before, plain.extend(ids[-HEADER:], keep=0)])
    session.use("expert1")
    for keep in (0, 1, 2, 3, 4, 7, 9):
        np.testing.assert_allclose(session.logits(ids, keep), expected[-keep or None :], atol=1e-5, rtol=1e-5)
    assert session.cache == (Segment("none", 6), Segment("expert1", 3))


def test_a_switch_reads_the_header_alone(session: Session, fed: list[int], bundle: Path) -> None:
    """What the original model read for all is kept over `use`, unasked; what it answered itself is not."""
    plain, ids = open_session(bundle, 0), draw_ids(40, seed=2)
    session.use("expert0")
    list(session.generate_ids(ids, OPTIONS))
    assert fed == [37, 3, 1, 1, 1, 1, 1]
    for selection in ("expert1", {"expert0": 0.3, "expert2": 0.7}, None, "expert0"):
        fed.clear()
        session.use(selection)
        assert session.cache == (Segment("none", 37),)
        assert list(session.generate_ids(ids, OPTIONS)) == answer_by_hand(plain, ids, selection)
        assert fed == [3, 1, 1, 1, 1, 1]


def test_a_conversation_goes_on(session: Session, fed: list[int], bundle: Path) -> None:
    """The expert's own answer is history now: the original model reads it, and the header before it."""
    plain, ids = open_session(bundle, 0), draw_ids(20, seed=3)
    session.use("expert2")
    first = list(session.generate_ids(ids, OPTIONS))
    ids = [*ids, *first, *draw_ids(8, seed=4)]
    fed.clear()
    session.use("expert1")
    assert list(session.generate_ids(ids, OPTIONS)) == answer_by_hand(plain, ids, "expert1")
    assert fed[:2] == [len(ids) - HEADER - 17, HEADER]


def test_keep_cache_keeps_the_own_header_too(session: Session, fed: list[int]) -> None:
    ids = draw_ids(12, seed=5)
    session.use("expert1")
    expected = list(session.generate_ids(ids, OPTIONS))
    fed.clear()
    assert list(session.generate_ids(ids, OPTIONS, keep_cache=True)) == expected
    assert fed[0] == 2
    fed.clear()
    assert list(session.generate_ids(ids, OPTIONS)) == expected
    assert fed[0] == HEADER


def test_a_single_token_is_never_left_before_the_header(session: Session, fed: list[int]) -> None:
    ids = draw_ids(12, seed=6)
    session.use("expert1")
    list(session.generate_ids(ids, OPTIONS))
    for more in (1, 2):
        fed.clear()
        list(session.generate_ids([*ids[:-HEADER], *draw_ids(more + HEADER, seed=9)], OPTIONS))
        assert 1 not in fed[: len(fed) - NEW + 1], fed


def test_a_switch_that_fails_leaves_the_expert_in_place(
    session: Session, monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    """The engine fails while the original model reads; what answers next is the expert."""
    plain, ids = open_session(bundle, 0), draw_ids(12, seed=7)
    session.use("expert1")
    with monkeypatch.context() as broken:
        broken.setattr(session._engine, "feed", lambda *_: 1 / 0)
        with pytest.raises(lime_edge.LimeEdgeError, match="the engine failed"):
            session.logits(ids)
    session.reset()
    plain.use("expert1")
    np.testing.assert_allclose(session.extend(ids[:3]), plain.logits(ids[:3], keep=1), atol=1e-5)


# rows


def test_rows_answer_as_a_session_of_its_own(bundle: Path, session: Session) -> None:
    alone, draw = open_session(bundle), random.Random(0)
    stem, pool = draw_ids(30, seed=8), [*session.experts, {"expert0": 0.5, "expert1": 0.5}, None]
    requests: list[tuple[Any, ...]] = []
    for _ in range(40):
        prompt = [*stem[: draw.randrange(31)], *(draw.randrange(300) for _ in range(draw.randrange(1, 6)))]
        requests.append((prompt, draw.choice(pool), GenerationOptions(draw.randrange(1, 9), ignore_eos=True)))
    found: dict[int, list[int]] = {}
    for number, token in session.generate_many_ids(requests, rows=5):
        found.setdefault(number, []).append(token)
    for number, (prompt, selection, options) in enumerate(requests):
        alone.use(selection)
        assert found[number] == list(alone.generate_ids(prompt, options)), f"request {number}: {requests[number]}"
    logits = session.logits_many([request[:2] for request in requests], keep=4)
    for one, (prompt, selection, _) in zip(logits, requests, strict=True):
        alone.use(selection)
        np.testing.assert_allclose(one, alone.logits(prompt, keep=4), atol=1e-4, rtol=1e-4)


def test_one_prefill_for_every_skill(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen rows, one text: it is read once and the header for each; the next call reads the header alone."""
    read: list[int] = []
    feed = type(session.engine.open_rows(1)).feed  # type: ignore[attr-defined]

    def count(rows: Any, row: int, ids: np.ndarray, keep: int) -> np.ndarray:
        read.append(ids.size)
        return feed(rows, row, ids, keep)

    monkeypatch.setattr("lime_edge.runtimes.onnx.rows.OnnxRows.feed", count)
    ids = draw_ids(40, seed=10)
    requests = [(ids, name) for name in session.experts * 4]
    assert len(list(session.generate_many_ids(requests, OPTIONS))) == 16 * NEW
    assert read == [37, *[HEADER] * 16]
    read.clear()
    list(session.generate_many_ids(requests, OPTIONS))
    assert read == [HEADER] * 16 and session.prefixes.nbytes > 0


def test_nothing_changes_for_experts_that_always_act(bundle: Path) -> None:
    session = open_session(bundle, 0)
    session.use("expert0")
    list(session.generate_ids(draw_ids(12, seed=11), OPTIONS))
    session.use("expert1")
    assert session.cache == ()
    session.use(None)
    list(session.generate_ids(draw_ids(12, seed=11), OPTIONS))
    session.use("expert1")
    assert session.cache == ()


def test_a_routed_header_is_one_call(
    tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routing weighs what it is given: the header, after what the original model read."""
    model = tiny_model()
    path = tiny_bundle(model, tiny_adapter(model, routing={"top_k": 2}))
    session, ids = open_session(path), draw_ids(20, seed=12)
    sizes = count_calls(session, monkeypatch)
    session.use("routed")
    found = list(session.generate_ids(ids, OPTIONS))
    assert sizes == [17, 3, 1, 1, 1, 1, 1]
    assert session.cache == (Segment("none", 17), Segment("routed", 8))
    sizes.clear()
    assert list(session.generate_ids(ids, OPTIONS, keep_cache=True)) == found and sizes[0] == HEADER
    rows = [token for _, token in session.generate_many_ids([(ids, "routed")], OPTIONS)]
    assert rows == found
