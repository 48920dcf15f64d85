"""Many requests at once: row for row the answers of a session of its own, whoever comes and goes beside it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lime_edge
from lime_edge.bundle.experts import Selection
from lime_edge.errors import LimeEdgeError
from lime_edge.session.batch import SLICE, Batch, Order, Reader
from lime_edge.session.chunks import CHUNK
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions
from lime_edge.session.many import Request
from lime_edge.session.prefixes import PrefixCache
from lime_edge.session.sampling import pick_best

Make = Callable[..., Path]
VOCAB = 300


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Make) -> Path:
    return tiny_bundle()


def open_session(path: Path, **options: Any) -> Session:
    return lime_edge.open_decoder(path, threads=1, **options)


def draw_requests(session: Session, count: int, seed: int) -> list[tuple[list[int], Selection, GenerationOptions]]:
    """Prompts of all lengths, some that share beginnings; experts, blends and none; greedy and drawn answers."""
    draw = random.Random(seed)
    first, second = session.experts[:2]
    pool: list[Selection] = [*session.experts, {first: 0.7, second: 0.3}, {first: 1.5, second: -0.5}, None]
    stem, requests = [draw.randrange(VOCAB) for _ in range(30)], []
    for _ in range(count):
        prompt = stem[: draw.randrange(31)] + [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 12))]
        options = GenerationOptions(draw.randrange(1, 14), draw.choice([0, 0, 0.8]), seed=draw.randrange(99))
        requests.append((prompt, draw.choice(pool), options))
    return requests


def answer_alone(session: Session, request: Sequence[Any]) -> tuple[list[int], str | None]:
    prompt, selection, options = request
    session.use(selection)
    return list(session.generate_ids(prompt, options)), session.finish_reason


@pytest.mark.parametrize("rows", range(1, 17))
def test_every_row_answers_as_a_session_of_its_own(bundle: Path, rows: int) -> None:
    session, alone = open_session(bundle), open_session(bundle)
    requests = draw_requests(session, 24, seed=rows)
    answers = session.generate_many_ids(requests, rows=rows)
    found: dict[int, list[int]] = {number: [] for number in range(len(requests))}
    for number, token in answers:
        found[number].append(token)
    assert answers.rows == rows
    for number, request in enumerate(requests):
        tokens, reason = answer_alone(alone, request)
        assert found[number] == tokens, f"request {number} of {requests[number]}"
        assert answers.reasons[number] == reason


def test_logits_of_mixed_batches_are_those_of_one_session(bundle: Path) -> None:
    """Random starts, ends and orders of steps, straight on the rows: within 1e-4."""
    session, alone, draw = open_session(bundle), open_session(bundle), random.Random(5)
    rows = session.engine.open_rows(6)  # type: ignore[attr-defined]
    under_way: dict[int, tuple[Selection, list[int]]] = {}
    pool: list[Selection] = [*session.experts, {"expert0": 0.5, "expert2": 0.5}, None]
    worst = 0.0
    for _ in range(150):
        if len(under_way) < 6 and draw.random() < 0.4:
            selection, ids = draw.choice(pool), [draw.randrange(VOCAB) for _ in range(draw.randrange(2, 9))]
            row = rows.start(session.identify(selection)[0])
            rows.feed(row, np.array(ids), 1)
            under_way[row] = selection, ids
        stepping = [row for row in under_way if draw.random() < 0.7 and len(under_way[row][1]) < 40]
        draw.shuffle(stepping)
        tokens = [draw.randrange(VOCAB) for _ in stepping]
        for row, token, logits in zip(stepping, tokens, rows.step(stepping, tokens) if stepping else [], strict=True):
            selection, ids = under_way[row]
            ids.append(token)
            alone.use(selection)
            worst = max(worst, float(np.abs(alone.logits(ids, keep=1)[-1] - logits).max()))
        for row in [row for row in under_way if draw.random() < 0.08]:
            rows.stop(row)
            del under_way[row]
    assert 0 < worst < 1e-4


def test_routed_rows_beside_pinned_ones(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model = tiny_model()
    path = tiny_bundle(model, tiny_adapter(model, routing={"top_k": 2}))
    session, alone = open_session(path), open_session(path)
    assert session.bundle.manifest.targets["onnx"].routed
    draw, options = random.Random(3), GenerationOptions(6, ignore_eos=True)
    requests = [
        ([draw.randrange(VOCAB) for _ in range(draw.randrange(2, 9))], choice, options)
        for choice in ("routed", "expert1", "routed", None, "routed", "expert1")
    ]
    found: dict[int, list[int]] = {}
    for number, token in session.generate_many_ids(requests, rows=4):
        found.setdefault(number, []).append(token)
    assert found == {number: answer_alone(alone, request)[0] for number, request in enumerate(requests)}


def test_text_stop_strings_and_reasons(bundle: Path) -> None:
    session, alone = open_session(bundle), open_session(bundle)
    whole = "".join(alone.generate("hello there", max_new_tokens=12, ignore_eos=True))
    stop = whole[3:5]
    requests = [
        ("hello there", "expert0"),
        ("hello there", "expert0", GenerationOptions(12, stop=stop, ignore_eos=True)),
    ]
    answers = session.generate_many(requests, max_new_tokens=12, ignore_eos=True)
    found = {0: "", 1: ""}
    for number, piece in answers:
        found[number] += piece
    assert found == {0: whole, 1: whole[: whole.index(stop)]}
    assert answers.reasons == {0: "length", 1: "stop"}


def test_the_session_itself_is_left_alone(bundle: Path) -> None:
    """Its cache, its selection, a generation that runs, and an expert that is replaced under a row."""
    session, alone = open_session(bundle), open_session(bundle)
    session.use("expert2")
    expected = answer_alone(alone, ([5, 6, 7], "expert2", GenerationOptions(8, ignore_eos=True)))[0]
    rows = answer_alone(alone, ([8, 9], "expert1", GenerationOptions(8, ignore_eos=True)))[0]
    stream = session.generate_ids([5, 6, 7], GenerationOptions(8, ignore_eos=True))
    found = [next(stream), next(stream)]
    answers = session.generate_many_ids([([8, 9], "expert1")], max_new_tokens=8, ignore_eos=True)
    many = [next(answers)[1]]
    session.install(bundle / "experts" / "expert3.safetensors", name="expert1")
    many += [token for _, token in answers]
    assert session.selection == "expert2" and sum(segment.tokens for segment in session.cache) == 4
    assert found + list(stream) == expected and many == rows


def test_a_request_may_be_left_and_others_take_its_row(bundle: Path) -> None:
    session = open_session(bundle)
    requests = [([5 + number], "expert0") for number in range(6)]
    answers = session.generate_many_ids(requests, rows=2, max_new_tokens=20, ignore_eos=True)
    seen: list[int] = []
    for number, _ in answers:
        seen.append(number)
        if number in (0, 3) and number not in answers.reasons:
            answers.stop(number)
    assert answers.reasons[0] == "stop" and answers.reasons[5] == "length"
    assert seen.count(5) == 20 and seen.count(0) <= 2


@pytest.mark.parametrize(
    ("requests", "why"),
    [
        ([], "no requests"),
        ([([5], "expert0"), [5]], "request 1: expected \\(prompt, selection\\), found list"),
        ([([5], "missing")], "request 0: unknown expert 'missing'"),
        ([([5], "expert0"), ([300], None)], "request 1: token ids: expected 0..299"),
        ([([5], "expert0", {"seed": 1})], "request 0: options: expected GenerationOptions"),
        ([([], "expert0")], "request 0: token ids: expected a non-empty list"),
        ([([5], "routed")], "request 0: this bundle has no routed graph"),
        ([([5] * 33, None)], "request 0: a cache holds 32 tokens, the prompt has 33"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused_before_anything_runs(
    bundle: Path, requests: list, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(bundle, max_length=32)
    monkeypatch.setattr("lime_edge.runtimes.onnx.rows.OnnxRows.feed", None)
    with pytest.raises(LimeEdgeError, match=why):
        session.generate_many_ids(requests)


def test_memory_is_bounded_and_said(bundle: Path) -> None:
    session = open_session(bundle)
    requests = [([5, 6, 7], "expert0")] * 9
    whole = session.generate_many_ids(requests, rows=4, max_new_tokens=5)
    assert (whole.rows, whole.capacity) == (4, 7)  # three of the prompt and four that are read again
    each = whole.nbytes // 4
    less = session.generate_many_ids(requests, memory=3 * each + 1, max_new_tokens=5)
    assert (less.rows, less.nbytes) == (3, 3 * each)
    assert len({number for number, _ in less}) == 9
    with pytest.raises(LimeEdgeError, match=f"a row of 7 tokens takes {each} bytes, {each - 1} are allowed"):
        session.generate_many_ids(requests, memory=each - 1, max_new_tokens=5)
    with pytest.raises(LimeEdgeError, match="rows: expected at least 1, found 0"):
        session.generate_many_ids(requests, rows=0)
    with pytest.raises(LimeEdgeError, match="memory: expected bytes, at least 1, or None, found 0"):
        session.generate_many_ids(requests, memory=0)


def test_an_answer_that_fills_its_cache_says_so(bundle: Path) -> None:
    session, alone = open_session(bundle, max_length=12), open_session(bundle, max_length=12)
    request = ([5] * 9, "expert1", GenerationOptions(50, ignore_eos=True))
    answers = session.generate_many_ids([request])
    assert [token for _, token in answers] == answer_alone(alone, request)[0]
    assert answers.reasons == {0: "cache"} and alone.finish_reason == "cache"


def test_other_engines_say_that_they_cannot(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(bundle)
    monkeypatch.delattr("lime_edge.runtimes.onnx.decoder.OnnxEngine.open_rows")
    for ask in (lambda: session.generate_many([([5], None)]), lambda: session.logits_many([([5], None)])):
        with pytest.raises(LimeEdgeError, match="onnx: this engine runs one sequence at a time"):
            ask()


def test_another_thread_is_refused(bundle: Path) -> None:
    session = open_session(bundle)
    answers = session.generate_many_ids([([5], None)], max_new_tokens=4)
    found: list[Exception] = []

    def work() -> None:
        for use in (lambda: next(answers), lambda: session.generate_many_ids([([5], None)]), lambda: answers.stop(0)):
            try:
                use()
            except LimeEdgeError as error:
                found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 3 and all("belongs to the thread" in str(error) for error in found)
    assert len(list(answers)) <= 4


def test_logits_many(bundle: Path) -> None:
    session, alone = open_session(bundle), open_session(bundle)
    requests = [(ids, selection) for ids, selection, _ in draw_requests(session, 12, seed=77)]
    for keep in (0, 1, 3):
        for found, (ids, selection) in zip(session.logits_many(requests, keep), requests, strict=True):
            alone.use(selection)
            expected = alone.logits(ids, keep)
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert session.logits_many([]) == []
    with pytest.raises(LimeEdgeError, match="keep"):
        session.logits_many(requests, -1)


# the order of work, on rows that only note what they are asked


class Notes:
    """Rows that answer every token with its successor, and note every call."""

    routed_apart, nbytes = True, 0

    def __init__(self, count: int, capacity: int = 4096):
        self.count, self.capacity = count, capacity
        self.calls: list[tuple] = []
        self.lengths: dict[int, int] = {}

    def start(self, residual: np.ndarray | None, prefix: Any = None) -> int:
        row = next(row for row in range(self.count) if row not in self.lengths)
        self.lengths[row] = prefix.tokens if prefix else 0
        self.calls.append(("start", row, self.lengths[row]))
        return row

    def stop(self, row: int) -> None:
        del self.lengths[row]

    def set_expert(self, row: int, residual: np.ndarray | None) -> None:
        self.calls.append(("expert", row))

    def length(self, row: int) -> int:
        return self.lengths[row]

    def rewind(self, row: int, length: int) -> None:
        self.lengths[row] = min(length, self.lengths[row])

    def save(self, row: int, length: int) -> Any:
        self.calls.append(("save", row, length))
        return Saved(length)

    def feed(self, row: int, ids: np.ndarray, keep: int) -> np.ndarray:
        self.calls.append(("feed", row, ids.size))
        self.lengths[row] += ids.size
        return one_hot(ids[-1] + 1)[None]

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> list[np.ndarray]:
        self.calls.append(("step", *rows))
        return [one_hot(token + 1) for token in tokens]


class Saved:
    def __init__(self, tokens: int):
        self.tokens, self.nbytes = tokens, tokens * 10


def one_hot(token: int) -> np.ndarray:
    return np.eye(5000, dtype=np.float32)[token]


def order(number: int, ids: Sequence[int], filler: bytes = b"a", most: int = 4) -> Order:
    return Order(number, tuple(ids), Reader(np.zeros(1, np.float32), filler), pick_best, most, "length")


def run_all(batch: Batch) -> list[tuple[int, int | None]]:
    found = []
    while batch.busy:
        found += [(event.number, event.token) for event in batch.advance()]
    return found


def test_a_long_prompt_is_read_in_pieces_between_steps() -> None:
    rows = Notes(2)
    batch = Batch(rows, PrefixCache())
    batch.submit(order(0, [1, 2], most=40))
    batch.advance()
    batch.submit(order(1, range(1000, 1000 + 10 * SLICE), most=3))
    run_all(batch)
    pieces = [call for call in rows.calls if call[:2] == ("feed", 1)]
    assert [size for _, _, size in pieces] == [SLICE] * 10
    places = [rows.calls.index(piece) for piece in pieces[:1]] + [
        place for place, call in enumerate(rows.calls) if call[:2] == ("feed", 1)
    ]
    for place in places[1:-1]:
        assert rows.calls[place + 1] == ("step", 0), "whoever answers waits for one piece at most"


def test_alone_a_prompt_is_read_in_large_pieces() -> None:
    rows = Notes(1)
    batch = Batch(rows, PrefixCache())
    batch.submit(order(0, range(CHUNK + 100)))
    run_all(batch)
    assert [size for name, _, size in (call for call in rows.calls if call[0] == "feed")] == [CHUNK, 100]


def test_a_row_that_ends_is_refilled_at_once() -> None:
    rows = Notes(2)
    batch = Batch(rows, PrefixCache())
    for number, most in enumerate((2, 9, 3, 3)):
        batch.submit(order(number, [10 * number], bytes([number]), most))
    found = run_all(batch)
    starts = [call for call in rows.calls if call[0] == "start"]
    assert [row for _, row, _ in starts] == [0, 1, 0, 0]
    assert [token for number, token in found if number == 2] == [21, 22, 23, None]
    assert ("step", 1, 0) in rows.calls  # the old row and its new neighbour in one pass


def test_a_shared_beginning_is_read_once() -> None:
    """Three requests of one expert wait for the first to read what they share; another expert's does not."""
    rows, prefixes = Notes(4), PrefixCache()
    batch, stem = Batch(rows, prefixes), list(range(100, 160))
    for number in range(3):
        batch.submit(order(number, [*stem, 200 + number, 5]))
    batch.submit(order(3, [*stem, 200, 5], b"b"))
    run_all(batch)
    read: dict[int, int] = {}
    for _, row, size in (call for call in rows.calls if call[0] == "feed"):
        read[row] = read.get(row, 0) + size
    assert sorted(read.values()) == [2, 2, 62, 62]
    assert len(prefixes) == 1 and prefixes.nbytes == 600


