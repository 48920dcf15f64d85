"""What batching gives a server: 8 clients with 8 skills against one client, first tokens included: `make bench-serve`.

    python tools/bench_serve.py build/demo.lime --threads 2
    python tools/bench_serve.py build/demo.lime --llama-server llama-server --llama-model q4_0.gguf --llama-loras loras/

Serves the bundle in a process of its own. Each round asks with one client and then with all, so that a machine whose
speed drifts treats both alike; figures are medians over rounds, with the range of the ratios inside a round. decode:
tokens after the first of all clients, over the time from the first of them to the end. --llama-server starts one that
holds the same skills as LoRAs (`lime-edge experts export ADAPTER NAME --format gguf --model BASE -o loras/NAME.gguf`),
as many rows as clients and as many threads; a request's field `lora` chooses. Both servers run, one is asked at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from serve_client import Reply, ask  # noqa: E402
from serve_process import start_server  # noqa: E402

from lime_edge.bench.machine import describe_machine  # noqa: E402

PATH = "/v1/completions"
WORDS = ["river", "stone", "paper", "cloud", "window", "garden", "engine", "mirror", "copper", "winter", "signal"]
Body = Callable[[int], dict[str, Any]]


def draw_prompt(draw: random.Random, words: int) -> str:
    """A text that no request before has had, so that no kept beginning helps."""
    return " ".join(draw.choices(WORDS, k=words))


async def ask_all(port: int, bodies: list[dict[str, Any]]) -> tuple[float, list[Reply]]:
    """All at once: seconds until the last has its answer, and the answers."""
    began = time.perf_counter()
    replies = await asyncio.gather(*(ask(port, PATH, body) for body in bodies))
    return time.perf_counter() - began, list(replies)


@dataclass
class Found:
    """What the rounds gave: tokens per second, one number a round; ms to the first token, one a request."""

    speeds: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def describe(self) -> dict[str, float]:
        """Medians, and the 95th percentile of first tokens."""
        return {
            "tokens_per_s": round(statistics.median(self.speeds), 1),
            "decode_tokens_per_s": round(statistics.median(self.decode), 1),
            "first_token_ms_p50": round(statistics.median(self.first), 1),
            "first_token_ms_p95": round(sorted(self.first)[int(0.95 * (len(self.first) - 1))], 1),
        }


def ask_round(port: int, body: Body, clients: int, args: argparse.Namespace, draw: random.Random) -> Found:
    """One client after another, or all at once: as many requests either way."""
    speeds, decode, found = [], [], Found()
    for repeat in range(args.clients // clients):
        bodies = [body(repeat + client) for client in range(clients)]
        bodies = [one | {"prompt": draw_prompt(draw, args.words), "max_tokens": args.tokens} for one in bodies]
        seconds, replies = asyncio.run(ask_all(port, bodies))
        wrong = [reply for reply in replies if reply.error or reply.status != 200 or reply.tokens < args.tokens]
        if wrong:
            raise SystemExit(f"a request failed: {wrong[0]}")
        speeds.append(sum(reply.tokens for reply in replies) / seconds)
        decode.append(sum(reply.tokens - 1 for reply in replies) / (seconds - min(reply.first for reply in replies)))
        found.first += [1e3 * reply.first for reply in replies]
    found.speeds, found.decode = [statistics.mean(speeds)], [statistics.mean(decode)]
    return found


def measure(servers: dict[str, tuple[int, Body]], args: argparse.Namespace) -> dict[str, dict[int, Found]]:
    """Rounds that alternate over servers and numbers of clients; the first one warms up."""
    draw = random.Random(0)
    found = {name: {1: Found(), args.clients: Found()} for name in servers}
    for turn in range(args.rounds + 1):
        for name in list(servers)[:: 1 if turn % 2 else -1]:
            for clients, kept in found[name].items():
                new = ask_round(*servers[name], clients, args, draw)
                if turn:
                    kept.speeds += new.speeds
                    kept.decode += new.decode
                    kept.first += new.first
    return found


def compare(upper: list[float], lower: list[float]) -> dict[str, float]:
    """The median of the ratio inside a round, and its range."""
    ratios = [a / b for a, b in zip(upper, lower, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 2),
        "least": round(min(ratios), 2),
        "most": round(max(ratios), 2),
    }


def start_llama(args: argparse.Namespace, skills: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """A llama-server with the skills of the first clients as LoRAs, adapter number k being skill number k."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    loras = [args.llama_loras / f"{skill.split(':')[1]}.gguf" for skill in skills[: args.clients]]
    room = str(args.clients * (4 * args.words + args.tokens + 64))
    words = ["-m", str(args.llama_model), "--port", str(port), "-np", str(args.clients), "-c", room]
    words += ["-t", str(args.threads), "--lora", ",".join(map(str, loras)), "--lora-init-without-apply"]
    server = subprocess.Popen([str(args.llama_server), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return server, port
        except OSError:
            time.sleep(0.25)
    server.kill()
    raise SystemExit("llama-server did not start: run it by hand to see why")


def list_skills(port: int) -> list[str]:
    """Models that name an expert."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as reply:
        ids = [model["id"] for model in json.load(reply)["data"]]
    return [name for name in ids if ":" in name and not name.endswith((":none", ":routed"))]


def main() -> None:
    """Run and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--words", type=int, default=48, help="of a prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server program")
    parser.add_argument("--llama-model", type=Path, help="its model, as GGUF")
    parser.add_argument("--llama-loras", type=Path, help="a folder with NAME.gguf of every skill")
    args = parser.parse_args()
    server, port = start_server(args.bundle, "--threads", str(args.threads))
    running: list[subprocess.Popen[Any]] = [server]
    try:
        skills = list_skills(port)
        servers: dict[str, tuple[int, Body]] = {
            "lime-edge": (port, lambda k: {"model": skills[k % len(skills)], "ignore_eos": True})
        }
        if args.llama_server:
            other, llama_port = start_llama(args, skills)
            running.append(other)
            servers["llama-server"] = (llama_port, lambda k: {"lora": [{"id": k, "scale": 1.0}], "ignore_eos": True})
        found = measure(servers, args)
    finally:
        for one in running:
            one.terminate()
            one.wait(60)
    print(json.dumps(describe(found, args, len(skills)), indent=1))


def describe(found: dict[str, dict[int, Found]], args: argparse.Namespace, skills: int) -> dict[str, Any]:
    """Everything that is printed."""
    facts = {key: getattr(args, key) for key in ("threads", "tokens", "words", "rounds")}
    facts |= {"skills": min(skills, args.clients), "machine": describe_machine()}
    for name, rounds in found.items():
        facts[name] = {f"{clients} clients": one.describe() for clients, one in rounds.items()}
        facts[name]["all against one"] = compare(rounds[args.clients].speeds, rounds[1].speeds)
    if len(found) == 2:
        ours, theirs = (one[args.clients] for one in found.values())
        facts["beside llama-server"] = {
            "all": compare(ours.speeds, theirs.speeds),
            "decode": compare(ours.decode, theirs.decode),
        }
    return facts


if __name__ == "__main__":
    main()
