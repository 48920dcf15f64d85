"""Options that several commands share, and what the shell may complete them with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lime_edge import terminal
from lime_edge.targets.entries import TARGETS


def _complete_experts(ctx: Any, incomplete: str) -> list[str]:
    """Names in the bundle that the line already has, read from its lime.json alone."""
    words = [str(value) for value in ctx.params.values() if value] + list(ctx.args)
    for word in words:
        try:
            names = json.loads((Path(word) / "lime.json").read_text(encoding="utf-8"))["experts"]
            names = [one["name"] if isinstance(one, dict) else str(one) for one in names]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return [name for name in [*names, "none"] if str(name).startswith(incomplete)]
    return []


def _complete_skills(ctx: Any, incomplete: str) -> list[str]:
    """As above, and all of them; the last of several behind commas is completed."""
    before, comma, last = incomplete.rpartition(",")
    every = [] if comma or not "all".startswith(last) else ["all"]
    return [*(f"{before}{comma}{name}" for name in _complete_experts(ctx, last)), *every]


def complete_from(*words: str) -> Any:
    """A completion with fixed words; the last of several behind commas is completed."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{word}" for word in words if word.startswith(last)]

    return complete


def split_names(given: list[str] | None) -> list[str]:
    """["onnx,executorch", "coreml"] to ["onnx", "executorch", "coreml"]: an option that may be repeated, or not."""
    return [name.strip() for part in given or () for name in part.split(",") if name.strip()]


def read_providers(given: str | None) -> tuple[str, ...]:
    """What --provider says: "cuda,cpu" to ("cuda", "cpu")."""
    return tuple(split_names([given] if given else None))


def _hush(wanted: bool) -> bool:
    if wanted:
        terminal.be_quiet()
    return wanted


TARGET_NAMES = complete_from(*TARGETS)
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory (OUT.lime).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_hush, help="No progress bars and no notes: the result, warnings.")
]
Target = Annotated[
    str | None,
    typer.Option(help="Which artifact to run; the bundle's first by default.", autocompletion=TARGET_NAMES),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Engine threads; the bundle's default otherwise.")]
Provider = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help="ONNX Runtime's execution providers, as cuda or cpu; else the bundle's."),
]
ExpertOption = Annotated[
    str | None,
    typer.Option(
        "--expert",
        "-e",
        help="NAME, none, routed, or NAME=WEIGHT,NAME=WEIGHT; else the bundle's first.",
        autocompletion=_complete_experts,
    ),
]
SkillsOption = Annotated[
    str | None,
    typer.Option(
        "--expert",
        "-e",
        help="NAME, none, routed, or NAME=WEIGHT,NAME=WEIGHT; all, or NAME,NAME: their answers in one pass; else the "
        "bundle's first.",
        autocompletion=_complete_skills,
    ),
]
On = Annotated[
    list[str] | None,
    typer.Option(
        "--on", metavar="ADDRESS", help="On a device: ssh://[USER@]HOST[:PORT], adb or adb:SERIAL; may be repeated."
    ),
]
Hosts = Annotated[
    Path | None, typer.Option("--hosts", metavar="FILE", help="On the devices of this file (docs/remote.md).")
]
Wheels = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", exists=True, file_okay=False, help="Wheels to bring to a device that reaches no package index."
    ),
]
RemotePython = Annotated[
    str | None,
    typer.Option("--python", metavar="PATH", help="The interpreter on the device; else the first that fits."),
]
SitePackages = Annotated[
    bool, typer.Option("--site-packages", help="Use the packages that the device's Python has; install lime-edge only.")
]
Clean = Annotated[bool, typer.Option("--clean", help="Afterwards delete everything that was brought to the device.")]
