"""Do rows of a quantized bundle answer as sessions of their own? Teacher-forced next tokens, counted.

    python tools/rows_fidelity.py build/demo.lime [--rows 8] [--tokens 2000]

Every row has an expert of its own and reads the answer that a session alone gives, one token after another; the best
next token after each is compared, and where they differ, by how much the first was ahead of the second.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import lime_edge
from lime_edge.session.decoder import Session

LENGTH = 32  # tokens of an answer


def answer(session: Session, prompt: list[int], expert: str) -> tuple[list[int], list[np.ndarray]]:
    """A greedy answer, and the logits that each of its tokens was picked from."""
    session.use(expert)
    tokens, rows = [], [session.logits(prompt, keep=1)[-1].copy()]
    for _ in range(LENGTH):
        tokens.append(int(rows[-1].argmax()))
        rows.append(session.extend([tokens[-1]])[-1].copy())
    return tokens, rows


def compare(session: Session, rows: int, count: int) -> dict[str, float | int]:
    """Rounds of `rows` prompts until `count` tokens were compared."""
    draw, vocab = np.random.default_rng(0), session.logits([0], keep=1).shape[-1]
    same, total, equal_bits, margins, off = 0, 0, 0, [], 0.0
    while total < count:
        experts = draw.choice(session.experts, rows).tolist()
        prompts = [draw.integers(0, vocab, int(draw.integers(4, 40))).tolist() for _ in range(rows)]
        alone = [answer(session, prompt, expert) for prompt, expert in zip(prompts, experts, strict=True)]
        together = session.engine.open_rows(rows)  # type: ignore[attr-defined]
        handles = [together.start(session.identify(expert)[0]) for expert in experts]
        for handle, prompt in zip(handles, prompts, strict=True):
            together.feed(handle, np.array(prompt, np.int64), 1)
        for step in range(LENGTH):
            found = together.step(handles, [tokens[step] for tokens, _ in alone])
            for logits, (_, expected) in zip(found, alone, strict=True):
                wanted = expected[step + 1]
                total, same = total + 1, same + int(logits.argmax() == wanted.argmax())
                equal_bits += int(np.array_equal(logits, wanted))
                off = max(off, float(np.abs(logits - wanted).max() / wanted.std()))
                if logits.argmax() != wanted.argmax():
                    second, first = np.partition(wanted, -2)[-2:]
                    margins.append(float((first - second) / wanted.std()))
    return {
        "rows": rows,
        "tokens": total,
        "same": same,
        "share": same / total,
        "equal_to_the_bit": equal_bits,
        "largest_error_in_standard_deviations": off,
        "largest_lead_that_was_lost": max(margins, default=0.0),
    }


def main() -> None:
    """Print the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    session = lime_edge.open_decoder(arguments.bundle, target="onnx", threads=arguments.threads, max_length=128)
    print(json.dumps(compare(session, arguments.rows, arguments.tokens), indent=1))


if __name__ == "__main__":
    main()
