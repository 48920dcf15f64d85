"""lime-edge doctor: what works on this machine, and what to install for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lime_edge import terminal
from lime_edge.cli.flags import translate
from lime_edge.cli.options import Hosts, Json, On, RemotePython, SitePackages
from lime_edge.cli.remote import Where, load_bundle

if TYPE_CHECKING:
    from lime_edge.checks.doctor import Finding

EXAMPLES = """

[bold]Examples[/bold]

 lime-edge doctor                          (this machine)

 lime-edge doctor smollm2.lime --json      (and whether this bundle runs on it)

 lime-edge doctor --on ssh://pi@raspberrypi
"""
MARKS = {"good": "[green]ok[/green]", "note": "[yellow]--[/yellow]", "bad": "[bold red]no[/bold red]"}


def register(app: typer.Typer) -> None:
    """Add the command `doctor`."""
    app.command(epilog=EXAMPLES)(doctor)


def doctor(
    bundle: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="Also look at this bundle.")] = None,
    on: On = None,
    hosts: Hosts = None,
    python: RemotePython = None,
    site_packages: SitePackages = False,
    as_json: Json = False,
) -> None:
    """Say what works on this machine and what to install for the rest: engines, packages, memory, disk.

    Ends with 2 where the bundle is bad, with 4 where no engine works (or none for the bundle), with 5 where nothing
    can be written here, else with 0.
    """
    from lime_edge.checks.doctor import examine

    where = Where(on, hosts, None, python, site_packages)
    if where.elsewhere:
        examine_there(where, bundle, as_json)
    diagnosis = examine(bundle)
    if as_json:
        terminal.print_json(diagnosis.describe())
    else:
        for finding in diagnosis.findings:
            show_finding(finding)
        terminal.tell(f"works here: {'; '.join(diagnosis.works)}")
    raise typer.Exit(diagnosis.exit_code)


def show_finding(finding: Finding) -> None:
    """One line, and under it what to do."""
    text = terminal.escape(f"{finding.topic}, {finding.what}: {finding.found}")
    terminal.out.print(f"{MARKS[finding.state]}  {text}", soft_wrap=True)
    if finding.hint:
        terminal.tell(f"      {translate(finding.hint)}")


def examine_there(where: Where, bundle: Path | None, as_json: bool) -> None:
    """What works on devices and what they lack; nothing is installed."""
    from lime_edge.bench.remote.examine import examine_devices

    load = None if bundle is None else load_bundle(bundle)
    devices = where.find_devices()
    with terminal.show_steps() as tell:
        diagnoses = examine_devices(devices, load, tell)
    if as_json:
        described = [{"name": d.name} | found.describe() for d, found in zip(devices, diagnoses, strict=True)]
        terminal.print_json(diagnoses[0].describe() if where.alone else {"devices": described})
    else:
        for device, diagnosis in zip(devices, diagnoses, strict=True):
            if not where.alone:
                terminal.out.print(f"[bold]{terminal.escape(device.name)}[/bold]")
            for finding in diagnosis.findings:
                show_finding(finding)
    raise typer.Exit(next((found.exit_code for found in diagnoses if found.exit_code), 0))
