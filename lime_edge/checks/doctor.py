"""What works on this machine, and what to install for the rest."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.seen import find_cache
from lime_edge.errors import EXIT_INPUT, EXIT_MISSING, EXIT_STORAGE, LimeEdgeError
from lime_edge.session.open import examine_engine
from lime_edge.targets.entries import DEFAULT, TARGETS

GOOD, NOTE, BAD = "good", "note", "bad"
LEAST_SPACE = 300_000_000  # bytes: a small bundle (90 MB) and its twin while it is written
LEAST_MEMORY = 400_000_000  # bytes: what the smallest real model takes
LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
EXTRAS = {  # what an extra is for
    "export": "export, import and experts profile",
    **{target.name: f"export --target {target.name}" for target in TARGETS.values() if target.name != DEFAULT},
    "report": "bench --report",
    "serve": "serve",
    "remote": "bench, verify, run and doctor on devices",
}


@dataclass(frozen=True)
class Finding:
    """One line: a topic, what was looked at, how it is (good, note or bad), what was found, what mends it."""

    topic: str
    what: str
    state: str
    found: str
    hint: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings."""

    findings: tuple[Finding, ...]

    def describe(self) -> dict[str, Any]:
        """What `lime-edge doctor --json` prints."""
        return {
            "lime_edge": lime_edge.__version__,
            "engines": self.engines,
            "works": self.works,
            "exit_code": self.exit_code,
            "findings": [asdict(finding) for finding in self.findings],
        }

    @property
    def engines(self) -> list[str]:
        """The targets that run here."""
        return [f.what for f in self.findings if f.topic == "engine" and f.state == GOOD]

    @property
    def works(self) -> list[str]:
        """What one can do here, in words."""
        running = [f"run, eval, verify and bench on {', '.join(self.engines)}"] if self.engines else []
        packages = [f.what.strip("[]") for f in self.findings if f.topic == "package" and f.state == GOOD]
        return ["inspect and experts", *running, *(EXTRAS[extra] for extra in packages if extra in EXTRAS)]

    @property
    def exit_code(self) -> int:
        """0; 2 the bundle is bad; 4 no engine, or none for the bundle, works; 5 nothing can be written here."""
        bad = [f for f in self.findings if f.state == BAD]
        bundle = [f for f in self.findings if f.topic == "bundle"]
        if bundle and bundle[0].state == BAD:
            return EXIT_INPUT
        targets = [f for f in bundle if f.what.startswith("on ")]
        if not self.engines or (targets and all(f.state == BAD for f in targets)):
            return EXIT_MISSING
        return EXIT_STORAGE if any(f.topic == "storage" for f in bad) else 0


def examine(bundle: Path | None = None, here: Path = Path(), root: Path = Path("/")) -> Diagnosis:
    """Look at everything; nothing is changed, and nothing raises but a bug.

    Args:
        bundle: also say whether this one opens and which of its targets run here. here: where one would write.
        root: where the kernel shows its files.
    """
    return Diagnosis(
        tuple(
            [
                *_examine_machine(root),
                *_examine_engines(),
                *_examine_extras(),
                *_examine_tools(),
                *_examine_storage(here),
                *_examine_cache(),
                *(_examine_bundle(bundle) if bundle else ()),
            ]
        )
    )


def _examine_machine(root: Path) -> Iterator[Finding]:
    yield Finding("machine", "system", GOOD, f"{platform.system()} {platform.release()}, {platform.machine()}")
    wanted = importlib.metadata.metadata("lime-edge")["Requires-Python"] if _requirements() else ">=3.11"
    fits = meets(platform.python_version(), wanted)
    hint = "" if fits else f"install a Python {wanted}"
    yield Finding("machine", "Python", GOOD if fits else BAD, platform.python_version(), hint)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("machine", "cores", GOOD, str(cores))
    total, free = read_memory(root)
    if free is None:
        yield Finding("machine", "memory", NOTE, "unknown")
        return
    text = f"{free / 1e9:.1f} GB free" + (f" of {total / 1e9:.1f}" if total else "")
    if free < LEAST_MEMORY:
        yield Finding("machine", "memory", NOTE, text, "close other programs, or take a smaller model")
    else:
        yield Finding("machine", "memory", GOOD, text)


