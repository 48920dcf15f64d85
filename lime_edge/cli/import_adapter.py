"""lime-edge import: a trained checkpoint becomes an adapter directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lime_edge import terminal
from lime_edge.cli.options import Json

EXAMPLES = """

[bold]Examples[/bold]

 lime-edge import lime-checkpoint/ -o imported/                 (lime.json lies beside the weights)

 lime-edge import model.safetensors -o imported/ --set variant=dora --set alpha=16 --set top_k=2

 lime-edge import my-lora/ -o imported/ --model SmolLM2-135M/ --experts movie.safetensors

 lime-edge export imported/backbone --adapter imported/adapter -o my.lime
"""


def register(app: typer.Typer) -> None:
    """Add the command `import`."""
    app.command("import", epilog=EXAMPLES)(import_checkpoint)


def import_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(help="Directory or weights of a full LiME state dict, or a PEFT LoRA directory.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write: adapter/ and, of a state dict, backbone/.")
    ],
    hyper: Annotated[
        Path | None, typer.Option(help="JSON file of hyper-parameters; lime.json beside the weights by default.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One hyper-parameter (JSON value); may be repeated."),
    ] = None,
    names: Annotated[str | None, typer.Option(help="Experts' names in order, NAME,NAME,...")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Base model: checks a PEFT LoRA, orders flat expert vectors.")
    ] = None,
    experts: Annotated[
        list[Path] | None,
        typer.Option(help="Expert vectors for a PEFT LoRA (.safetensors); may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing output directory.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of the LiME authors' code, or a PEFT LoRA, into an adapter directory.

    Hyper-parameters carry the names of the authors' code: variant, rank, alpha, num_experts, top_k,
    temperature, gamma_routing, n_gram, sparse_mode, auto_topk, ... (docs/adapter-format.md lists them).
    """
    given = dict(map(parse_setting, settings or []))
    try:
        from lime_edge.compiler.formats import importing
    except ModuleNotFoundError as error:
        from lime_edge.errors import need

        raise need(error.name or "torch", "export") from None
    options = importing.ImportOptions(
        hyper=given,
        hyper_file=hyper,
        names=tuple(names.split(",")) if names else (),
        model=model,
        experts=tuple(experts or ()),
        force=force,
    )
    report = importing.import_checkpoint(checkpoint, output, options)
    if as_json:
        terminal.print_json(report)
        return
    rows = [[key, ", ".join(value) if isinstance(value, list) else str(value)] for key, value in report.items()]
    terminal.print_table(f"imported {checkpoint}", {"": "left", "value": "left"}, rows)


def parse_setting(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; a value that is not JSON is text, so that variant=dora needs no quotes.

    Raises:
        LimeEdgeError: no '=' or no key.
    """
    from lime_edge.errors import LimeEdgeError

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise LimeEdgeError(f"--set {text!r}: expected KEY=VALUE", "for example --set top_k=2")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value
