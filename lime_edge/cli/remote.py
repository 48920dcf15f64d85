"""--on and --hosts: bench, verify and run on other machines, and how their answers are shown here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lime_edge import terminal
from lime_edge.cli.flags import translate
from lime_edge.errors import Faults, LimeEdgeError

if TYPE_CHECKING:
    from lime_edge.bench.remote.addresses import Device
    from lime_edge.bench.remote.fleet import Stopped
    from lime_edge.bench.remote.plan import Outcome, Task


@dataclass(frozen=True)
class Where:
    """The options that say where: --on, --hosts, --wheels, --python, --site-packages, --clean."""

    on: list[str] | None = None
    hosts: Path | None = None
    wheels: Path | None = None
    python: str | None = None
    site_packages: bool = False
    clean: bool = False

    def __post_init__(self) -> None:
        if self.elsewhere:
            return
        given = {"wheels": self.wheels, "python": self.python, "site-packages": self.site_packages, "clean": self.clean}
        with Faults("bad options", "name a device: --on ssh://USER@HOST") as faults:
            for name, value in given.items():
                if value:
                    faults.add(f"--{name} is for a device")

    @property
    def elsewhere(self) -> bool:
        """Whether devices were named."""
        return bool(self.on or self.hosts)

    @property
    def alone(self) -> bool:
        """One --on: its answer is printed as here; several devices, or a hosts file, give one document of all."""
        return self.hosts is None and len(self.on or ()) == 1

    def find_devices(self) -> list[Device]:
        """The devices."""
        from lime_edge.bench.remote.addresses import gather_devices

        return gather_devices(self.on or [], self.hosts, self.python, self.site_packages)


def work(where: Where, task: Task, on_output: Callable[[bytes], None] | None = None) -> list[Outcome]:
    """Do a task on every device; warnings are told, errors are in the outcomes.

    Raises:
        LimeEdgeError: bad addresses; lime_edge cannot be built.
    """
    from lime_edge.bench.remote.addresses import SSH
    from lime_edge.bench.remote.fleet import Stopped, work_on
    from lime_edge.bench.remote.package import find_package

    devices = where.find_devices()
    if task.words and any(device.kind == SSH for device in devices):
        with terminal.show_wait("building lime-edge"):
            task = replace(task, package=find_package(where.wheels))
    task = replace(task, wheels=where.wheels, clean=where.clean)
    try:
        with terminal.show_steps() as tell:
            outcomes = work_on(devices, task, tell, on_output)
    except Stopped as stopped:
        tell_stopped(stopped)
        raise
    for outcome in outcomes:
        for warning in outcome.warnings:
            terminal.warn(f"{outcome.device.name}: {warning}")
        if outcome.freed is not None:
            terminal.note(f"{outcome.device.name}: {terminal.show_size(outcome.freed)} deleted there")
    return outcomes


def tell_stopped(stopped: Stopped) -> None:
    """Say where Ctrl-C came."""
    for name, step in stopped.where.items():
        terminal.warn(f"{name}: stopped while {step}; what was begun there is undone")


def read_documents(outcomes: list[Outcome]) -> tuple[list[Outcome], list[Any]]:
    """What each device printed, as JSON; what is no JSON is that device's error."""
    found, documents = [], []
    for outcome in outcomes:
        document = None
        if outcome.out.strip():
            try:
                document = json.loads(outcome.out)
            except ValueError:
                text = outcome.out[:200].decode(errors="replace")
                error = outcome.error or LimeEdgeError(f"{outcome.device.name}: it answered no JSON: {text}", "", 1)
                outcome = replace(outcome, code=error.exit_code, error=error)
        found.append(outcome)
        documents.append(document)
    return found, documents


def end(outcomes: list[Outcome], alone: bool) -> None:
    """Tell every error; end with the first one's exit code.

    Raises:
        LimeEdgeError: the one device's. typer.Exit: several devices'.
    """
    failed = [outcome for outcome in outcomes if outcome.error]
    if alone and failed and failed[0].error:
        raise failed[0].error
    for outcome in failed:
        terminal.err.print(
            f"[bold red]error:[/bold red] {terminal.escape(translate(str(outcome.error)))}", soft_wrap=True
        )
    if failed:
        raise typer.Exit(failed[0].code or 1)


def load_bundle(path: Path) -> Any:
    """A bundle to bring."""
    from lime_edge.bench.remote.steps import Load

    return Load.read(path)


