"""Another language's session beside Python's on the same bundle, round by round in turn.

    python tools/phone_vectors/in_turn.py BUNDLE -- COMMAND...

COMMAND reads the number of a round from its input, a line each, and answers each with a line `round: {...}` as
`speed.py` does. It measures and judges nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS, WARMUP = 15, 2
NEW, SWITCHES = 65, 200
PROMPT = [50 + 37 * at % 1000 for at in range(32)]
Process = subprocess.Popen[str]


def main() -> None:
    """Run both and print what came of it."""
    bundle, _, *command = sys.argv[1:]
    speed = Path(__file__).with_name("speed.py")
    prompt = [str(token) for token in PROMPT]
    python = start([sys.executable, str(speed), bundle, str(NEW), str(SWITCHES), *prompt])
    other = start(command)
    try:
        rounds = [(ask(python, number, ""), ask(other, number, "round: ")) for number in range(ROUNDS + WARMUP)]
    finally:
        for process in (python, other):
            assert process.stdin
            process.stdin.close()
            process.wait(timeout=60)
    report(rounds[WARMUP:])


def start(command: list[str]) -> Process:
    """A process that is asked line by line."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: Process, number: int, mark: str) -> dict[str, Any]:
    """One round's answer: the first line that begins with `mark`."""
    assert process.stdin and process.stdout
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith(mark):
            return json.loads(line.removeprefix(mark))
    raise SystemExit(f"{process.args!r}: ended before its answer to round {number}")


def report(rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Decode times, their ratio within a round, and switches."""
    ratios = [other["decode_ms"] / python["decode_ms"] for python, other in rounds]
    print("decoding, ms a token, Python:", spread([python["decode_ms"] for python, _ in rounds]))
    print("decoding, ms a token, the other:", spread([other["decode_ms"] for _, other in rounds]))
    print(f"decoding, its time over Python's: {spread(ratios)}, {len(rounds)} rounds in turn")
    for name, side in (("Python", 0), ("the other", 1)):
        times = [time for both in rounds for time in both[side]["switch_us"]]
        p50, p95, p99 = np.percentile(times, [50, 95, 99])
        print(f"switching, us, {name}: p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} of {len(times)}")


def spread(values: list[float]) -> str:
    """Median, and where most lie."""
    low, middle, high = np.percentile(values, [5, 50, 95])
    return f"{middle:.3f} (5 to 95 in 100: {low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
