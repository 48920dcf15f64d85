"""lime-edge export: a model and its adapter become a bundle."""

from __future__ import annotations

import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from lime_edge import terminal
from lime_edge.cli.flags import translate
from lime_edge.cli.options import TARGET_NAMES, Json, Quiet, complete_from, split_names
from lime_edge.cli.streams import receive
from lime_edge.cli.target_flags import Told, add_target_flags, read_told
from lime_edge.errors import Faults, LimeEdgeError, need
from lime_edge.targets.entries import DEFAULT, TARGETS

EXPORT_EXAMPLES = """

[bold]Examples[/bold]

 lime-edge export SmolLM2-135M/ --adapter my-adapter/ -o smollm2.lime

 lime-edge export model.gguf --adapter my-adapter/ -o pi.lime --device raspberry-pi --quant int8

 lime-edge export SmolLM2-135M/ --adapter my-adapter/ -o phone.lime --target executorch,coreml

 lime-edge export SmolLM2-135M/ --adapter my-adapter/ -o one.lime --fold movie --single

 lime-edge export SmolLM2-135M/ --adapter my-adapter/ -o small.lime --size 110MB --calibration prompts.jsonl
"""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(kB|MB|GB|B)?", re.IGNORECASE)
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
BAR = 40  # characters of a curve's longest bar


def register(app: typer.Typer) -> None:
    """Add the command `export`."""
    app.command(epilog=EXPORT_EXAMPLES)(add_target_flags(export))


def list_companions() -> str:
    """What --companion may name, and for whom: "genai (ONNX Runtime GenAI)"."""
    return ", ".join(f"{name} ({whom})" for one in TARGETS.values() for name, whom in one.companions.items())