def clean_only(where: Where) -> None:
    """--clean without anything to do: delete what earlier calls brought."""
    from lime_edge.bench.remote.plan import Task

    end(work(where, Task(())), where.alone)


def bench_there(
    where: Where, words: list[Any], targets: tuple[str, ...], extras: dict[str, str] | None
) -> tuple[Any, list[Outcome]]:
    """The benchmark on devices.

    Args:
        words: of `lime-edge bench`, --json left out; a Path among them is a bundle. extras: of the Android app's.
    Returns:
        One device's document (None where it failed), or the document of several; and the outcomes.
    """
    from lime_edge.bench.remote.fleet import describe_fleet
    from lime_edge.bench.remote.plan import Task

    loads = {word: load_bundle(word) for word in words if isinstance(word, Path)}
    task = Task(
        tuple(loads.get(word, word) for word in ["bench", *words, "--json", "--quiet"]), targets=targets, extras=extras
    )
    outcomes, documents = read_documents(work(where, task))
    names = {load.describe()["name"]: str(path) for path, load in loads.items()}
    documents = [_finish(document, outcome, names) for document, outcome in zip(documents, outcomes, strict=True)]
    return (documents[0] if where.alone else describe_fleet(outcomes, documents)), outcomes


def _finish(document: Any, outcome: Outcome, names: dict[str, str]) -> Any:
    """A device's document with bundles by their paths here, and with the device."""
    if not isinstance(document, dict):
        return None
    holders = [
        document,
        *document["runs"],
        *(one["baseline"] for one in [document, *document["runs"]] if one["baseline"]),
    ]
    for holder in holders:
        if "bundle" in holder:
            name = Path(holder["bundle"]).name
            holder["bundle"] = names.get(name, names.get(name.removesuffix(".lime"), holder["bundle"]))
    runs = document.pop("runs")
    return (
        document
        | {"state": document.get("state"), "throttled": document.get("throttled")}
        | {"device": outcome.describe(), "runs": runs}
    )


def verify_there(where: Where, bundle: Path, words: list[str], targets: tuple[str, ...], as_json: bool) -> None:
    """`lime-edge verify` on devices, of the bundle as it lies there; it is brought where there is none."""
    from lime_edge.bench.remote.fleet import describe_fleet
    from lime_edge.bench.remote.plan import Task
    from lime_edge.checks.report import read_report, show_report

    task = Task(("verify", load_bundle(bundle), *words, "--json"), targets=targets, as_is=True)
    outcomes, documents = read_documents(work(where, task))
    for document in documents:
        if document is not None:
            document["path"] = str(bundle)
    if as_json:
        if not where.alone:
            terminal.print_json(describe_fleet(outcomes, documents))
        elif documents[0] is not None:
            terminal.print_json(documents[0])
    else:
        for outcome, document in zip(outcomes, documents, strict=True):
            if document is not None:
                show_report(read_report(document | {"path": f"{bundle} on {outcome.device.name}"}))
    end(outcomes, where.alone)


def run_there(
    where: Where, bundle: Path, prompt: str | None, words: list[str], target: str | None, as_json: bool
) -> None:
    """One answer from every device; from one device it is shown as it comes."""
    from lime_edge.bench.remote.fleet import describe_fleet
    from lime_edge.bench.remote.plan import Task

    if prompt is None:
        raise LimeEdgeError("run --on gives one answer: a prompt is missing", "a chat is not held over a connection")
    task = Task(("run", load_bundle(bundle), "-", *words), text=prompt, targets=(target,) if target else ())
    if as_json:
        task = replace(task, words=(*task.words, "--json"))
    shown = where.alone and not as_json
    outcomes = work(where, task, _show_bytes if shown else None)
    if as_json:
        outcomes, documents = read_documents(outcomes)
        if not where.alone:
            terminal.print_json(describe_fleet(outcomes, documents))
        elif documents[0] is not None:
            terminal.print_json(documents[0])
    elif not shown:
        for outcome in outcomes:
            if outcome.out:
                print(f"{outcome.device.name}: {outcome.out.decode(errors='replace').rstrip()}")
    end(outcomes, where.alone)


def _show_bytes(piece: bytes) -> None:
    sys.stdout.buffer.write(piece) if hasattr(sys.stdout, "buffer") else sys.stdout.write(
        piece.decode(errors="replace")
    )
    sys.stdout.flush()
