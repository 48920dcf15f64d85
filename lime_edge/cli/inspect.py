"""lime-edge inspect: what is in a bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from lime_edge.cli.options import BundlePath, Json


def register(app: typer.Typer) -> None:
    """Add the command `inspect`."""
    app.command()(inspect)


def inspect(
    bundle: BundlePath,
    sites: Annotated[bool, typer.Option("--sites", help="List every site.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare the sha256 of every file first.")] = False,
    placement: Annotated[
        bool, typer.Option("--placement", help="Load the models, and list where their nodes run here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is in a bundle: model, sites, experts, sizes, fingerprint."""
    from lime_edge.checks.inspect import show_bundle

    show_bundle(bundle, as_json, sites, verify, placement)