def test_equal_requests_share_all_but_two_tokens() -> None:
    rows = Notes(3)
    batch = Batch(rows, PrefixCache())
    for number in range(3):
        batch.submit(order(number, range(50)))
    run_all(batch)
    assert [size for name, _, size in (call for call in rows.calls if call[0] == "feed")] == [50, 2, 2]


def test_prefixes_go_when_the_limit_is_reached() -> None:
    cache = PrefixCache(limit=1000)
    for start in range(5):
        cache.keep(b"a", range(start * 100, start * 100 + 40), Saved(40))
    assert len(cache) == 2 and cache.find(b"a", range(0, 40), 99) == (0, None)
    assert cache.find(b"a", [*range(300, 340), 1], 99)[0] == 40
    cache.keep(b"a", range(900, 940), Saved(40))  # 400.. was used least recently
    assert cache.find(b"a", range(400, 440), 99) == (0, None) and cache.find(b"a", range(300, 320), 99)[0] == 20
    assert cache.find(b"b", range(300, 340), 99) == (0, None), "another expert's"
    assert cache.find(b"a", range(300, 340), 39) == (0, None), "longer than a row"
    cache.keep(b"a", range(900, 950), Saved(50))
    assert len(cache) == 2, "one that begins with another replaces it"
    none = PrefixCache(limit=0)
    none.keep(b"a", range(40), Saved(40))
    assert len(none) == 0


