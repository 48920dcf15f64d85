"""Load a server whose skills show in their answers, and count what went wrong: `make soak-serve`.

    python tools/serve_load.py --requests 2000             32 clients, 16 skills
    python tools/serve_load.py --minutes 120 --kill 0.1    a tenth of the clients leave mid-stream

Makes a marker bundle (tests/serving.py: skill number k answers with the k-th letter, whatever is asked), serves it in
a process of its own, asks it, and ends it by SIGTERM under load. Prints figures as JSON; the exit code is 1 where an
answer was lost or another skill's, where memory grew, where rows stayed taken, or where the server's own was not 0.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

from serve_client import Reply, ask  # noqa: E402
from serve_process import start_server  # noqa: E402
from serving import LETTERS, make_marker_bundle  # noqa: E402

SLACK = 24 << 20  # bytes that the server may grow by after its first tenth
SETTLE = 5.0  # seconds in which rows have to be free after the last client left


@dataclass
class Tally:
    """What came of all requests. wrong: answers that another skill gave, or nobody."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    tokens: int = 0

    def note(self, letter: str, wanted: int, reply: Reply) -> None:
        """Judge an answer of `wanted` tokens, each of which should be `letter`."""
        if reply.status == 429:
            self.ended["busy"] += 1
        elif reply.status != 200 or reply.error is not None:
            self.ended["failed"] += 1
            self.wrong.append(f"status {reply.status}: {reply.error}")
        elif reply.cut and reply.text == letter * len(reply.text):
            self.ended["killed"] += 1
        elif reply.text != letter * wanted:
            self.ended["wrong"] += 1
            self.wrong.append(f"expected {wanted} of {letter!r}, found {reply.text[:80]!r} ({reply.reason})")
        else:
            self.ended["right"] += 1
            self.first.append(reply.first)
            self.seconds.append(reply.seconds)
            self.tokens += wanted

    def percentile(self, values: list[float], share: float) -> float:
        """A value that `share` of them do not exceed."""
        return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


async def load(port: int, args: argparse.Namespace, pid: int) -> Tally:
    """Let clients ask until there were `requests`, or `minutes` are over."""
    tally, numbers, end = Tally(), itertools.count(), time.monotonic() + args.minutes * 60

    async def be_client(seed: int) -> None:
        draw = random.Random(seed)
        while (next(numbers) < args.requests) if args.requests else (time.monotonic() < end):
            place = draw.randrange(len(LETTERS))
            cut = draw.randrange(1, 8) if draw.random() < args.kill else None
            wanted = 400 if cut else draw.randrange(1, args.tokens + 1)
            await ask_once(tally, port, place, wanted, cut, draw)

    async def watch() -> None:
        while True:
            tally.memory.append(read_memory(pid))
            await asyncio.sleep(max(0.2, args.minutes / 10))

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(be_client(seed) for seed in range(args.clients)))
    watching.cancel()
    return tally


async def ask_once(tally: Tally, port: int, place: int, wanted: int, cut: int | None, draw: random.Random) -> None:
    """One request, asked again while the queue is full."""
    letter, text = LETTERS[place], "".join(draw.choices("etaoin shrdlu", k=draw.randrange(1, 200)))
    skill = f"skill-{letter}"
    body: dict[str, Any] = {"max_tokens": wanted, "ignore_eos": True, "prompt": text}
    body |= {"model": f"marker:{skill}"} if draw.random() < 0.5 else {"model": "marker", "lime": {"expert": skill}}
    while True:
        reply = await ask(port, "/v1/completions", body, cut)
        tally.note(letter, wanted, reply)
        if reply.status != 429:
            return
        await asyncio.sleep(0.1 * draw.random())


def read_memory(pid: int) -> int:
    """Resident bytes of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def read_metric(port: int, name: str) -> float:
    """A gauge of the server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        found = re.search(rf"^lime_edge_{name} (\S+)", reply.read().decode(), re.M)
    assert found is not None, name
    return float(found[1])


async def end_under_load(server: subprocess.Popen[str], port: int, grace: float) -> tuple[Counter[str], float]:
    """SIGTERM while 24 long answers run: how each of them ended, and after how many seconds the server did."""
    body = {"model": "marker:skill-c", "prompt": "x", "max_tokens": 1500, "ignore_eos": True}
    clients = [asyncio.create_task(ask(port, "/v1/completions", body)) for _ in range(24)]
    while await asyncio.to_thread(read_metric, port, "rows_running") < 16:
        await asyncio.sleep(0.01)
    began = time.monotonic()
    server.send_signal(signal.SIGTERM)
    replies = await asyncio.gather(*clients, return_exceptions=True)
    await asyncio.to_thread(server.wait, grace + 10)
    return Counter(describe_end(reply) for reply in replies), time.monotonic() - began


def describe_end(reply: Reply | BaseException) -> str:
    """How an answer ended when the server was told to go."""
    if isinstance(reply, BaseException):
        return f"lost: {type(reply).__name__}"
    if reply.error is not None:
        return f"told: {reply.error['code']}"
    if reply.reason:
        return "ended" if set(reply.text) == {"c"} else "wrong"
    return "lost: no reason"


def main() -> None:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=0, help="in all; 0: for so many minutes")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=24, help="of an answer at most")
    parser.add_argument("--kill", type=float, default=0.0, help="share of the clients that leave mid-stream")
    parser.add_argument("--grace", type=float, default=2.0, help="seconds that the server gives running answers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_marker_bundle(Path(folder) / "made")
        server, port = start_server(bundle, "--threads", "1", "--grace", str(args.grace), "--prefix-memory", "8")
        try:
            began = time.monotonic()
            tally = asyncio.run(load(port, args, server.pid))
            seconds = time.monotonic() - began
            time.sleep(SETTLE if args.kill else 0.5)
            taken = read_metric(port, "rows_running")
            ended, took = asyncio.run(end_under_load(server, port, args.grace))
        finally:
            server.kill()
    early = max(tally.memory[: max(1, len(tally.memory) // 10)])
    growth = tally.memory[-1] - early
    faults = tally.wrong[:5]
    faults += [f"{taken:.0f} rows are still taken"] if taken else []
    faults += [f"memory grew by {growth >> 20} MB"] if growth > SLACK else []
    faults += [f"exit code {server.returncode}"] if server.returncode else []
    faults += [f"{count} answers {end}" for end, count in ended.items() if end.startswith(("lost", "wrong"))]
    first, whole = tally.first, tally.seconds
    figures = {
        "clients": args.clients,
        "answers": dict(tally.ended),
        "seconds": round(seconds, 1),
        "requests_per_s": round(sum(tally.ended.values()) / seconds, 1),
        "tokens_per_s": round(tally.tokens / seconds, 1),
        "first_token_ms": {f"p{p}": round(1e3 * tally.percentile(first, p / 100), 1) for p in (50, 95)},
        "answer_ms": {f"p{p}": round(1e3 * tally.percentile(whole, p / 100), 1) for p in (50, 95)},
        "resident_mb": {"after a tenth": early >> 20, "at the end": tally.memory[-1] >> 20},
        "rows_taken_afterwards": taken,
        "sigterm": {"answers": dict(ended), "seconds": round(took, 1), "exit_code": server.returncode},
        "faults": faults,
    }
    print(json.dumps(figures, indent=1))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
