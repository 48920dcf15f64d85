"""Many clients at once: each answer is its own skill's, who leaves gives back a row, who is too many is told so."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import LETTERS, Running, serve_here

import lime_edge

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from serve_client import Reply, ask  # noqa: E402

COMPLETIONS = "/v1/completions"
LONG = 1500  # tokens of an answer that is still running when its client leaves


@pytest.fixture(scope="module")
def server(marker_bundle: Path) -> Iterator[Running]:
    with serve_here(marker_bundle, most_waiting=256) as running:
        yield running


def order(letter: str, tokens: int, prompt: str = "x") -> dict[str, Any]:
    return {"model": f"marker:skill-{letter}", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}


async def ask_many(port: int, orders: list[dict[str, Any]], clients: int, cut_after: int | None = None) -> list[Reply]:
    """`clients` at once, each one request after another."""
    places, found = iter(range(len(orders))), dict[int, Reply]()

    async def be_client() -> None:
        for place in places:
            found[place] = await ask(port, COMPLETIONS, orders[place], cut_after)

    await asyncio.gather(*(be_client() for _ in range(clients)))
    return [found[place] for place in range(len(orders))]


def wait_until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def is_idle(running: Running) -> bool:
    worker = running.worker
    return worker.running == 0 and not worker.under_way


def test_each_of_many_answers_is_its_own_skills(server: Running) -> None:
    """16 skills, twice as many clients as rows, short and long: the text shows whose an answer is."""
    orders = [order(LETTERS[place % 16], 1 + place * 7 % 23, "etaoin" * (place % 9)) for place in range(320)]
    orders = [body | {"prompt": body["prompt"] or "y"} for body in orders]
    replies = asyncio.run(ask_many(server.port, orders, 32))
    for body, reply in zip(orders, replies, strict=True):
        assert reply.text == body["model"][-1] * body["max_tokens"], (body, reply)
        assert (reply.reason, reply.tokens) == ("length", body["max_tokens"])
    assert is_idle(server)


def test_who_leaves_gives_back_a_row(server: Running) -> None:
    orders = [order(LETTERS[place % 16], LONG) for place in range(200)]
    replies = asyncio.run(ask_many(server.port, orders, 40, cut_after=2))
    assert all(reply.cut for reply in replies)
    wait_until(lambda: is_idle(server))
    worker = server.worker
    assert not worker._tickets and not worker._desk._batch._rows._rows, "a row is still taken"
    with urllib.request.urlopen(f"{server.url}/metrics") as reply:
        told = reply.read().decode()
    cancelled = [line for line in told.splitlines() if 'reason="cancelled"' in line]
    assert sum(float(line.rpartition(" ")[2]) for line in cancelled) == 200
    again = asyncio.run(ask_many(server.port, [order(letter, 5) for letter in LETTERS], 16))
    assert [reply.text for reply in again] == [letter * 5 for letter in LETTERS]


def test_who_leaves_before_its_turn_is_forgotten(marker_bundle: Path) -> None:
    with serve_here(marker_bundle, rows=1) as running:
        holder = urllib.request.urlopen(post(running, order("a", LONG) | {"stream": True}))
        raw = asyncio.run(leave_at_once(running.port, [order(letter, LONG) for letter in "bcdef"]))
        assert raw == 5
        worker = running.worker
        wait_until(lambda: len(worker.under_way) == 1)
        holder.close()
        wait_until(lambda: is_idle(running))


async def leave_at_once(port: int, orders: list[dict[str, Any]]) -> int:
    """Send whole requests that are not streamed, wait until they are queued, and leave."""
    writers = []
    for body in orders:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        writers.append(writer)
    await asyncio.sleep(0.1)
    for writer in writers:
        writer.close()
    return len(writers)


def post(running: Running, body: dict[str, Any]) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(f"{running.api}/completions", json.dumps(body).encode(), headers)


def test_a_full_queue_says_when_to_come_again(marker_bundle: Path) -> None:
    with serve_here(marker_bundle, rows=2, most_waiting=3) as running:
        replies = asyncio.run(ask_many(running.port, [order("c", 300)] * 12, 12))
        statuses = Counter(reply.status for reply in replies)
        assert statuses == {200: 5, 429: 7}
        for reply in replies:
            if reply.status == 429:
                assert reply.error is not None and reply.error["code"] == "queue_full"
                assert reply.retry_after is not None and int(reply.retry_after) >= 1
            else:
                assert reply.text == "c" * 300
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(post(running, order("a", 2) | {"n": 6}))
        assert error.value.code == 429, "more answers than rows and queue hold"
        assert asyncio.run(ask(running.port, COMPLETIONS, order("a", 2))).text == "aa"


def test_an_engine_that_fails_ends_its_answers_and_no_others(
    marker_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_here(marker_bundle, rows=4) as running:
        worker = running.worker
        advance = worker._desk._batch.advance

        def fail_once() -> Any:
            if worker.running == 3:
                raise RuntimeError("no memory")
            return advance()

        monkeypatch.setattr(worker._desk._batch, "advance", fail_once)
        replies = asyncio.run(ask_many(running.port, [order(letter, 200) for letter in "abc"], 3))
        assert all(reply.error is not None and reply.error["code"] == "engine_failed" for reply in replies)
        assert "no memory" in str(replies[0].error)
        assert asyncio.run(ask(running.port, COMPLETIONS, order("d", 3))).text == "ddd"
        assert is_idle(running)


def test_going_down_lets_answers_end_and_takes_no_new_ones(marker_bundle: Path) -> None:
    with serve_here(marker_bundle, rows=2, grace=30.0) as running:
        found: list[Reply] = []
        thread = threading.Thread(
            target=lambda: found.extend(asyncio.run(ask_many(running.port, [order("e", 800)] * 4, 4)))
        )
        thread.start()
        worker = running.worker
        wait_until(lambda: len(worker.under_way) == 4 and worker.running == 2)
        running.service.begin_drain()
        late = asyncio.run(ask(running.port, COMPLETIONS, order("f", 2)))
        assert late.status == 503 and late.error is not None and late.error["code"] == "shutting_down"
        with pytest.raises(urllib.error.HTTPError) as health:
            urllib.request.urlopen(f"{running.url}/health")
        assert health.value.code == 503
        thread.join(60)
        assert [reply.text for reply in found] == ["e" * 800] * 4


def test_grace_ends_and_who_still_waits_is_told(marker_bundle: Path) -> None:
    found: list[Reply] = []
    with serve_here(marker_bundle, rows=2, grace=0.0) as running:
        work = ask_many(running.port, [order("e", LONG)] * 6, 6)
        thread = threading.Thread(target=lambda: found.extend(asyncio.run(work)))
        thread.start()
        worker = running.worker
        wait_until(lambda: len(worker.under_way) == 6 and worker.running == 2)
    thread.join(30)
    assert [reply.error and reply.error["code"] for reply in found] == ["shutting_down"] * 6
    assert "6 answers were cut off" in running.said[-1]


def test_requests_share_what_the_original_model_reads(
    tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that acts from the generation prompt on: another skill reads the header of the same text alone."""
    monkeypatch.setattr("lime_edge.session.decoder.find_header", lambda _: 3)
    path = tiny_bundle()
    alone = lime_edge.open_decoder(path, threads=1)
    ids = [5 + place * 7 % 250 for place in range(40)]
    with serve_here(path) as running:
        worker = running.worker
        rows: Any = worker._desk._batch._rows
        feed, fed = rows.feed, list[int]()

        def count(row: int, given: Any, keep: int) -> Any:
            fed.append(len(given))
            return feed(row, given, keep)

        monkeypatch.setattr(rows, "feed", count)
        for skill, wanted in (("expert0", 40), ("expert1", 3), ("none", 3)):
            fed.clear()
            body = {"model": f"{running.service.shelves[0].name}:{skill}", "prompt": ids, "max_tokens": 6}
            reply = asyncio.run(ask(running.port, COMPLETIONS, body | {"ignore_eos": True}))
            alone.use(skill)
            assert reply.text == "".join(alone.generate(ids, max_new_tokens=6, ignore_eos=True)), skill
            assert sum(fed) == wanted, skill
