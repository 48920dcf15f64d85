"""The activated twin of the demo adapter beside the first: exact answers per task, on a bundle's own runtime.

    python tools/twin_accuracy.py "always, int4=build/demo.lime" "activated, int4=build/activated.lime" [--write]

Every test input of examples/demo_adapter/eval is answered by its task's own expert, 16 rows at a time
(`Session.generate_many`), and compared as `lime-edge eval` compares: exact match after strip, 16 new tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from accuracy_report import write_twin

import lime_edge
from lime_edge.bench.machine import describe_machine
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
    """Print the accuracies and their means as JSON; --write puts them into docs/accuracy.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--limit", type=int, default=150, help="examples of each task")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    found = {}
    for word in arguments.bundles:
        name, bundle = word.rsplit("=", 1)
        tasks = measure(Path(bundle), arguments.limit, arguments.threads)
        found[name] = {"mean": sum(tasks.values()) / len(tasks)} | tasks
    machine = describe_machine()
    words = " ".join(f'"{word}"' for word in arguments.bundles)
    facts = {
        "command": f"python tools/twin_accuracy.py {words} --limit {arguments.limit}",
        "machine": f"{machine['cpu']}, {machine['cores']} cores",
        "bundles": found,
    }
    print(json.dumps(facts, indent=1))
    if arguments.write:
        write_twin(facts, Path("docs"))


if __name__ == "__main__":
    main()
