"""A first look at a device, by its shell alone; what it lacks is said before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass

from lime_edge.bench.remote.addresses import Device
from lime_edge.bench.remote.ssh import Connection
from lime_edge.errors import EXIT_MISSING, Faults, LimeEdgeError

OLDEST, NEWEST = (3, 11), (3, 13)  # requires-python of pyproject.toml
ARCHES = ("x86_64", "amd64", "aarch64", "arm64")
SYSTEMS = ("Linux", "Darwin")
LEAST_MEMORY = 128_000_000  # bytes that must be free to open even a tiny bundle
ENVIRONMENT_SIZE = 500_000_000  # bytes of numpy, ONNX Runtime and their installation
# Every line it prints is "name value"; what a device does not have prints nothing.
SCRIPT = """
root=$1; wanted=$2
case "$root" in /*) ;; *) root="$HOME/$root" ;; esac
echo "root $root"
echo "system $(uname -s)"
echo "arch $(uname -m)"
at="$root"; while [ ! -d "$at" ]; do at=$(dirname "$at"); done
[ -w "$at" ] || echo "readonly $at"
echo "disk $(df -Pk "$at" | awk 'NR == 2 { print $4 }')"
[ -r /proc/meminfo ] && awk '/^MemAvailable:/ { print "memory " $2 }' /proc/meminfo
for helper in "$root"/helper-*.pyz; do [ -f "$helper" ] && echo "helper $helper"; done
for name in ${wanted:-python3.13 python3.12 python3.11 python3}; do
    found=$(command -v "$name") || continue
    version=$("$found" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
    echo "python $version $found"
done
command -v cc >/dev/null && echo "compiler yes"
echo "end ."
"""


@dataclass(frozen=True)
class Facts:
    """What the shell said.

    root: the folder, absolute. disk, memory: bytes free; None: it does not say. pythons: (version, path) as found.
    readonly: a folder that cannot be written to, or empty. compiler: whether there is a cc.
    """

    root: str
    system: str
    arch: str
    disk: int | None
    memory: int | None
    pythons: tuple[tuple[str, str], ...]
    helpers: tuple[str, ...]
    readonly: str
    compiler: bool

    @property
    def python(self) -> str | None:
        """The first interpreter that is new enough and not too new."""
        return next((path for version, path in self.pythons if OLDEST <= _numbers(version) <= NEWEST), None)


async def probe(connection: Connection) -> Facts:
    """Ask the device's shell.

    Raises:
        LimeEdgeError: there is no POSIX shell.
    """
    device = connection.device
    connection.step = "looking at the device"
    command = ["/bin/sh", "-c", SCRIPT, "sh", device.folder, device.python or ""]
    answer = await connection.run(command)
    lines = [line.partition(" ") for line in answer.out.decode(errors="replace").splitlines()]
    if ("end", " ", ".") not in lines:
        said = next(iter(answer.err.strip().splitlines()), "nothing")
        raise LimeEdgeError(
            f"{device.name}: the device's shell did not answer as one does: {said}",
            "Linux and macOS are known: a login that prints text, or another system, is not",
            EXIT_MISSING,
        )
    said_once = {name: value for name, _, value in lines}
    several = [tuple(value.split(" ", 1)) for name, _, value in lines if name == "python"]
    disk, memory = (_kilobytes(said_once.get(name)) for name in ("disk", "memory"))
    return Facts(
        said_once["root"],
        said_once["system"],
        said_once["arch"],
        disk,
        memory,
        tuple(pair for pair in several if len(pair) == 2),
        tuple(value for name, _, value in lines if name == "helper"),
        said_once.get("readonly", ""),
        "compiler" in said_once,
    )


def find_lacks(device: Device, facts: Facts) -> list[tuple[str, str, str]]:
    """What keeps lime_edge from running there: (what, expected and found, hint) of each."""
    lacks = []
    if facts.system not in SYSTEMS:
        lacks.append(("system", f"expected {' or '.join(SYSTEMS)}, found {facts.system}", "it is not known here"))
    if facts.arch not in ARCHES:
        hint = "a 32-bit system on a 64-bit board: install its 64-bit image" if facts.arch.startswith("arm") else ""
        lacks.append(("processor", f"expected one of {', '.join(ARCHES)}, found {facts.arch}", hint))
    if facts.python is None:
        found = ", ".join(f"{version} ({path})" for version, path in facts.pythons)
        found = found or (f"no {device.python}" if device.python else "none")
        wanted = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
        hint = "apt install python3.11 python3.11-venv, or name another one: `python`"
        lacks.append(("Python", f"expected {wanted}, found {found}", hint))
    if facts.readonly:
        lacks.append(("folder", f"{facts.readonly} cannot be written to", "give the hosts file another folder"))
    if facts.memory is not None and facts.memory < LEAST_MEMORY:
        needed, free = LEAST_MEMORY / 1e6, facts.memory / 1e6
        lacks.append(("memory", f"expected {needed:.0f} MB free, found {free:.0f}", "close other programs there"))
    return lacks


def check_facts(device: Device, facts: Facts) -> str:
    """The interpreter to use.

    Raises:
        LimeEdgeError: the device lacks something; all of it is named.
    """
    lacks = find_lacks(device, facts)
    hint = "; ".join(dict.fromkeys(hint for *_, hint in lacks if hint))
    faults = Faults(f"{device.name} ({facts.system} {facts.arch})", hint)
    for what, found, _ in lacks:
        faults.add(f"{what}: {found}")
    try:
        faults.raise_any()
    except LimeEdgeError as error:
        raise LimeEdgeError(error.problem, error.hint, EXIT_MISSING) from None
    assert facts.python is not None
    return facts.python


def _numbers(version: str) -> tuple[int, int]:
    parts = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    return (parts[0], parts[1]) if len(parts) == 2 else (0, 0)


def _kilobytes(text: str | None) -> int | None:
    return int(text) * 1024 if text and text.isdecimal() else None
