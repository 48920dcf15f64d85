"""Build the operators for arm64 Android without the NDK, and check what Android's loader will look at.

    python tools/android_operators.py examples/android/app/src/main/jniLibs/arm64-v8a/liblime_edge_operators.so

The compiler is the one that PyPI's `ziglang` brings (clang and lld); it has no headers of Android, so the few standard
ones come from musl, and the library is linked against a stand-in for Android's libc.so that has nothing but the
functions below: any other one is an error when linking. Where an NDK is at hand, examples/android/README.md has its
command. Never run on a phone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "runtimes" / "onnx" / "operators"
TARGET = "aarch64-linux-musl"
LIBC = ("calloc", "free", "malloc", "memcpy", "memset")  # in Android's libc.so since its first version
EXPORTED = ("RegisterCustomOps", "lime_edge_subtract", "lime_edge_supported")
PAGE = 16384  # what Google asks of native libraries since Android 15
COMPILE = ("-O3", "-std=gnu11", "-fvisibility=hidden", "-fPIC")
LINK = ("-shared", "-nostdlib", "-s", "-Wl,-z,defs", f"-Wl,-z,max-page-size={PAGE}")


def build_operators(output: Path) -> None:
    """Compile and link the operators.

    Args:
        output: the library; its folder is made.
    Raises:
        SystemExit: no compiler, or it refuses something.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        libc = Path(work) / "libc.so"
        stubs = Path(work) / "libc.c"
        stubs.write_text("".join(f"void {name}(void) {{}}\n" for name in LIBC), encoding="utf-8")
        _compile("-shared", "-nostdlib", "-fno-builtin", "-w", "-Wl,-soname,libc.so", stubs, "-o", libc)
        objects = []
        for source in sorted(SOURCES.glob("*.c")):
            objects.append(Path(work) / f"{source.stem}.o")
            _compile(*COMPILE, "-c", source, "-o", objects[-1])
        _compile(*LINK, f"-Wl,-soname,{output.name}", *objects, libc, "-o", output)


def _compile(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "ziglang", "cc", f"--target={TARGET}", *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{found.stderr.strip()}\nthe compiler: pip install ziglang")


def check_library(library: Path) -> list[str]:
    """What Android's loader, or Google's store, would refuse: nothing where all is well. Asks binutils' `readelf`."""
    faults = []
    if (machine := _find(r"Machine:\s*(.*)", _read(library, "-h"))) != ["AArch64"]:
        faults.append(f"machine: expected AArch64, found {machine}")
    if (needed := _find(r"\(NEEDED\).*\[(.*)\]", _read(library, "-d"))) != ["libc.so"]:
        faults.append(f"needed libraries: expected libc.so, found {needed}")
    for align in _find(r"^\s*LOAD\s.*\s(0x[0-9a-f]+)$", _read(library, "-l")):
        if int(align, 16) % PAGE:
            faults.append(f"a segment's alignment: expected a multiple of {PAGE}, found {int(align, 16)}")
    if "TEXTREL" in _read(library, "-d"):
        faults.append("the code would be changed when it is loaded (TEXTREL)")
    symbols = [line.split() for line in _read(library, "--dyn-syms").splitlines() if re.match(r"\s*\d+:", line)]
    named = [(fields[6], fields[7]) for fields in symbols if len(fields) > 7]
    exported = tuple(sorted(name for place, name in named if place != "UND"))
    if exported != tuple(sorted(EXPORTED)):
        faults.append(f"exported symbols: expected {', '.join(EXPORTED)}, found {', '.join(exported)}")
    if odd := sorted({name for place, name in named if place == "UND"} - set(LIBC)):
        faults.append(f"symbols from elsewhere: expected {', '.join(LIBC)}, found {', '.join(odd)}")
    return faults


def _read(library: Path, what: str) -> str:
    return subprocess.run(["readelf", "-W", what, str(library)], capture_output=True, text=True, check=True).stdout


def _find(pattern: str, text: str) -> list[str]:
    return re.findall(pattern, text, re.MULTILINE)


def main() -> None:
    """Build, check, say what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="where the library goes")
    output: Path = parser.parse_args().output
    build_operators(output)
    if faults := check_library(output):
        output.unlink()
        raise SystemExit("\n".join(faults))
    print(f"{output}: {output.stat().st_size} bytes, arm64, needs libc.so only, pages of {PAGE} bytes")


if __name__ == "__main__":
    main()
