"""Next tokens of the float32 oracle, teacher-forced over the demo's evaluation texts, and how often a bundle agrees.

    python tools/oracle_tokens.py make build/oracle.json BUNDLE      # needs torch and the real model; a minute
    python tools/oracle_tokens.py compare build/oracle.json BUNDLE   # needs the bundle alone, on any provider

The oracle is the backbone as `transformers` builds it with the adapter unfolded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import lime_edge
from lime_edge.checks.evaluate import read_examples

DEMO = Path("examples/demo_adapter")
POSITIONS = 2000


def make(out: Path, bundle: Path) -> None:
    """Texts of every expert in turn, prompt and answer, until there are POSITIONS tokens to predict."""
    import torch
    from fidelity import load_reference, unfold
    from tokenizers import Tokenizer

    from lime_edge.cli.demo import find_backbone

    reference = unfold(load_reference(find_backbone()), DEMO / "adapter")
    names = json.loads((DEMO / "adapter" / "adapter_config.json").read_text())["expert_names"]
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer" / "tokenizer.json"))
    examples = {name: read_examples(DEMO / "eval" / f"{name}.jsonl") for name in names}
    texts: list[dict[str, Any]] = []
    number = 0
    while sum(len(text["next"]) for text in texts) < POSITIONS:
        for index, name in enumerate(names):
            example = examples[name][number]
            ids = tokenizer.encode(example.prompt + example.answer, add_special_tokens=False).ids
            reference.use(index)
            with torch.no_grad():
                logits = reference.logits({"input_ids": torch.tensor([ids])})[0]
            texts.append({"expert": name, "ids": ids, "next": logits.argmax(-1).tolist()})
        number += 1
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(texts))


def compare(oracle: Path, bundle: Path, **options: Any) -> dict[str, Any]:
    """Share of equal next tokens, whole texts at once as the oracle read them.

    Args:
        options: for `lime_edge.open_decoder`.
    """
    same = total = 0
    with lime_edge.open_decoder(bundle, **options) as session:
        for text in json.loads(oracle.read_text()):
            session.use(text["expert"])
            found = session.logits(text["ids"]).argmax(-1)
            same += int((found == np.array(text["next"])).sum())
            total += len(text["next"])
        provider = session.provider
    return {"provider": provider, "tokens": total, "equal": same / total}


def main() -> None:
    """One of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "compare"])
    parser.add_argument("oracle", type=Path)
    parser.add_argument("bundle", type=Path)
    given = parser.parse_args()
    if given.command == "make":
        make(given.oracle, given.bundle)
    else:
        print(json.dumps(compare(given.oracle, given.bundle)))


if __name__ == "__main__":
    main()