def export(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory, or a GGUF file.")],
    adapter: Annotated[Path, typer.Option(help="LiME adapter directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write (OUT.lime).")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help=f"{', '.join(TARGETS).replace(',', ' (default),', 1)}: one or several.",
            autocompletion=TARGET_NAMES,
        ),
    ] = None,
    quant: Annotated[
        str,
        typer.Option(help="int4, int8 or none (float32).", autocompletion=complete_from("int4", "int8", "none")),
    ] = "int4",
    group_size: Annotated[
        int | None, typer.Option(help="Weights per int4 scale; the device's default otherwise.")
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            help="gptq (int4, calibrated), search or nearest.",
            autocompletion=complete_from("gptq", "search", "nearest"),
        ),
    ] = "gptq",
    calibration: Annotated[
        Path | None,
        typer.Option(help="JSONL of prompts like the ones to come (- is standard input); built-in text otherwise."),
    ] = None,
    keep_int8: Annotated[
        str, typer.Option(help="What int4 keeps at int8: some of head,qkv,o,gate_up,down, or none.")
    ] = "head,qkv,down",
    size: Annotated[
        str | None,
        typer.Option(
            metavar="110MB", help="Largest bundle: int8 goes where int4 would hurt the most, as far as it fits."
        ),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="The same by mean bits a weight, scales included: 4.5 to 8.5 or so.")
    ] = None,
    fold: Annotated[
        str, typer.Option(help="What goes into the weights: shared (mean of the experts), none, or NAME.")
    ] = "shared",
    single: Annotated[bool, typer.Option(help="With --fold NAME: that expert only, no branch.")] = False,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, raspberry-pi, jetson or android: defaults.",
            autocompletion=complete_from("cpu", "raspberry-pi", "jetson", "android"),
        ),
    ] = "cpu",
    any_backbone: Annotated[
        bool, typer.Option("--any-backbone", help="Take a model that the adapter was not trained on; inspect shows it.")
    ] = False,
    default: Annotated[
        str | None,
        typer.Option(metavar="NAME|routed|none", help="What the bundle opens with; the first expert otherwise."),
    ] = None,
    tokenizer: Annotated[bool, typer.Option(help="Put the tokenizer into the bundle.")] = True,
    companion: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help=f"Files for another engine beside an artifact: {list_companions()}."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    sites: Annotated[bool, typer.Option("--sites", help="List every site and how the experts survived there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    *,
    told: Told,
) -> None:
    """Compile a model and its LiME adapter into a bundle.

    Shows at the end how much of the experts' effect survived the rounding (error: 0 exact, 1 as loud as the
    expert; kept: share still there) and warns where the median error is above 1 or less than 75% was kept.
    """
    from lime_edge.targets.devices import find_device

    begin = time.perf_counter()
    chosen, targets = find_device(device), split_names(target) or [DEFAULT]
    refuse_hub_name(model)
    if find_spec("torch") is None:
        raise need("torch", "export")
    refuse_absent(model, adapter)
    try:
        from lime_edge.compiler.options import CompileOptions
        from lime_edge.export.pipeline import ExportOptions, export_bundle
    except ModuleNotFoundError as error:
        raise need(error.name or "torch", "export") from None
    kinds = () if keep_int8 == "none" else tuple(keep_int8.split(","))
    largest = None if size is None else read_size(size)
    compiling = CompileOptions(quant, group_size or chosen.group, fold, single, rounding, kinds, largest, bits)
    target_options = read_told(told, targets, chosen)
    with receive(calibration, ".jsonl") as prompts, terminal.show_steps() as progress:
        options = ExportOptions(
            tuple(targets),
            tokenizer,
            force,
            prompts,
            target_options,
            tuple(split_names(companion)),
            any_backbone,
            default,
        )
        export_bundle(model, adapter, output, compiling, chosen, options, progress)
    show_spending(output, as_json)
    show_result(output, as_json, sites, time.perf_counter() - begin)
    warn_of_losses(output)
    warn_of_overflow(output)
    report_delegation(output, as_json)


def read_size(text: str) -> int:
    """Bytes of "110MB", "0.5 GB" or "95000000".

    Raises:
        LimeEdgeError: something else.
    """
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise LimeEdgeError(f"`size`: expected bytes, kB, MB or GB, found {text!r}", "--size 110MB")
    return int(float(found[1]) * UNITS[(found[2] or "").lower()])


def show_spending(path: Path, as_json: bool) -> None:
    """The curve of an export by size: what the sizes it could have had would keep; the one taken is marked."""
    from lime_edge.bundle.bundle import Bundle

    spending = Bundle.open(path).manifest.quantization.spending
    if spending is None or as_json or terminal.is_quiet():
        return
    floor = min(point.same for point in spending.curve)
    scale = BAR / max(1e-6, 1 - floor)
    terminal.tell(f"size against tokens that float32 would have chosen ({spending.tokens} tokens of calibration text):")
    for point in spending.curve:
        bar = "#" * max(1, round((point.same - floor) * scale))
        mark = ">" if point.bytes == spending.chosen else " "
        terminal.tell(f"{mark} {point.bytes / 1e6:7.1f} MB  {point.same:6.1%}  {point.loss:.4f} nats  {bar}")
    terminal.tell(f"{spending.bits:.2f} bits a weight; int8: {describe_places(spending.int8)}")


def describe_places(names: tuple[str, ...]) -> str:
    """How many of each kind of matrix: "12 down_proj, 3 q_proj"."""
    kinds: dict[str, int] = {}
    for name in names:
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "nothing"


def show_result(path: Path, as_json: bool, sites: bool, seconds: float) -> None:
    """What was written, and what it took."""
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.checks.inspect import describe_bundle, print_bundle

    bundle, peak = Bundle.open(path), measure_peak()
    if as_json:
        taken = {"seconds": round(seconds, 2), "peak_rss_bytes": peak}
        terminal.print_json(describe_bundle(bundle) | {"export": taken})
    elif not terminal.is_quiet():
        print_bundle(bundle, sites)
        memory = f", {terminal.show_size(peak)} of memory at the peak" if peak else ""
        terminal.tell(f"exported in {seconds:.0f} s{memory}")


def measure_peak() -> int | None:
    """The most memory this process has held so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def refuse_hub_name(model: Path) -> None:
    """A name on the Hugging Face hub is no folder: say how to download it.

    Raises:
        LimeEdgeError: `model` looks like OWNER/NAME and is not there.
    """
    name = model.as_posix()
    if not model.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise LimeEdgeError(
            f"{name}: no such folder; lime-edge downloads nothing",
            f"if it is a model on the Hugging Face hub: hf download {name} --local-dir {model.name}\n"
            f"  then: lime-edge export {model.name} --adapter ...",
        )


def refuse_absent(model: Path, adapter: Path) -> None:
    """Say at once what is not there: importing torch to find out takes seconds.

    Raises:
        LimeEdgeError: with everything that is missing.
    """
    hint = "the model is a Hugging Face directory or a GGUF file, --adapter the folder of adapter_config.json"
    with Faults("export", hint) as faults:
        if not model.exists():
            faults.add(f"{model}: no such file or directory")
        if not adapter.exists():
            faults.add(f"{adapter}: no such adapter directory")


def warn_of_losses(path: Path) -> None:
    """Say on standard error where the rounding drowned the experts."""
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.checks.inspect import SURVIVAL_HINT, find_losses

    for line in find_losses(Bundle.open(path).manifest.quantization.survival):
        terminal.warn(line, translate(SURVIVAL_HINT))


def warn_of_overflow(path: Path) -> None:
    """Say on standard error where activations come within half of float16's limit in a target that computes in it."""
    from lime_edge.bundle.bundle import Bundle

    for target, facts in Bundle.open(path).manifest.targets.items():
        peak = facts.report.get("peak")
        if peak and not peak["value"] < peak["limit"] / 2:
            terminal.warn(
                f"{target}: {peak['site']} reaches {peak['value']:.0f}, float16 ends at {peak['limit']:.0f}",
                "compare with lime-edge verify, or take a target that computes in float32 (--target onnx)",
            )


def report_delegation(path: Path, as_json: bool) -> None:
    """Say what a target's backend took, and on standard error which hot operators it should have taken."""
    from lime_edge.bundle.bundle import Bundle

    for target, facts in Bundle.open(path).manifest.targets.items():
        backend = facts.providers[0]
        for name, count in facts.report.get("delegation", {}).items():
            if not as_json and not terminal.is_quiet():
                took = f"{count['delegated']} operators in {count['subgraphs']} subgraphs of {backend}"
                terminal.tell(f"{target} {name}: {took}, {count['undelegated']} outside")
            if count["fallen"]:
                fallen = ", ".join(f"{operator} ({times})" for operator, times in count["fallen"].items())
                terminal.warn(
                    f"{target} {name}: not taken by {backend}: {fallen}",
                    "these run on the slow portable kernels; please report the model",
                )
