"""lime-edge eval: how often an expert is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lime_edge import terminal
from lime_edge.cli.options import BundlePath, ExpertOption, Json, Quiet, Target, Threads
from lime_edge.cli.run import open_bundle
from lime_edge.cli.streams import receive

EXAMPLES = """

[bold]Examples[/bold]

 lime-edge eval smollm2.lime --expert movie --data eval/movie.jsonl

 lime-edge eval int4.lime --expert movie --data eval/movie.jsonl --against float32.lime --json

 head -n 20 eval/movie.jsonl | lime-edge eval smollm2.lime --expert movie --data -
"""


def register(app: typer.Typer) -> None:
    """Add the command `eval`."""
    app.command("eval", epilog=EXAMPLES)(evaluate)


def evaluate(
    bundle: BundlePath,
    data: Annotated[
        Path, typer.Option(help='JSONL: {"prompt", "answer", "labels"?, "image"?} a line; - reads standard input.')
    ],
    expert: ExpertOption = None,
    target: Target = None,
    threads: Threads = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N examples.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another bundle: report how often both answer the same.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Write every answer to this JSONL file.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Accuracy of an expert on prompts with answers."""
    from lime_edge.bundle.experts import describe_selection, parse_selection
    from lime_edge.checks import evaluate as scoring

    with receive(data, ".jsonl") as file:
        examples = scoring.read_examples(file)[:limit]
    selection = None if expert is None else parse_selection(expert)
    results = []
    for path in [bundle] + ([against] if against else []):
        session = open_bundle(path, target, threads)
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
