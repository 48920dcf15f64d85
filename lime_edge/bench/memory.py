"""Memory by stage, in a fresh process: nothing that another session left behind is counted.

Each function starts `python -m lime_edge.bench.memory`, which opens the bundle and answers in JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from lime_edge.bench.work import Load, find_work
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import Expert, Selection
from lime_edge.errors import LimeEdgeError
from lime_edge.session.engines import SessionOptions
from lime_edge.session.switching import ExpertSwitch

COUNTS = (1, 10, 100)
FIRST = ""  # what a session opens with: the bundle's first expert
Stage = dict[str, int | None]


@dataclass(frozen=True)
class MemoryRequest:
    """What the fresh process does.

    tokens: of the prompt (encoders: of the text). before: tokens in the cache before decoding, None for the
    prompt's. decoded: tokens decoded after it. modules: what the engine imports, see `find_imports`. providers: see
    SessionOptions.
    """

    path: str
    target: str
    selection: Selection
    threads: int | None
    tokens: int
    before: int | None
    decoded: int
    modules: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()


def find_imports(request: MemoryRequest) -> tuple[str, ...]:
    """Every module that is loaded once the bundle has answered: some engines import themselves when they are used."""
    return tuple(_run("imports", request))


def measure_stages(request: MemoryRequest) -> dict[str, Stage]:
    """Memory after each stage: python, imports, opened, prompt, switches.

    Returns:
        Per stage {"rss_bytes", "anonymous_bytes", "peak_bytes"}, null where the platform does not tell.
    Raises:
        LimeEdgeError: the process failed; its last line is told.
    """
    return _run("stages", request)


def measure_experts(request: MemoryRequest) -> dict[str, Stage]:
    """Memory with 1, 10 and 100 experts, each used once; the request's selection must be FIRST.

    Returns, Raises: as `measure_stages`, by number of experts.
    """
    return _run("experts", request)


def _run(task: str, request: MemoryRequest) -> Any:
    command = [sys.executable, "-m", "lime_edge.bench.memory", task, json.dumps(asdict(request))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LimeEdgeError(
            f"{request.path}: the process that measures memory failed: {lines[-1]}",
            "is there memory for another session?",
        )
    return json.loads(done.stdout.splitlines()[-1])


def read_memory() -> Stage:
    """This process now: resident, of that anonymous (no file behind it), and the peak so far, in bytes.

    Source: proc_pid_status(5): VmRSS, RssAnon, VmHWM in kB; elsewhere getrusage(2) and ps(1).
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _ask_platform()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {"rss_bytes": found.get("VmRSS"), "anonymous_bytes": found.get("RssAnon"), "peak_bytes": found.get("VmHWM")}


def _ask_platform() -> Stage:
    """Where there is no /proc: macOS has getrusage and ps, Windows neither."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
        return {"rss_bytes": int(shown.stdout) * 1024, "anonymous_bytes": None, "peak_bytes": peak}
    except (ImportError, OSError, ValueError, subprocess.CalledProcessError):
        return {"rss_bytes": None, "anonymous_bytes": None, "peak_bytes": None}


def _walk_stages(request: MemoryRequest) -> dict[str, Stage]:
    stages = {"python": read_memory()}
    bundle = _import_engine(request)
    for name in request.modules:
        with suppress(Exception):  # some names are made by hand and cannot be imported
            importlib.import_module(name)
    stages["imports"] = read_memory()
    session = _open(bundle, request)
    stages["opened"] = read_memory()
    _answer(session, request)
    stages["prompt"] = read_memory()
    if len(session.experts) > 1:
        for name in session.experts:
            session.use(name)
        _answer(session, request)
    stages["switches"] = read_memory()
    return stages


def _count_experts(request: MemoryRequest) -> dict[str, Stage]:
    """The bundle's first expert, then synthetic ones installed beside it."""
    bundle = _import_engine(request)
    first = bundle.manifest.expert_list[0]
    alone = structs.replace(bundle.manifest, expert_list=(first,), default=first.name)
    session = _open(Bundle(bundle.path, alone), request)
    _answer(session, request)
    random, found = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            while len(session.experts) < count:
                file = Path(folder) / "synthetic.safetensors"
                vector = random.normal(1.0, 0.1, bundle.manifest.sites.total)
                dtype = bundle.manifest.adapter.expert_dtype
                expert = Expert(f"bench-{len(session.experts)}", vector.astype(dtype), bundle.manifest.adapter_id)
                file.write_bytes(expert.to_bytes())
                session.install(file)
            for name in session.experts:
                session.use(name)
            _answer(session, request)
            found[str(count)] = read_memory()
    return found


def _list_modules(request: MemoryRequest) -> list[str]:
    _answer(_open(_import_engine(request), request), request)
    return list(sys.modules)


def _import_engine(request: MemoryRequest) -> Bundle:
    from lime_edge.session.open import load_engine

    bundle = Bundle.open(request.path)
    load_engine(bundle, request.target)
    return bundle


def _open(bundle: Bundle, request: MemoryRequest) -> ExpertSwitch:
    from lime_edge.session.open import open_any

    options = SessionOptions(request.threads, _describe_load(request).filled, tuple(request.providers))
    session = open_any(bundle, request.target, options)
    if request.selection != FIRST:
        session.use(request.selection)
    return session


def _answer(session: ExpertSwitch, request: MemoryRequest) -> None:
    """One prompt and its answer, or one call of an encoder."""
    find_work(session.bundle).answer(session, _describe_load(request))


def _describe_load(request: MemoryRequest) -> Load:
    return Load((request.tokens,), request.decoded, request.before)


TASKS = {"imports": _list_modules, "stages": _walk_stages, "experts": _count_experts}


def main() -> None:
    """Do one task; its answer is the last line of standard output."""
    try:
        print(json.dumps(TASKS[sys.argv[1]](MemoryRequest(**json.loads(sys.argv[2])))))
    except LimeEdgeError as error:
        print(error.problem, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
