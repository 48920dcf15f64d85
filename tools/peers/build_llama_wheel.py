"""Build a llama-cpp-python wheel for any x86-64 Linux and Python: code for every processor, chosen as it is loaded.

The wheels of the package index are built for one processor or on the spot; a machine without a network takes this one.
Needs cmake, ninja, a C++ compiler, and pip with the network. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.3.36"
FLAGS = (
    "GGML_NATIVE=OFF",
    "GGML_BACKEND_DL=ON",
    "GGML_CPU_ALL_VARIANTS=ON",
    "LLAVA_BUILD=OFF",
    "CMAKE_BUILD_TYPE=Release",
)
LIBRARIES = "llama_cpp/lib/"


def build(folder: Path) -> Path:
    """The wheel as the package builds it."""
    environment = os.environ | {"CMAKE_ARGS": " ".join(f"-D{flag}" for flag in FLAGS)}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-cache-dir",
        "--no-binary",
        "llama-cpp-python",
        f"llama-cpp-python=={VERSION}",
        "-w",
        str(folder),
    ]
    subprocess.run(command, env=environment, check=True)
    return next(folder.glob("llama_cpp_python-*.whl"))


def place(name: str) -> str | None:
    """Where a file of the wheel belongs; None: nowhere. The processors' libraries go beside the others."""
    if name.startswith("bin/libggml-cpu-"):
        return LIBRARIES + name.removeprefix("bin/")
    copies = ".so." in name and len(name.rsplit(".so.", 1)[1].split(".")) > 1  # the same file under its full version
    return None if name.split("/")[0] in ("bin", "lib", "include", "share") or copies else name


def repack(wheel: Path, output: Path, openmp: Path) -> None:
    """Write the wheel again with every file in its place, and OpenMP's library beside them."""
    record: list[str] = []
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as target:
        own = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        files = {
            place(info.filename): source.read(info)
            for info in source.infolist()
            if not info.is_dir() and info.filename != own
        }
        files[f"{LIBRARIES}libgomp.so.1"] = openmp.read_bytes()
        for name, data in files.items():
            if name is not None:
                target.writestr(name, data)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                record.append(f"{name},sha256={digest},{len(data)}")
        target.writestr(own, "\n".join([*record, f"{own},,", ""]))


def main() -> None:
    """Build, repack, say where it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/wheels"))
    parser.add_argument("--openmp", type=Path, default=Path("/usr/lib/x86_64-linux-gnu/libgomp.so.1"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        repack(wheel, arguments.output / wheel.name, arguments.openmp)
    print(f"{arguments.output / wheel.name}: {', '.join(FLAGS)}")


if __name__ == "__main__":
    main()
