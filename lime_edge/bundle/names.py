"""Names and paths inside a bundle: which ones there may be. One place decides, for readers and for writers.

A bundle is copied between Linux, macOS, Windows and phones, so a name has to mean one file on all of them: no letter
case to tell two apart, nothing that Windows keeps for devices, no way out of the bundle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lime_edge.targets.values import EXPERT_NAME, FILE_PATH

RESERVED = ("none", "routed")  # what else a selection can be
DEVICES = {"con", "prn", "aux", "nul"} | {f"{port}{digit}" for port in ("com", "lpt") for digit in range(10)}


def check_name(name: object) -> str | None:
    """What is wrong with an expert name, or None. It becomes a part of a file name on every platform."""
    if not isinstance(name, str) or not re.search(EXPERT_NAME, name):
        return f"{name!r} is not a valid expert name (letters, digits, '.', '_', '-'; at most 64)"
    if name.lower() in RESERVED:
        return f"{name!r} is reserved"
    if _is_device(name) or name.endswith("."):
        return f"{name!r} is no file name on Windows"
    return None


def check_path(path: str) -> str | None:
    """What is wrong with a path of a file inside a bundle, or None.

    Args:
        path: relative, parts joined by "/": none hidden, empty or "..", at most 8 of at most 128 characters.
    """
    if not re.search(FILE_PATH, path):
        return f"{path!r} is not a path inside a bundle"
    for part in path.split("/"):
        if _is_device(part) or part.endswith("."):
            return f"{path!r} is no file name on Windows"
    return None


def find_clashes(paths: Iterable[str]) -> list[str]:
    """What cannot be there together: equal but for letter case, or a file where another needs a folder."""
    clashes: list[str] = []
    seen: dict[str, str] = {}
    for path in paths:
        if (other := seen.setdefault(path.lower(), path)) != path:
            clashes.append(f"{other!r} and {path!r} are one on some file systems")
    for folded, path in seen.items():
        parts = folded.split("/")
        for count in range(1, len(parts)):
            if (above := "/".join(parts[:count])) in seen:
                clashes.append(f"{seen[above]!r} is a file and {path!r} needs a folder there")
    return clashes


def _is_device(part: str) -> bool:
    return part.split(".", 1)[0].lower() in DEVICES
