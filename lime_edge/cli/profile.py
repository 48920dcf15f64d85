"""lime-edge experts profile: a routed checkpoint's behaviour on one task as one pinned expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lime_edge import terminal
from lime_edge.cli.options import Json, Quiet
from lime_edge.cli.streams import receive

EXAMPLES = """

[bold]Example[/bold]

 lime-edge experts profile routed.lime --model SmolLM2-135M/ --adapter routed-adapter/ --data task.jsonl --name task
"""


def register(experts_app: typer.Typer) -> None:
    """Add the command `profile`."""
    experts_app.command("profile", epilog=EXAMPLES)(profile)


def profile(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle of the routed checkpoint.")],
    model: Annotated[Path, typer.Option(help="The backbone it was exported from.")],
    adapter: Annotated[Path, typer.Option(help="The adapter it was exported from.")],
    data: Annotated[
        Path, typer.Option(help='The task: JSONL, {"prompt", "answer", "labels"?} a line; - is standard input.')
    ],
    name: Annotated[str, typer.Option(help="Name of the new expert.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N examples.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an expert of the same name.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Average the routing over a task's examples and add the mixture to the bundle as one pinned expert.

    Then answer the examples routed, with the new expert, and with every single expert, and report the
    accuracy and the loss (mean negative log-likelihood of an answer token, in nats) of each.
    """
    try:
        from lime_edge.export.profile import add_profile, compare_profile
    except ModuleNotFoundError as error:
        from lime_edge.errors import need

        raise need(error.name or "torch", "export") from None
    from lime_edge.checks.evaluate import read_examples

    with receive(data, ".jsonl") as file:
        examples = read_examples(file)[:limit]
    with terminal.show_steps() as progress:
        spread = add_profile(bundle, model, adapter, examples, name, force, progress)
        rows = compare_profile(bundle, examples, name, progress)
    if as_json:
        terminal.print_json({"name": name, "examples": len(examples), "experts_used": spread, "rows": rows})
        return
    cells = [[row["selection"], f"{row['accuracy']:.3f}", f"{row['loss']:.4f}"] for row in rows]
    columns = {"selection": "left", "accuracy": "right", "loss": "right"}
    terminal.print_table(f"{name!r} in {bundle}: a mixture of {spread:.1f} experts on average", columns, cells)
