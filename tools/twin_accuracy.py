"""The activated twin of the demo adapter beside the first: exact answers per task, on a bundle's own runtime.

    python tools/twin_accuracy.py build/activated.lime [--limit 150] [--threads 2] > answers.json

Every test input of examples/demo_adapter/eval is answered by its task's own expert, 16 rows at a time
(`Session.generate_many`), and compared as `lime-edge eval` compares: exact match after strip, 16 new tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lime_edge
from lime_edge.checks.evaluate import read_examples

TESTS = Path("examples/demo_adapter/eval")
NEW_TOKENS = 16


def measure(bundle: Path, limit: int, threads: int | None) -> dict[str, float]:
    """Accuracy per task."""
    session = lime_edge.open_decoder(bundle, target="onnx", threads=threads, max_length=512)
    tests = {name: read_examples(TESTS / f"{name}.jsonl")[:limit] for name in session.experts}
    asked = [(name, example) for name, examples in tests.items() for example in examples]
    texts = [""] * len(asked)
    requests = [(example.prompt, name) for name, example in asked]
    for row, piece in session.generate_many(requests, max_new_tokens=NEW_TOKENS):
        texts[row] += piece
    right = dict.fromkeys(tests, 0)
    for (name, example), text in zip(asked, texts, strict=True):
        right[name] += text.strip() == example.answer.strip()
    return {name: right[name] / len(examples) for name, examples in tests.items()}


def main() -> None:
    """Print the accuracies and their mean as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--limit", type=int, default=150, help="examples of each task")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    found = measure(arguments.bundle, arguments.limit, arguments.threads)
    print(json.dumps({"bundle": arguments.bundle.name, "mean": sum(found.values()) / len(found), **found}, indent=1))


if __name__ == "__main__":
    main()