def read_memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Bytes of memory in all, and free for a new program; a container's limit counts where it is lower."""
    facts = {}
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            facts[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None, None
    total, free = facts.get("MemTotal"), facts.get("MemAvailable")
    for name in LIMITS:
        try:
            limit = int((root / name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        total, free = (min(number, limit) if number is not None else limit for number in (total, free))
    return total, free


def _examine_engines() -> Iterator[Finding]:
    for target in TARGETS:
        health = examine_engine(target)
        if not health.works:
            yield Finding("engine", target, NOTE, health.problem, health.hint)
            continue
        wanted = _wanted(health.engine)
        fits = not wanted or not health.version or meets(health.version, wanted)
        facts = "; ".join(f"{what}: {value}" for what, value in health.facts)
        text = f"{health.engine} {health.version}; {facts}"
        yield Finding("engine", target, GOOD, text)
        if not fits:
            hint = f"pip install '{health.engine}{wanted}'"
            yield Finding("engine version", target, NOTE, f"{health.version}, made for {wanted}", hint)
        for remark, hint in health.remarks:
            yield Finding("engine speed", target, NOTE, remark, hint)


def _requirements() -> list[tuple[str, str, str]]:
    """(package, version specifiers, extra or "") of this installation; empty where it is not an installed package."""
    try:
        lines = importlib.metadata.requires("lime-edge") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        name, specifiers = re.match(r"\s*([\w.-]+)\s*(.*)", requirement).groups()  # type: ignore[union-attr]
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        found.append((name, specifiers.strip(), extra.group(1) if extra else ""))
    return found


def _wanted(package: str) -> str:
    return next((specifiers for name, specifiers, _ in _requirements() if name == package), "")


def meets(version: str, specifiers: str) -> bool:
    """Whether a version satisfies ">=1.2,<2"; only numbers are compared, so 2.13.0+cpu is 2.13.0."""
    mine = _numbers(version)
    for part in filter(None, (piece.strip() for piece in specifiers.split(","))):
        operator, wanted = re.match(r"([<>=!~]+)\s*(.+)", part).groups()  # type: ignore[union-attr]
        theirs = _numbers(wanted)
        size = max(len(mine), len(theirs))
        a, b = (numbers + (0,) * (size - len(numbers)) for numbers in (mine, theirs))
        if not {">=": a >= b, "<=": a <= b, ">": a > b, "<": a < b, "==": a == b, "!=": a != b}.get(operator, True):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def _examine_extras() -> Iterator[Finding]:
    """What a workstation needs, extra by extra; a device needs none of it."""
    requirements = _requirements()
    if not requirements:
        yield Finding("package", "lime-edge", NOTE, "not an installed package: its versions cannot be checked", "")
        return
    for extra, purpose in EXTRAS.items():
        faults = []
        for name, specifiers, of in requirements:
            if of != extra:
                continue
            version = _version(name)
            if version is None:
                faults.append(f"{name} is missing")
            elif not meets(version, specifiers):
                faults.append(f"{name} {version}, expected {specifiers}")
        if faults:
            hint = f"for {purpose}: pip install 'lime-edge[{extra}]'"
            yield Finding("package", f"[{extra}]", NOTE, "; ".join(faults), hint)
        else:
            yield Finding("package", f"[{extra}]", GOOD, f"{purpose}: everything is here")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examine_tools() -> Iterator[Finding]:
    compiler = next((name for name in ("cc", "gcc", "clang", "cl") if shutil.which(name)), None)
    if compiler:
        yield Finding("tool", "C compiler", GOOD, compiler)
    else:
        hint = "only to build the operators from source: apt install gcc libc6-dev"
        yield Finding("tool", "C compiler", NOTE, "none on the PATH", hint)
    script = shutil.which("lime-edge")
    own = Path(sys.executable).with_name("lime-edge")
    if script is None:
        hint = f"add {own.parent} to the PATH, or write python -m lime_edge"
        yield Finding("tool", "lime-edge", NOTE, "not on the PATH", hint)


def _examine_storage(here: Path) -> Iterator[Finding]:
    for what, folder in (("this folder", here), ("temporary files", None)):
        try:
            folder = folder or Path(tempfile.gettempdir())
            _try_to_write(folder)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            hint = "free some space" if error.errno == errno.ENOSPC else "write elsewhere"
            hint += ": a bundle's folder must be writable" if what == "this folder" else ", or set TMPDIR"
            yield Finding("storage", what, BAD, f"cannot be written: {error.strerror or error}", hint)
            continue
        text = f"writable, {free / 1e9:.1f} GB free"
        if free < LEAST_SPACE:
            hint = f"free some space: a bundle needs {LEAST_SPACE / 1e9:.1f} GB while it is written"
            yield Finding("storage", what, BAD if what == "this folder" else NOTE, text, hint)
        else:
            yield Finding("storage", what, GOOD, text)


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
        file.flush()


def _examine_cache() -> Iterator[Finding]:
    """The notes of what was hashed before: without them a bundle opens more slowly, and that is all."""
    try:
        cache = find_cache()
        _try_to_write(next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir()))
    except (OSError, RuntimeError, StopIteration) as error:  # RuntimeError: nobody knows a home folder
        found = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        hint = "bundles are hashed whole at every opening, which is slower; XDG_CACHE_HOME names another folder"
        yield Finding("storage", "cache", NOTE, found, hint)
        return
    yield Finding("storage", "cache", GOOD, f"writable: {cache}")


def _examine_bundle(path: Path) -> Iterator[Finding]:
    try:
        bundle = Bundle.open(path)
    except LimeEdgeError as error:
        yield Finding("bundle", str(path), BAD, error.problem, error.hint)
        return
    manifest = bundle.manifest
    text = f"{len(manifest.experts)} experts, {bundle.total_bytes / 1e6:.0f} MB, for {', '.join(manifest.targets)}"
    yield Finding("bundle", str(path), GOOD, text)
    for target in manifest.targets:
        health = examine_engine(target)
        state = GOOD if health.works else BAD
        yield Finding("bundle", f"on {target}", state, "runs here" if health.works else health.problem, health.hint)
    if not os.access(path, os.W_OK):
        yield Finding("bundle", "experts add", NOTE, "the folder is not writable: no expert can be added", "")
