"""One command on one device, from the first look to the answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lime_edge.bench.remote.addresses import ADB, Device
from lime_edge.bench.remote.phone import bench_phone
from lime_edge.bench.remote.plan import Outcome, Task
from lime_edge.bench.remote.probe import check_facts, probe
from lime_edge.bench.remote.ssh import Connection, connect
from lime_edge.bench.remote.steps import Installation, Load, Site, Tell
from lime_edge.errors import LimeEdgeError


async def do_task(
    device: Device, task: Task, tell: Tell, on_output: Callable[[bytes], None] | None, track: Callable[[Any], None]
) -> Outcome:
    """Do it.

    Args:
        tell: (step, done, total). on_output: takes what lime-edge prints there, as it comes. track: is given what
            knows, by its `step`, what is being done.
    Raises:
        LimeEdgeError: it could not be done; nothing half-made is left there.
    """
    if device.kind == ADB:
        return await bench_phone(device, task, tell, track)
    async with connect(device) as connection:
        track(connection)
        facts = await probe(connection)
        site = Site(connection, facts, check_facts(device, facts), tell)
        outcome = await _work(site, task, on_output) if task.words else Outcome(device)
        freed = await site.clean() if task.clean else None
        return _count(outcome, connection, freed)


async def _work(site: Site, task: Task, on_output: Callable[[bytes], None] | None) -> Outcome:
    installation = Installation(task.package, task.wheels, task.engines)
    key = await site.prepare(installation, task.loads, task.as_is)
    places = {load.place(site.facts.root): str(load.bundle.path) for load in task.loads}
    words = [word.place(site.facts.root) if isinstance(word, Load) else word for word in task.words]
    answer = await site.execute(key, words, task.text, on_output)
    if site.mended:
        site.warnings.append(f"damaged there and brought again: {', '.join(site.mended)}")
    error = read_error(site.name, answer.err, answer.code, places) if answer.code else None
    return Outcome(site.connection.device, answer.code, answer.out, error, tuple(site.warnings))


def _count(outcome: Outcome, connection: Connection, freed: int | None) -> Outcome:
    return replace(outcome, files=connection.traffic.files, commands=connection.traffic.commands, freed=freed)


def read_error(name: str, said: str, code: int, places: dict[str, str]) -> LimeEdgeError:
    """The error that lime-edge told on the device, with the device's name before it."""
    lines = said.strip()
    found = re.search(r"^error: (.*?)(?:\n {2}hint: (.*))?\Z", lines, re.DOTALL | re.MULTILINE)
    problem, hint = (found[1].strip(), (found[2] or "").strip()) if found else (lines[-2000:], "")
    for there, here in places.items():
        problem, hint = problem.replace(there, f"{here} on {name}"), hint.replace(there, here)
    if not found:
        problem = f"lime-edge ended with {code}: {problem or 'and said nothing'}"
        hint = "killed: the device may be short of memory" if code in (137, 9) else hint
    return LimeEdgeError(f"{name}: {problem}", hint, code)
