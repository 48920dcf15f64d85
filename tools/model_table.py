"""Writes docs/models.md and docs/models.json: every decoder family on every target, proved by the tests' own proofs.

    python tools/model_table.py [--target TARGET]... [--family FAMILY]...     prove, and write what came of it
    python tools/model_table.py --render                                      write the page anew, and prove nothing

A family's error on torch, ONNX and Core ML is the worst of all its cases in tests/families.py; on ExecuTorch, whose
lowering takes a minute, that of the first. A run of some targets or families leaves the others' rows as they are.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from families import LIMITS, PROOFS, list_cases  # noqa: E402
from models import Case, make_adapter, make_model  # noqa: E402

from lime_edge.compiler.formats.architecture import ROPE_TYPES  # noqa: E402
from lime_edge.compiler.formats.families import FAMILIES, UNSUPPORTED, WRAPPED  # noqa: E402
from lime_edge.compiler.options import CompileOptions  # noqa: E402
from lime_edge.export.pipeline import ExportOptions, export_bundle  # noqa: E402
from lime_edge.targets.devices import find_device  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "models.md", ROOT / "docs" / "models.json"
TITLES = {"torch": "PyTorch", "onnx": "ONNX", "executorch": "ExecuTorch", "coreml": "Core ML"}
HEAD = """# Models

<!-- made by tools/model_table.py -->

Decoder language models that `lime-edge export` takes, by the `model_type` of their config.json. A row is what a run of
`python tools/model_table.py` measured on tiny random models (odd numbers of heads, tied and untied, with and without
biases, texts longer than their windows): the worst difference of a logit from `transformers`, relative to the largest
logit where that is above 1; float32. Greedy text with a cache is the same, token for token, in every case; so are a
pinned expert and no expert against `transformers` with unfolded LiME layers. Core ML's column compares the program with
the same float16 weights in PyTorch. ExecuTorch's is of the family's first case, the others' are of all.
"""
TAIL = """
The text part of {wrapped} is read as a decoder; its images are not.

RoPE: {ropes}. With `longrope` a bundle has the
original context: beyond it the frequencies of all tokens change, those in the cache among them. With `dynamic` nothing
changes within the context that config.json names, and a bundle has no other. A model whose config says more than the
decoder does (attention that looks ahead, another activation) is refused with the field's name.

Encoders and vision models are `transformers` modules with their linear layers replaced, and have no such list.

## Not supported

Refused by name, with the reason:

{refused}

Any other `model_type` is refused too: [adding a family](add-a-model-family.md) is often one function.

## Files

| form | read |
|---|---|
| `model.safetensors`, or its shards with an index | yes: float32, float16, bfloat16 |
| `pytorch_model.bin`, or its shards with an index | yes, without running code of the file |
| GGUF | yes, what `transformers` reads of it; dequantized |
| FP8 (blocks, rows or whole matrices, with their scales) | yes: a weight times its scale |
| GPTQ, AWQ, bitsandbytes, other compressed-tensors | no: one sentence says to take the original checkpoint |
"""
Rows = dict[str, dict[str, dict[str, Any]]]


def prove(family: str, target: str) -> dict[str, Any]:
    """A family's cases on a target: the worst error, and how many there were; a refusal is said in its words."""
    cases = list_cases(family)
    chosen = dict(list(cases.items())[:1]) if target == "executorch" else cases
    errors = [prove_case(case, target) for case in chosen.values()]
    worst = max(errors)
    assert worst < LIMITS[target], f"{family} on {target}: {worst:.3g}"
    return {"error": float(f"{worst:.2g}"), "cases": len(errors)}


def prove_case(case: Case, target: str) -> float:
    """One case's error on a target."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", case.family, **case.changes)
        adapter = make_adapter(Path(folder) / "adapter", model, targets=case.targets, shared=case.shared)
        bundle = Path(folder) / "made.lime"
        if target != "torch":
            options, device = CompileOptions(quant="none"), find_device("cpu")
            export_bundle(model, adapter, bundle, options, device, ExportOptions((target,)))
        return PROOFS[target](model, adapter, bundle)


def describe(family: str) -> tuple[str, str]:
    """A family's name and what makes it one, from its function's docstring."""
    first = (inspect.getdoc(FAMILIES[family]) or "").split("\n")[0]
    name, _, facts = first.partition(": ")
    return name, facts.rstrip(".")


def render(rows: Rows) -> str:
    """The page."""
    lines = [HEAD, "| model_type | what it is | cases | " + " | ".join(TITLES.values()) + " |"]
    lines.append("|---|---|---|" + "---|" * len(TITLES))
    for family in FAMILIES:
        found = rows.get(family, {})
        shown = [f"{found[target]['error']:.1e}" if target in found else "not run" for target in TITLES]
        name, facts = describe(family)
        cases = found.get("torch", {}).get("cases", 0)
        lines.append(f"| `{family}` | {name}: {facts} | {cases} | {' | '.join(shown)} |")
    ropes = ", ".join(f"`{kind}`" for kind in ROPE_TYPES)
    wrapped = ", ".join(f"`{family}`" for family in WRAPPED)
    refused = [
        f"* {reason}: {', '.join(f'`{family}`' for family in families)}" for reason, families in UNSUPPORTED.items()
    ]
    lines.append(TAIL.format(wrapped=wrapped, ropes=ropes, refused="\n".join(refused)))
    return "\n".join(lines)


def main() -> None:
    """Prove, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=[*TITLES])
    parser.add_argument("--family", action="append", choices=[*FAMILIES])
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    rows: Rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for target in [] if args.render else args.target or [*TITLES]:
        for family in args.family or [*FAMILIES]:
            rows.setdefault(family, {})[target] = prove(family, target)
            print(f"{family} on {target}: {rows[family][target]}", flush=True)
            write(rows)
    write(rows)


def write(rows: Rows) -> None:
    """Both files, families in the code's order."""
    kept = {family: rows[family] for family in FAMILIES if family in rows}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
