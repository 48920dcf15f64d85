"""lime-edge bench: latency and memory of a bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from lime_edge import terminal
from lime_edge.cli_options import BundlePath, ExpertOption, Json, Target, Threads

BENCH_EXAMPLES = """

[bold]Examples[/bold]

 lime-edge bench smollm2.lime --expert movie --threads 4

 lime-edge bench smollm2.lime --prompt-tokens 512 --gen-tokens 128 --repeat 10 --json
"""


def register(app: typer.Typer) -> None:
    """Add the command `bench`."""
    app.command(epilog=BENCH_EXAMPLES)(bench)


def bench(
    bundle: BundlePath,
    expert: ExpertOption = None,
    target: Target = None,
    threads: Threads = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the (random) prompt.")] = 128,
    gen_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded per round.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")] = 5,
    as_json: Json = False,
) -> None:
    """Time load, prefill, decode and switching; peak memory."""
    from lime_edge.bench import FIRST, BenchOptions, bench_bundle, print_report
    from lime_edge.experts import parse_selection

    selection = FIRST if expert is None else parse_selection(expert)
    options = BenchOptions(prompt_tokens, gen_tokens, repeat)
    with terminal.show_steps() as progress:
        facts = bench_bundle(bundle, target, selection, threads, options, progress)
    if as_json:
        terminal.print_json(facts)
    else:
        print_report(facts)