def test_waiting_for_a_prefix_that_is_never_kept_ends() -> None:
    rows = Notes(2)
    batch = Batch(rows, PrefixCache(limit=0))
    for number in range(2):
        batch.submit(order(number, range(50)))
    assert len(run_all(batch)) == 10


def test_an_order_that_fits_no_row_is_refused() -> None:
    batch = Batch(Notes(1, capacity=10), PrefixCache())
    batch.submit(order(0, range(7), most=4))
    with pytest.raises(LimeEdgeError, match="request 1: 11 tokens are needed, a row holds 10"):
        batch.submit(order(1, range(8), most=4))


def test_logits_that_are_no_numbers_name_the_request_and_the_others_go_on() -> None:
    rows = Notes(2)
    batch = Batch(rows, PrefixCache())
    batch.submit(order(0, [1]))
    batch.submit(order(1, [7], b"b"))
    step = rows.step

    def spoil(taken: Sequence[int], tokens: Sequence[int]) -> list[np.ndarray]:
        logits = step(taken, tokens)
        return [np.full_like(row, np.nan) if taken[place] == 1 else row for place, row in enumerate(logits)]

    rows.step = spoil  # type: ignore[method-assign, assignment]
    events = batch.advance()
    (failed,) = [event for event in events if event.fault is not None]
    assert failed.number == 1 and failed.reason == "failed"
    assert "request 1: the model's logits hold nan" in str(failed.fault)
    assert [event.token for event in events if event.number == 0] == [2, 3] and batch.running == (0,)
    assert run_all(batch) == [(0, 4), (0, 5), (0, None)]


