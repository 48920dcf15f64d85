"""Text and JSON that a user hands in: whatever is wrong with it is one clear error that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lime_edge.bundle.inside import is_plain
from lime_edge.errors import LimeEdgeError

LARGEST = 1 << 30  # bytes


def read_text(file: Path, hint: str) -> str:
    """The text of a file, UTF-8.

    Args:
        hint: what the file should be.
    Raises:
        LimeEdgeError: missing, not readable, larger than a gigabyte, or no UTF-8.
    """
    if not is_plain(file):
        raise LimeEdgeError(f"{file}: no such file", hint)
    try:
        if file.stat().st_size > LARGEST:
            raise LimeEdgeError(f"{file}: larger than {LARGEST >> 20} MB", hint)
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LimeEdgeError(f"{file}: not readable: {error}", hint) from None


def parse_json(text: str, where: str, hint: str) -> Any:
    """What a JSON text says.

    Raises:
        LimeEdgeError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LimeEdgeError(f"{where}: not readable JSON: {error}", hint) from None


def read_lines(file: Path, hint: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not empty, numbered from 1. Raises: as `read_text`."""
    for number, line in enumerate(read_text(file, hint).splitlines(), 1):
        if line.strip():
            yield number, line
