"""The Python side of runtimes/kotlin's SpeedTest: one round of decoding and switching for every line on stdin.

    python tools/phone_vectors/speed.py BUNDLE NEW SWITCHES PROMPT_ID [PROMPT_ID ...]

A line of JSON answers each: milliseconds per decoded token, and microseconds of each switch.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import lime_edge
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions


def main() -> None:
    """Open the bundle once; a round for every line."""
    bundle, new, switches, *prompt = sys.argv[1:]
    session = lime_edge.open_decoder(Path(bundle), threads=1)
    for line in sys.stdin:
        print(json.dumps(run_round(session, list(map(int, prompt)), int(new), int(switches), int(line))), flush=True)


def run_round(session: Session, prompt: list[int], new: int, switches: int, seed: int) -> dict[str, Any]:
    """Decode greedily, then switch between random experts.

    Args:
        new: tokens to decode; the time is that between the first and the last. seed: of the choice of experts.
    """
    session.use(session.experts[0])
    stamps = [
        perf_counter() for _ in session.generate_ids(prompt, GenerationOptions(max_new_tokens=new, ignore_eos=True))
    ]
    session.reset()
    draw, times = random.Random(seed), []
    for _ in range(switches):
        name = draw.choice(session.experts)
        begin = perf_counter()
        session.use(name)
        times.append((perf_counter() - begin) * 1e6)
    return {"decode_ms": (stamps[-1] - stamps[0]) * 1e3 / (new - 1), "switch_us": times}


if __name__ == "__main__":
    main()
