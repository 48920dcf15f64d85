"""What batching gives a server: 8 clients with 8 skills against one client, first tokens included: `make bench-serve`.

    python tools/bench_serve.py build/demo.lime --threads 2
    python tools/bench_serve.py build/demo.lime --llama 8081      beside a llama-server that runs already

Serves the bundle in a process of its own. Each round asks with one client and then with all, so that a machine whose
speed drifts treats both alike; figures are medians over rounds. --llama names the port of a llama-server that holds the
same skills as LoRAs (`--lora a.gguf --lora b.gguf ... --lora-init-without-apply -np 8`): skill number k is its adapter
number k, chosen by the request's field `lora`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from serve_client import Reply, ask  # noqa: E402
from serve_process import start_server  # noqa: E402

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


def measure(port: int, body: Body, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Rounds of one client and of all clients: aggregate tokens per second, and times to the first token."""
    draw = random.Random(0)
    speeds: dict[int, list[float]] = {1: [], args.clients: []}
    first: dict[int, list[float]] = {1: [], args.clients: []}
    for turn in range(args.rounds + 1):
        for clients in speeds:
            for repeat in range(args.clients // clients):  # as many requests of either kind
                bodies = [body(repeat + client) for client in range(clients)]
                bodies = [one | {"prompt": draw_prompt(draw, args.words), "max_tokens": args.tokens} for one in bodies]
                seconds, replies = asyncio.run(ask_all(port, bodies))
                wrong = [reply for reply in replies if reply.error or reply.status != 200]
                if wrong:
                    raise SystemExit(f"a request failed: {wrong[0]}")
                if turn:  # the first warms up
                    speeds[clients].append(sum(reply.tokens for reply in replies) / seconds)
                    first[clients] += [1e3 * reply.first for reply in replies]
    return {
        f"{clients} clients": {
            "tokens_per_s": round(statistics.median(speeds[clients]), 1),
            "first_token_ms_p50": round(statistics.median(first[clients]), 1),
            "first_token_ms_p95": round(sorted(first[clients])[int(0.95 * (len(first[clients]) - 1))], 1),
        }
        for clients in speeds
    }


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
    parser.add_argument("--llama", type=int, help="port of a llama-server")
    args = parser.parse_args()
    server, port = start_server(args.bundle, "--threads", str(args.threads))
    try:
        skills = list_skills(port)
        found = {
            "lime-edge": measure(port, lambda k: {"model": skills[k % len(skills)], "ignore_eos": True}, args),
        }
    finally:
        server.terminate()
        server.wait(60)
    if args.llama:
        found["llama-server"] = measure(
            args.llama, lambda k: {"lora": [{"id": k, "scale": 1.0}], "ignore_eos": True}, args
        )
    one, many = (found["lime-edge"][f"{count} clients"]["tokens_per_s"] for count in (1, args.clients))
    facts = {
        "threads": args.threads,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "skills": min(len(skills), args.clients),
    }
    print(json.dumps(facts | found | {"ratio": round(many / one, 2)}, indent=1))


if __name__ == "__main__":
    main()
