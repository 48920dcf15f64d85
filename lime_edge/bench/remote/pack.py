"""The helper (there/) as one file that a device's Python runs: a zip with the modules in their own places."""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import cache
from pathlib import Path

START = "import sys\n\nfrom lime_edge.bench.remote.there.main import main\n\nsys.exit(main())\n"
PACKAGES = ("lime_edge", "lime_edge/bench", "lime_edge/bench/remote")  # empty ones there: nothing of theirs is needed


@cache
def pack_helper() -> tuple[str, bytes]:
    """The file's name, which changes with its contents, and its bytes."""
    files = {"__main__.py": START} | {f"{package}/__init__.py": "" for package in PACKAGES}
    for path in sorted(Path(__file__).with_name("there").glob("*.py")):
        files[f"lime_edge/bench/remote/there/{path.name}"] = path.read_text(encoding="utf-8")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)  # the same date in every file
    return f"helper-{hashlib.sha256(data.getvalue()).hexdigest()[:16]}.pyz", data.getvalue()
