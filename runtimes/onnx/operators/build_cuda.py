"""Builds the operators for NVIDIA GPUs beside this file, with CUDA's compiler: never required, faster where it is.

    python -m lime_edge.runtimes.onnx.operators.build_cuda [--nvcc PATH] [--arch native|87|110|...]

--arch: the GPU's compute capability without its dot (Orin 87, Thor 110, H100 90); native asks the one that is there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lime_edge.errors import EXIT_MISSING, LimeEdgeError
from lime_edge.runtimes.onnx.operators import CUDA_FILE

HERE = Path(__file__).parent
SOURCES = ("registration.c", "attributes.c", "read_pinned.c", "cuda/operators.c", "cuda/kernels.cu")
FLAGS = ("-O3", "-shared", "-cudart", "shared", "-Xcompiler", "-fPIC,-fvisibility=hidden")
USUAL = "/usr/local/cuda/bin/nvcc"


def build(nvcc: str | None = None, arch: str = "native", target: Path = CUDA_FILE) -> Path:
    """Compile and put the library in its place.

    Args:
        nvcc: CUDA's compiler, None to look for it. arch: see the module.
    Raises:
        LimeEdgeError: no compiler, or it refuses; an older library stays as it was.
    """
    compiler = nvcc or shutil.which("nvcc") or shutil.which(USUAL)
    if compiler is None:
        hint = f"install CUDA's toolkit, or name it with nvcc=; looked on the PATH and at {USUAL}"
        raise LimeEdgeError("CUDA's compiler nvcc was not found", hint, EXIT_MISSING)
    wanted = f"-arch={arch if arch == 'native' else f'sm_{arch}'}"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build_cuda_") as folder:
        built = Path(folder) / target.name
        sources = [str(HERE / source) for source in SOURCES]
        done = subprocess.run([compiler, *FLAGS, wanted, *sources, "-o", str(built)], capture_output=True, text=True)
        if done.returncode:
            raise LimeEdgeError(f"nvcc refused the operators:\n{done.stderr.strip()[-2000:]}", "is --arch right?")
        built.replace(target)
    return target


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc")
    parser.add_argument("--arch", default="native")
    given = parser.parse_args()
    try:
        print(build(given.nvcc, given.arch))
    except LimeEdgeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
