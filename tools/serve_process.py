"""`lime-edge serve` in a process of its own, for what loads and measures it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def start_server(bundle: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """The process, and the free port that it listens on."""
    command = [sys.executable, "-m", "lime_edge", "serve", str(bundle), "--port", "0", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    assert server.stderr is not None
    said = ""
    for line in server.stderr:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            return server, int(found[1])
    raise SystemExit(f"the server did not start:\n{said}")
