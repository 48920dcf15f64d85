"""What an engine says about itself on this machine: each runtime's `health.py` answers, `lime-edge doctor` asks."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType


@dataclass(frozen=True)
class Health:
    """One engine, here and now.

    engine: its package. version: None where it is not installed. problem: why it does not run, empty where it does.
    hint: what mends the problem. facts: (what, value) lines about it. remarks: (what is slower or lacking, hint).
    """

    engine: str
    version: str | None
    problem: str = ""
    hint: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    remarks: tuple[tuple[str, str], ...] = ()

    @property
    def works(self) -> bool:
        """Whether a bundle can be run with it."""
        return not self.problem


def find_version(*distributions: str) -> str | None:
    """The version of the first of these packages that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_there(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def import_or_explain(module: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why it cannot be imported: libraries fail with more than ImportError."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
