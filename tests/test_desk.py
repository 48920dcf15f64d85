"""The desk: requests come, run, end and are stopped while others go on."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import lime_edge
from lime_edge.bundle.experts import Selection
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.desk import Desk, Piece, QueueFullError
from lime_edge.session.generate import GenerationOptions

Make = Callable[..., Path]
VOCAB = 300
LONG = GenerationOptions(20, ignore_eos=True)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Make) -> Path:
    return tiny_bundle()


@pytest.fixture
def session(bundle: Path) -> Session:
    return lime_edge.open_decoder(bundle, threads=1)


def drain(desk: Desk) -> list[Piece]:
    found: list[Piece] = []
    while desk.busy:
        found += desk.advance()
    return found


def test_who_comes_while_others_run_answers_as_alone(session: Session, bundle: Path) -> None:
    """60 requests at random moments, a fifth of them stopped: text, tokens and reason of a session of its own."""
    draw, alone = random.Random(2), lime_edge.open_decoder(bundle, threads=1)
    desk = session.open_desk(rows=5, capacity=64)
    pool: list[Selection] = [*session.experts, {"expert0": 0.25, "expert2": 0.75}, None]
    asked: dict[int, tuple] = {}
    pieces: dict[int, list[Piece]] = {}
    gone: dict[int, int] = {}  # stopped, with the pieces they had
    while len(asked) < 60 or desk.busy:
        while len(asked) < 60 and draw.random() < 0.5:
            ids = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 30))]
            options = GenerationOptions(draw.randrange(1, 15), draw.choice([0.0, 0.9]), seed=draw.randrange(99))
            request = ids, draw.choice(pool), options
            asked[desk.ask(*request)] = request
        for piece in desk.advance():
            pieces.setdefault(piece.number, []).append(piece)
        alive = [number for number in (*desk.running, *desk.waiting) if number not in gone]
        if alive and draw.random() < 0.1:
            number = draw.choice(alive)
            desk.stop(number)
            gone[number] = len(pieces.get(number, []))
    assert sorted(asked) == list(range(60)) and 5 < len(gone) < 40
    for number, (ids, selection, options) in asked.items():
        found = pieces.get(number, [])
        if number in gone:
            assert len(found) == gone[number] and all(piece.reason is None for piece in found)
            continue
        alone.use(selection)
        assert "".join(piece.text for piece in found) == "".join(alone.generate(ids, options)), number
        assert [piece.reason is None for piece in found] == [True] * (len(found) - 1) + [False]
        last = found[-1]
        assert last.reason == alone.finish_reason and last.prompt_tokens == len(ids)
        assert last.new_tokens == sum(piece.token is not None for piece in found)


def test_a_full_queue_refuses_and_a_stop_makes_room(session: Session) -> None:
    desk = session.open_desk(rows=2, queue=1)
    numbers = [desk.ask([5, 6], "expert0", LONG) for _ in range(3)]
    with pytest.raises(QueueFullError, match="wait already"):
        desk.ask([5], "expert0")
    desk.advance()
    assert desk.running == tuple(numbers[:2]) and desk.waiting == (numbers[2],)
    with pytest.raises(QueueFullError):
        desk.ask([5], "no such expert")  # nothing else is looked at
    desk.stop(numbers[0])
    late = desk.ask([5], "expert1", LONG)
    assert late not in numbers
    assert {piece.number for piece in drain(desk) if piece.reason} == {numbers[1], numbers[2], late}
    desk.stop(numbers[1])  # it has ended: no fault
    desk.stop(999)


def test_a_stop_string_ends_a_request_and_frees_its_row(session: Session) -> None:
    whole = "".join(session.generate([5, 9, 4], LONG))
    stop = whole[3:5]
    desk = session.open_desk(rows=1)
    session.use(session.experts[0])
    expert = session.experts[0]
    first = desk.ask([5, 9, 4], expert, GenerationOptions(20, ignore_eos=True, stop=stop))
    second = desk.ask([5, 9, 4], expert, LONG)
    found = drain(desk)
    texts = {number: "".join(piece.text for piece in found if piece.number == number) for number in (first, second)}
    assert texts == {first: whole[: whole.index(stop)], second: whole}
    assert [piece.reason for piece in found if piece.reason] == ["stop", "length"]


def test_kept_prompts_serve_the_next_turn(session: Session, bundle: Path) -> None:
    """A conversation's second turn begins with the first: it is not read again, and answers as if it were."""
    turn = list(range(40))
    longer = [*turn, 7, 8, 9]
    for keeps, kept in ((True, 38), (False, 0)):
        opened = lime_edge.open_decoder(bundle, threads=1)
        desk = opened.open_desk(rows=2, keep_prompts=keeps)
        desk.ask(turn, "expert1", LONG)
        drain(desk)
        desk.ask(longer, "expert1", LONG)
        found = drain(desk)
        assert found[-1].kept_tokens == kept
        session.use("expert1")
        expected = list(session.generate_ids(longer, LONG))
        assert [piece.token for piece in found if piece.token is not None] == expected
        desk.ask(longer, "expert2", LONG)
        assert drain(desk)[-1].kept_tokens == 0, "another expert's prompt is another"


def test_an_answer_that_fills_its_row_says_so(session: Session) -> None:
    desk = session.open_desk(rows=1, capacity=10)
    desk.ask([5] * 7, None, LONG)
    found = drain(desk)
    assert found[-1].reason == "cache" and found[-1].new_tokens == 3
    with pytest.raises(LimeEdgeError, match="a cache holds 10 tokens, the prompt has 10"):
        desk.ask([5] * 10, None)


def test_an_engine_that_fails_may_be_asked_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = session.open_desk(rows=2)
    numbers = [desk.ask([5, 6, 7 + extra], "expert1", LONG) for extra in range(2)]
    found = desk.advance()
    with monkeypatch.context() as patch:
        patch.setattr("lime_edge.runtimes.onnx.calls.BoundGraph.run", lambda *_: 1 / 0)
        with pytest.raises(LimeEdgeError, match="onnx: the engine failed: ZeroDivisionError"):
            desk.advance()
    found += drain(desk)
    for extra, number in enumerate(numbers):
        session.use("expert1")
        expected = list(session.generate_ids([5, 6, 7 + extra], LONG))
        assert [piece.token for piece in found if piece.number == number and piece.token is not None] == expected


def test_bounds_and_owner(session: Session) -> None:
    desk = session.open_desk(rows=4, capacity=32)
    each = desk.nbytes // 4
    less = session.open_desk(rows=4, capacity=32, memory=2 * each + 1)
    assert (less.rows, less.capacity, less.nbytes) == (2, 32, 2 * each)
    for wrong in ({"rows": 0}, {"capacity": 10**9}, {"queue": -1}, {"memory": each - 1, "capacity": 32}):
        with pytest.raises(LimeEdgeError):
            session.open_desk(**wrong)  # type: ignore[arg-type]
    desk.ask([5], None, LONG)
    faults: list[str] = []

    def meddle() -> None:
        for use in (desk.advance, desk.close, lambda: desk.ask([5], None), lambda: desk.stop(0)):
            try:
                use()
            except LimeEdgeError as error:
                faults.append(error.problem)

    thread = threading.Thread(target=meddle)
    thread.start()
    thread.join()
    assert len(faults) == 4 and all("belongs to the thread" in fault for fault in faults)
    desk.advance()
    desk.close()
    assert not desk.busy and desk.advance() == []
