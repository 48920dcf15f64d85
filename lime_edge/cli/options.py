"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory (OUT.lime).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Target = Annotated[str | None, typer.Option(help="Which artifact to run; the bundle's first by default.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Engine threads; the bundle's default otherwise.")]
ExpertOption = Annotated[
    str | None,
    typer.Option("--expert", "-e", help="NAME, none, routed, or NAME=WEIGHT,NAME=WEIGHT; else the bundle's first."),
]
