"""Write tests/vectors/sampling.json: what every language must draw (docs/sampling.md).

    python tools/sampling_vectors.py [--check]

Every case is far from a border: no decision hangs on the last digits of exp, which libraries round differently.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lime_edge.session.sampling import SplitMix64, make_sampler, weigh

FILE = Path(__file__).parent.parent / "tests" / "vectors" / "sampling.json"
SEEDS = (0, 1, 1234567, 2**63, 2**64 - 1)
DRAWS = 24
MARGIN = 1e-7  # of all weight: nearer to a border than this, another seed is to be chosen
LONG, LONG_SEED = 50_000, 2026  # logits by rule: the upper 24 bits of each number, in steps of 2^-20
SMALL: dict[str, list[float]] = {
    "one": [0.5],
    "five": [1.5, -0.25, 3.0, 0.0, 2.75],
    "ties": [2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 1.0],
    "flat": [0.0] * 12,
    "masked": [1.0, float("-inf"), 2.0, float("-inf"), 0.5],
    "steep": [80.0, -80.0, 79.0, 78.5, -3.4e38],
}
CASES: list[tuple[str, float, int, float]] = [
    ("one", 1.0, 0, 1.0),
    ("five", 0.0, 0, 1.0),
    ("five", 1.0, 0, 1.0),
    ("five", 0.7, 3, 1.0),
    ("five", 1.3, 0, 0.9),
    ("five", 2.0, 4, 0.75),
    ("five", 1.0, 9, 0.3),
    ("ties", 0.0, 3, 1.0),
    ("ties", 1.0, 2, 1.0),
    ("ties", 1.0, 5, 1.0),
    ("ties", 0.5, 0, 0.6),
    ("flat", 1.0, 0, 0.5001),
    ("flat", 100.0, 7, 0.3),
    ("masked", 1.0, 0, 1.0),
    ("masked", 0.8, 4, 0.95),
    ("steep", 0.01, 0, 1.0),
    ("steep", 1000.0, 0, 0.999),
    ("long", 1.0, 0, 1.0),
    ("long", 0.8, 40, 0.95),
    ("long", 4.0, 0, 0.9),
    ("long", 0.0, 0, 1.0),
]


def make_logits(name: str) -> np.ndarray:
    """One row of logits (V,) float32."""
    if name != "long":
        return np.array(SMALL[name], np.float32)
    random = SplitMix64(LONG_SEED)
    return np.array([(random.next() >> 40) * 2.0**-20 for _ in range(LONG)], np.float32)


def check_margins(logits: np.ndarray, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Refuse a case that rounding could decide."""
    ids, weights = weigh(logits, temperature, top_k, top_p)
    sums = np.cumsum(weights)
    random = SplitMix64(seed)
    drawn = np.array([random.uniform() for _ in range(DRAWS)]) * sums[-1]
    assert np.abs(sums[:, None] - drawn).min() > MARGIN * sums[-1] / len(ids), "a draw near a border: take another seed"
    if top_p < 1:
        _, everything = weigh(logits, temperature, top_k, 1.0)
        order, goal = -np.sort(-everything), top_p * everything.sum()
        assert np.abs(np.cumsum(order) - goal).min() > MARGIN * goal / len(order), "a mass near its goal: change top_p"


def make_vectors() -> dict[str, Any]:
    """The document."""
    cases = []
    for index, (name, temperature, top_k, top_p) in enumerate(CASES):
        seed = SEEDS[index % len(SEEDS)] ^ (index * 0x1234567)
        logits = make_logits(name)
        case: dict[str, Any] = {"logits": name, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        if temperature:
            check_margins(logits, temperature, top_k, top_p, seed)
            case |= {"kept": len(weigh(logits, temperature, top_k, top_p)[0])}
        pick = make_sampler(temperature, top_k, top_p, seed)
        cases.append(case | {"seed": str(seed), "tokens": [pick(logits) for _ in range(DRAWS)]})
    generator = []
    for seed in SEEDS:
        numbers, uniforms = SplitMix64(seed), SplitMix64(seed)
        generator.append(
            {
                "seed": str(seed),
                "numbers": [str(numbers.next()) for _ in range(8)],
                "uniform": [uniforms.uniform() for _ in range(8)],
            }
        )
    return {
        "about": "docs/sampling.md; seeds and 64-bit numbers are strings, '-inf' too; logits are float32",
        "generator": generator,
        "logits": {name: ["-inf" if v == float("-inf") else v for v in row] for name, row in SMALL.items()},
        "long": {"count": LONG, "seed": str(LONG_SEED), "rule": "(next >> 40) * 2^-20"},
        "cases": cases,
    }


def to_text(vectors: dict[str, Any]) -> str:
    """One line a case."""
    lines = []
    for key, value in vectors.items():
        if isinstance(value, list):
            inner = ",\n".join(f"  {json.dumps(one)}" for one in value)
            lines.append(f"{json.dumps(key)}: [\n{inner}\n ]")
        elif isinstance(value, dict) and key == "logits":
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def main() -> None:
    """Write the file, or with --check compare it."""
    text = to_text(make_vectors())
    if "--check" in sys.argv[1:]:
        sys.exit(FILE.read_text(encoding="utf-8") != text)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
