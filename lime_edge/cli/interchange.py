"""lime-edge experts export: a pinned expert as a plain LoRA for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lime_edge import terminal
from lime_edge.cli.options import Json

EXAMPLES = """

[bold]Examples[/bold]

 lime-edge experts export my-adapter/ movie --format peft -o movie-lora/

 lime-edge experts export my-adapter/ movie=0.7,intent=0.3 --format peft -o mix-lora/

 lime-edge experts export my-adapter/ movie --format gguf --model SmolLM2-135M/ -o movie.gguf
"""


def register(experts_app: typer.Typer) -> None:
    """Add the command `export`."""
    experts_app.command("export", epilog=EXAMPLES)(export_expert)


def export_expert(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A LiME adapter directory.")],
    name: Annotated[str, typer.Argument(help="An expert, or a blend NAME=WEIGHT,NAME=WEIGHT.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory (peft) or file (gguf) to write.")],
    form: Annotated[str, typer.Option("--format", help="peft or gguf.")] = "peft",
    model: Annotated[Path | None, typer.Option(help="The base model: checked with peft, needed with gguf.")] = None,
    force: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write one expert as a plain LoRA, for PEFT or llama.cpp: B' = diag(p) B.

    LoRA and LoRA-FA adapters only; the others have no equal LoRA and are refused with the reason.
    """
    from lime_edge.bundle.experts import parse_selection

    try:
        from lime_edge.compiler.formats.interchange import export_expert
    except ModuleNotFoundError as error:
        from lime_edge.errors import need

        raise need(error.name or "torch", "export") from None
    lora = export_expert(adapter, parse_selection(name), form, output, model, force)
    files = [output] if output.is_file() else [file for file in output.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    report = {
        "expert": lora.name,
        "format": form,
        "output": str(output),
        "sites": len(lora.sites),
        "rank": lora.rank,
        "alpha": lora.alpha,
        "bytes": size,
    }
    if as_json:
        terminal.print_json(report)
    else:
        text = f"wrote {lora.name!r} as {form} to {output}: {len(lora.sites)} sites, {terminal.show_size(size)}"
        terminal.tell(text)
