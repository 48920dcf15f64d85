"""The environment that lime_edge has on the device, and running lime_edge in it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from lime_edge.bench.remote.there.place import NOTES, READY, discard, make, put, write_whole
from lime_edge.bench.remote.there.wire import FULL, Refusal, Request, start

KEPT = 3  # environments that stay
ENVIRONMENT = "the device needs a package index, or carried wheels: `wheels`"


def is_ready(env: Path) -> bool:
    """Whether an environment is whole and its interpreter still there."""
    return (env / READY).is_file() and os.access(env / "bin" / "python", os.X_OK)


def find_ready(root: Path) -> list[Path]:
    """What marks whole environments, the one used last first."""
    return sorted(root.glob(f"env/*/{READY}"), key=lambda file: -file.stat().st_mtime)


def find_version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(root: Path, request: Request, _: IO[bytes]) -> Request:
    """Make env/KEY. Request: key, files {name: sha256}, version, extras, index, site_packages."""
    env = root / "env" / request["key"]
    with make(env) as stage:
        carried = stage / "carried"
        carried.mkdir()
        for name, digest in request["files"].items():
            put(root / "incoming" / digest, carried / name)
        borrowed = request["site_packages"]
        step([sys.executable, "-m", "venv", *(["--without-pip"] if borrowed else []), str(stage)], "venv")
        python = str(stage / "bin" / "python")
        if borrowed:
            paths = {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
            (next(stage.glob("lib/python*/site-packages")) / "borrowed.pth").write_text(
                "".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(paths))
            )
        pip = [python, "-m", "pip", "install", "--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check"]
        pip += ["--find-links", str(carried)] + ([] if request["index"] else ["--no-index"])
        brought = [str(carried / name) for name in request["files"] if name.startswith("lime_edge-")]
        own, version = (brought[0], "") if brought else ("lime-edge", f"=={request['version']}")
        pip += ["--no-deps", "--no-build-isolation", "--ignore-installed"] if borrowed else []
        step([*pip, f"{own}[{request['extras']}]{version}"], "pip install")
        works = "import lime_edge.cli.app as app; print(app.__version__)"
        installed = step([python, "-c", works], "import lime_edge").strip()
        shutil.rmtree(carried)
        script = stage / "bin" / "lime-edge"  # pip's own names the interpreter by the folder's temporary name
        script.write_text('#!/bin/sh\nexec "$(dirname "$0")/python" -m lime_edge "$@"\n')
        script.chmod(0o755)
        facts = {"lime_edge": installed, "python": sys.executable, "made": time.time()}
        write_whole(stage / READY, json.dumps(facts))
    for ready in find_ready(root)[KEPT:]:
        discard(ready.parent)
    for digest in request["files"].values():
        discard(root / "incoming" / digest)
    return {}


def step(command: list[str], what: str) -> str:
    """Run one command of making an environment; what it printed.

    Raises:
        Refusal: it failed; with the last lines it said.
    """
    with start(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        text = (child.stdout.read() if child.stdout else b"").decode(errors="replace")
    if child.returncode:
        said = "\n".join(f"    {line}" for line in text.strip().splitlines()[-6:])
        hint = ENVIRONMENT
        if "No space left" in text:
            hint = FULL
        elif "ensurepip" in text:
            hint = "the device's Python has no venv: apt install python3-venv"
        raise Refusal(f"making the environment: {what} failed:\n{said}", hint, 5 if hint == FULL else 4)
    return text


def execute(root: Path, request: Request, _: IO[bytes]) -> Request | int:
    """Run lime-edge of an environment; its output and exit code are ours. Request: key, words, text (its input)."""
    env = root / "env" / request["key"]
    (env / READY).touch()  # used last: kept longest
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    inherited |= {"PATH": f"{env / 'bin'}{os.pathsep}{os.environ.get('PATH', '/usr/bin:/bin')}", "COLUMNS": "200"}
    inherited |= {"XDG_CACHE_HOME": str(root / "cache"), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(env / "bin" / "python"), "-m", "lime_edge", *request["words"]]
    with start(command, stdin=subprocess.PIPE, env=inherited, cwd=root) as child, suppress(BrokenPipeError):
        child.communicate((request["text"] or "").encode())
    code = child.returncode
    if request["words"][0] == "verify" and code:  # marks did not see the damage: next time every file is hashed
        for notes in (root / "bundles").glob(f"*/{NOTES}"):
            write_whole(notes, json.dumps(dict.fromkeys(json.loads(notes.read_text()), [])))
    return 128 - code if code < 0 else code
