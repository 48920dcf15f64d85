"""lime-edge pack: a bundle as one file, for an application to download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lime_edge import terminal
from lime_edge.cli.options import BundlePath, Json


def register(app: typer.Typer) -> None:
    """Add the command `pack`."""
    app.command()(pack)


def pack(
    bundle: BundlePath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to write (by habit BUNDLE.tar).")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing archive.")] = False,
    as_json: Json = False,
) -> None:
    """Write a bundle as one archive for an application to download.

    An uncompressed tar: lime.json first, then its files, each compared with its
    sha256. The same bundle gives the same bytes, so a download can be resumed.
    The libraries for phones unpack it in one atomic step (runtimes/kotlin).
    """
    from lime_edge.bundle.archive import pack_bundle

    size = pack_bundle(bundle, file, force)
    if as_json:
        terminal.print_json({"path": str(file), "bytes": size})
    else:
        terminal.tell(f"{file}: {size / 1e6:.1f} MB")
