"""Several devices side by side: one task for all, an outcome for each; one that fails does not stop the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import lime_edge
from lime_edge.bench.measure import SCHEMA
from lime_edge.bench.remote.addresses import Device
from lime_edge.bench.remote.plan import Outcome, Task
from lime_edge.bench.remote.task import do_task
from lime_edge.errors import LimeEdgeError

Tell = Callable[[str, int, int], None]
Work = Callable[[Device, Tell, Callable[[Any], None]], Any]


class Stopped(KeyboardInterrupt):
    """Ctrl-C. where: device -> what was being done there."""

    def __init__(self, where: dict[str, str]):
        super().__init__()
        self.where = where


def work_on(
    devices: list[Device], task: Task, tell: Tell, on_output: Callable[[bytes], None] | None = None
) -> list[Outcome]:
    """Do a task on every device at once.

    Args:
        tell: (step, done, total), the step with the device's name before it. on_output: for one device alone.
    Raises:
        Stopped: Ctrl-C; what was begun on the devices is undone there.
    """

    async def work(device: Device, tell: Tell, track: Callable[[Any], None]) -> Outcome:
        try:
            return await do_task(device, task, tell, on_output, track)
        except LimeEdgeError as error:
            return Outcome(device, error.exit_code, error=error)

    return visit(devices, work, tell)


def visit(devices: list[Device], work: Work, tell: Tell) -> list[Any]:
    """`work` on every device at once, in one event loop that asyncio ends in order on Ctrl-C."""
    busy: dict[str, Any] = {}

    async def visit_all() -> list[Any]:
        def start(device: Device) -> Any:
            def tell_of(step: str, done: int, total: int) -> None:
                tell(f"{device.name}: {step}", done, total)

            def track(worker: Any) -> None:
                busy[device.name] = worker

            return work(device, tell_of, track)

        jobs = [start(device) for device in devices]
        return list(await asyncio.gather(*jobs))

    try:
        with _quiet_loss():
            return asyncio.run(visit_all())
    except KeyboardInterrupt:
        raise Stopped({name: worker.step for name, worker in busy.items()}) from None


@contextmanager
def _quiet_loss() -> Any:
    """asyncssh logs lost connections and every command; what matters is in our own messages."""
    import logging

    logger = logging.getLogger("asyncssh")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def describe_fleet(outcomes: list[Outcome], documents: list[Any]) -> dict[str, Any]:
    """One document of several devices (docs/bench-schema.md, "Several devices").

    Args:
        documents: what each device printed, as JSON; None where it failed.
    """
    return {
        "schema": SCHEMA,
        "lime_edge": lime_edge.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "devices": [
            outcome.describe() | {"error": _describe_error(outcome), "document": document}
            for outcome, document in zip(outcomes, documents, strict=True)
        ],
    }


def _describe_error(outcome: Outcome) -> dict[str, Any] | None:
    error = outcome.error
    if error is None:
        return None
    return {"problem": error.problem, "hint": error.hint, "exit_code": error.exit_code}
