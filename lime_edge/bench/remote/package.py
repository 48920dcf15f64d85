"""lime_edge itself as something to install elsewhere: a wheel for machines like this one, sources for any other.

python -m lime_edge.bench.remote.package DIR       (what `make wheel` does)
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lime_edge
from lime_edge.bundle.seen import find_cache
from lime_edge.bundle.staging import stage_directory
from lime_edge.errors import LimeEdgeError, need

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "lime_edge", "exporters", "runtimes")
LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", "*.so", "*.pyd", "*.egg-info", "kotlin", "swift", "target", "build", ".*"
)
WHEEL = re.compile(r"lime_edge-(?P<version>[^-]+)-(?P<python>[^-]+)-(?P<abi>[^-]+)-(?P<platform>[^-]+)\.whl")


@dataclass(frozen=True)
class Package:
    """What one can install. key: names its contents; files: a wheel, sources, or both; none: take it from an index."""

    key: str
    files: tuple[Path, ...] = ()

    def choose(self, there: dict[str, Any]) -> Path | None:
        """The wheel where it fits the device, else the sources; None where there is neither.

        Args:
            there: tag (cp311), platform (linux_aarch64), libc ([2, 36]) of the device's Python.
        """
        fitting = [file for file in self.files if fits(file.name, there)]
        return next(iter([*fitting, *(file for file in self.files if file.name.endswith(".tar.gz"))]), None)


def fits(name: str, there: dict[str, Any]) -> bool:
    """Whether a wheel was made for such a machine; its C library may be older there than here, not the other way."""
    found = WHEEL.fullmatch(name)
    if found is None or found["python"] not in (there["tag"], "py3"):
        return False
    if found["platform"] == "any" or found["platform"].startswith("manylinux"):
        return found["platform"] == "any" or found["platform"].endswith(there["platform"].partition("_")[2])
    mine = [int(part) for part in platform.libc_ver()[1].split(".")[:2] if part.isdecimal()]
    return found["platform"] == there["platform"] and list(there["libc"]) >= mine


def find_package(wheels: Path | None) -> Package:
    """lime_edge of this version: among carried wheels, from this checkout, or nothing but its version.

    Args:
        wheels: a folder of wheels that is brought along.
    Raises:
        LimeEdgeError: it cannot be built.
    """
    if wheels is not None:
        own = sorted(path for path in wheels.iterdir() if path.name.startswith(f"lime_edge-{lime_edge.__version__}"))
        if own:
            return Package(hash_files(own), tuple(own))
    source = Path(lime_edge.__file__).parent.parent
    if not (source / "pyproject.toml").is_file() or not (source / "exporters").is_dir():
        return Package(lime_edge.__version__)
    files = list_sources(source)
    key = hash_files(files, source)
    folder = find_cache() / "packages" / f"{key}-cp{sys.version_info[0]}{sys.version_info[1]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix="lime-edge.") as temporary:
            built = build_distributions(source, Path(temporary) / "dist")
            with stage_directory(folder, replace=True) as stage:
                for file in built:
                    shutil.copy(file, stage)
    return Package(key, tuple(sorted(folder.iterdir())))


def list_sources(source: Path) -> list[Path]:
    """Every file that the package is made of."""
    found: list[Path] = []
    for name in SOURCES:
        path = source / name
        if path.is_file():
            found.append(path)
            continue
        for folder, folders, files in path.walk() if hasattr(path, "walk") else _walk(path):
            left_out = LEFT_OUT(str(folder), [*folders, *files])
            folders[:] = sorted(set(folders) - left_out)
            found += [folder / file for file in sorted(set(files) - left_out)]
    return found


def _walk(path: Path) -> Any:
    import os  # Path.walk came with Python 3.12

    for folder, folders, files in os.walk(path):
        yield Path(folder), folders, files


def hash_files(files: list[Path], root: Path | None = None) -> str:
    """One name for the contents of files."""
    digest = hashlib.sha256()
    for file in files:
        name = str(file.relative_to(root)) if root else file.name
        digest.update(f"{name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def build_distributions(source: Path, out: Path) -> list[Path]:
    """Write the sources and a wheel built from them into `out`; the checkout itself is not touched.

    Raises:
        LimeEdgeError: the package `build` is missing, or it failed.
    """
    if find_spec("build") is None or find_spec("build.__main__") is None:
        raise need("build", "remote")
    with tempfile.TemporaryDirectory(prefix="lime-edge.") as temporary:
        copy = Path(temporary) / "source"
        for file in list_sources(source):
            place = copy / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        command = [sys.executable, "-m", "build", "--outdir", str(out.absolute())]
        if _has_setuptools():  # else build makes an environment of its own, from an index
            command.append("--no-isolation")
        done = subprocess.run([*command, str(copy)], capture_output=True, text=True, cwd=temporary)
    if done.returncode:
        said = "\n".join(f"    {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-8:])
        raise LimeEdgeError(f"lime_edge cannot be built from {source}:\n{said}", "make wheel says more")
    return sorted(out.iterdir())


def _has_setuptools() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return int(version("setuptools").split(".")[0]) >= 77
    except (PackageNotFoundError, ValueError):
        return False


if __name__ == "__main__":
    for built in build_distributions(Path(lime_edge.__file__).parent.parent, Path(sys.argv[1])):
        print(built)