def test_an_iterator_goes_on_after_a_request_that_failed(bundle: Path) -> None:
    """An expert whose numbers overflow; the other request's answer is its own to the end."""
    session, alone = open_session(bundle), open_session(bundle)
    huge = np.full_like(session._bank.vector("expert1"), 1e38, np.float32)
    session._bank._vectors["huge"] = huge  # no file may hold such values
    options = GenerationOptions(6, ignore_eos=True)
    answers = session.generate_many_ids([([5, 6], "expert0", options), ([5, 6], "huge", options)])
    found: list[int] = []
    faults = []
    while len(answers.reasons) < 2:
        try:
            found.append(next(answers)[1])
        except LimeEdgeError as error:
            faults.append(error.problem)
    found += [token for _, token in answers]
    assert len(faults) == 1 and faults[0].startswith("request 1: the model's logits hold")
    assert found == answer_alone(alone, ([5, 6], "expert0", options))[0]
    assert answers.reasons == {0: "length", 1: "failed"}


def test_a_request_in_words() -> None:
    assert Request([1], "a") == Request(prompt=[1], selection="a", options=None)


def test_rows_that_no_memory_holds_are_refused(tiny_bundle: Make) -> None:
    session = lime_edge.open_decoder(tiny_bundle(), target="onnx")
    with pytest.raises(LimeEdgeError, match="no memory for the caches of 1000000000000 rows of 16 tokens"):
        session.open_desk(rows=10**12, capacity=16)
    assert len(session.logits([1, 2])) == 2
