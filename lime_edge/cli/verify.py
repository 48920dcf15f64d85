"""lime-edge verify: does a bundle compute here what PyTorch computed at export?"""

from __future__ import annotations

from typing import Annotated

import typer

from lime_edge import terminal
from lime_edge.cli.options import (
    TARGET_NAMES,
    BundlePath,
    Clean,
    Hosts,
    Json,
    On,
    Provider,
    Quiet,
    RemotePython,
    SitePackages,
    Threads,
    Wheels,
    read_providers,
    split_names,
)
from lime_edge.cli.remote import Where, verify_there

EXAMPLES = """

[bold]Examples[/bold]

 lime-edge verify smollm2.lime                     (every target, every expert)

 lime-edge verify smollm2.lime --target onnx --expert movie --expert none

 lime-edge verify smollm2.lime --json > verified.json

 lime-edge verify smollm2.lime --on ssh://pi@raspberrypi        (as it lies there)
"""


def register(app: typer.Typer) -> None:
    """Add the command `verify`."""
    app.command(epilog=EXAMPLES)(verify)


def verify(
    bundle: BundlePath,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...", help="Only these artifacts. All of them by default.", autocompletion=TARGET_NAMES
        ),
    ] = None,
    expert: Annotated[
        list[str] | None, typer.Option("--expert", "-e", help="Only this selection; may be repeated.")
    ] = None,
    threads: Threads = None,
    provider: Provider = None,
    on: On = None,
    hosts: Hosts = None,
    wheels: Wheels = None,
    python: RemotePython = None,
    site_packages: SitePackages = False,
    clean: Clean = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check a bundle on this machine: its files, and every expert on every target against PyTorch.

    Compares the sha256 of every file, then outputs and greedy tokens with what
    PyTorch computed at export. Needs no torch. Ends with 3 when a check missed,
    with 2 where the export stored nothing to compare with. Experts that were
    added later are listed as not checked. With --on, the bundle as it lies on a device:
    it is brought where there is none, and not mended.
    """
    from lime_edge.checks.report import refuse_misses, show_report
    from lime_edge.checks.verify import verify_bundle

    where = Where(on, hosts, wheels, python, site_packages, clean)
    if where.elsewhere:
        words = ["--target", ",".join(split_names(target))] if target else []
        words += [word for name in expert or () for word in ("--expert", name)]
        words += ["--threads", str(threads)] if threads else []
        words += ["--provider", provider] if provider else []
        verify_there(where, bundle, words, tuple(split_names(target)), as_json)
        return
    with terminal.show_steps() as progress:
        providers = read_providers(provider)
        report = verify_bundle(bundle, split_names(target), expert or (), threads, progress, providers)
    if as_json:
        terminal.print_json(report.describe())
    else:
        show_report(report)
    refuse_misses(report)
