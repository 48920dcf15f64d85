"""What `lime-edge verify` found: every check, as data, as a table, and as an exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lime_edge import terminal
from lime_edge.checks.tolerance import TOLERANCES
from lime_edge.errors import EXIT_INPUT, EXIT_MISMATCH, EXIT_MISSING, LimeEdgeError

OK, MISSED, UNCHECKED = "ok", "missed", "not checked"
EVERY = "all"  # what stands for all selections where a target cannot be run at all


@dataclass(frozen=True)
class Check:
    """One selection on one target: what came of it.

    error, worst: see Tolerance. agreed of decisions: greedy tokens or classes equal to the oracle's. why: what was
    missed, or why it was not checked.
    """

    target: str
    selection: str
    result: str
    why: str = ""
    error: float | None = None
    worst: float | None = None
    agreed: int = 0
    decisions: int = 0


@dataclass(frozen=True)
class Report:
    """What `verify` found: by target, how it computes and what on; and every check."""

    path: str
    files: int
    computes: dict[str, str]
    providers: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def missed(self) -> tuple[Check, ...]:
        """Checks that were not met."""
        return tuple(check for check in self.checks if check.result == MISSED)

    def describe(self) -> dict[str, Any]:
        """What `lime-edge verify --json` prints."""
        limits = {
            target: {"compute": name, "provider": self.providers[target]} | asdict(TOLERANCES[name])
            for target, name in self.computes.items()
        }
        return {
            "path": self.path,
            "passed": not self.missed,
            "files": self.files,
            "targets": limits,
            "checks": [asdict(check) for check in self.checks],
        }


def read_report(facts: Mapping[str, Any]) -> Report:
    """The report that `describe` described, of another machine."""
    targets = facts["targets"]
    return Report(
        facts["path"],
        facts["files"],
        {name: entry["compute"] for name, entry in targets.items()},
        {name: entry["provider"] for name, entry in targets.items()},
        tuple(Check(**check) for check in facts["checks"]),
    )


def refuse_nothing(path: Path, checks: Sequence[Check], providers: Mapping[str, str], needed: int) -> None:
    """An answer that compares nothing is none.

    Args:
        providers: by target; empty where its engine is not here. needed: tokens that a cache must hold.
    Raises:
        LimeEdgeError: no engine is here, every cache is too short, or only what PyTorch never ran was asked for.
    """
    if any(check.result != UNCHECKED for check in checks):
        return
    problem = "; ".join(dict.fromkeys(f"{check.target}, {check.selection}: {check.why}" for check in checks))
    hint, code = "leave `expert` out to check what the export knew", EXIT_INPUT
    if not all(providers.values()):
        hint, code = "install one target's engine", EXIT_MISSING
    elif any(check.selection == EVERY for check in checks):
        hint = f"export with `max_seq_len={needed}` or more"
    raise LimeEdgeError(f"{path}: nothing could be checked: {problem}", hint, code)


def show_report(report: Report) -> None:
    """Print the table of `lime-edge verify`."""
    columns = {
        "target": "left",
        "selection": "left",
        "error": "right",
        "worst": "right",
        "decisions": "right",
        "result": "left",
    }
    rows = [
        [
            c.target,
            c.selection,
            _number(c.error),
            _number(c.worst),
            f"{c.agreed} of {c.decisions}" if c.decisions else "",
            f"{c.result}: {c.why}" if c.why else c.result,
        ]
        for c in report.checks
    ]
    terminal.print_table(
        f"{report.path}: {report.files} files as they were written; errors in standard deviations of the output",
        columns,
        rows,
    )
    for target, compute in report.computes.items():
        limit = TOLERANCES[compute]
        own = [check for check in report.checks if check.target == target]
        engine = f" on {report.providers[target]}" if report.providers[target] else ""
        terminal.tell(
            f"{target}{engine}: {count_results(own)} ({compute}: error at most {limit.mean:g}, worst {limit.worst:g})"
        )


def count_results(checks: Sequence[Check]) -> str:
    """One target's results in words: "5 checked, 5 as PyTorch computed them, 3 not checked"."""
    unchecked = sum(check.result == UNCHECKED for check in checks)
    if any(check.selection == EVERY for check in checks):
        return "not checked" if unchecked else "not as PyTorch computed it"
    passed = sum(check.result == OK for check in checks)
    words = f"{len(checks) - unchecked} checked, {passed} as PyTorch computed them"
    return f"{words}, {unchecked} not checked" if unchecked else words


def refuse_misses(report: Report) -> None:
    """Raise what makes the command line end with 3.

    Raises:
        LimeEdgeError: a check missed.
    """
    if report.missed:
        lines = "\n".join(f"  - {check.target}, {check.selection}: {check.why}" for check in report.missed)
        raise LimeEdgeError(
            f"{report.path}: {len(report.missed)} of {len(report.checks)} checks missed\n{lines}",
            "the artifact does not compute here what it should: try another `target`, or export it again",
            EXIT_MISMATCH,
        )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"
