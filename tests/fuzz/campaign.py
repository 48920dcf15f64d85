"""Many damaged files through the readers, each reader in processes of its own, counted.

    python tests/fuzz/campaign.py [--seconds 3600 | --count 1000] [--readers onnx,gguf] [--start SEED] [--json FILE]

A process may take 10 s and 4 GB for a file. What an engine's crash ends is counted by its signal; every exception
that is no clear error, every hang and every answer that differs where it may not is a bug of ours, named with the seed
that repeats it: --readers NAME --start SEED --count 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["LIME_EDGE_FUZZING"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from readers import READERS, Reader

SLOWEST, MEMORY = 10.0, 4 << 30
FEWEST = 12  # files of a reader, however slow the machine
CHUNK = 400  # files of one process
SHOWN = 40  # bugs of a reader that are printed; all are in the JSON
ENGINES = ("onnx", "executorch", "coreml", "sealed-encoder")


def run_reader(reader: Reader, start: int, count: int | None, seconds: float | None) -> dict[str, Any]:
    """Damage and read until the count is reached, or the time is up and there were FEWEST files."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{reader.name}-"))
    outcomes: Counter[str] = Counter()
    bugs: list[str] = []
    aborts: Counter[str] = Counter()
    seed, slowest = start, 0.0
    end: float | None = None

    def is_over() -> bool:
        return end is not None and time.monotonic() > end and seed - start >= FEWEST

    try:
        reader.make(folder)
        end = None if seconds is None else time.monotonic() + seconds  # what is damaged has been made
        while (count is None or seed < start + count) and not is_over():
            last = min(seed + CHUNK, start + count) if count is not None else seed + CHUNK
            for told, took in _fork(reader, folder, seed, last):
                slowest = max(slowest, took)
                kind, _, detail = told.partition(": ")
                assert kind != "sample", f"the undamaged sample cannot be read: {detail}"
                outcomes[kind] += 1
                if kind == "abort" and reader.name.endswith(ENGINES):
                    aborts[detail] += 1
                elif kind not in ("same", "refused", "other"):
                    bugs.append(f"{reader.name} {seed}: {told}")
                    if len(bugs) <= SHOWN:
                        print(f"BUG {bugs[-1]}", flush=True)
                seed += 1
                if is_over():
                    break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = {"files": seed - start, "outcomes": dict(outcomes), "aborts": dict(aborts), "slowest": round(slowest, 2)}
    print(f"{reader.name:<18} {found}", flush=True)
    return found | {"bugs": bugs}


def _fork(reader: Reader, folder: Path, first: int, last: int) -> Iterator[tuple[str, float]]:
    """Work in a child: yields (outcome, seconds) for each seed; ends early after what ended the child."""
    copy = Path(tempfile.mkdtemp(prefix="fuzz-copy-"))
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    mine, its = os.pipe()
    said = Path(tempfile.mkstemp(prefix="fuzz-said-")[1])
    child = os.fork()
    if child == 0:
        try:
            _serve(reader, copy, first, last, its, said)
        except BaseException as error:
            _tell(its, f"sample: {_describe(error)}")
        os._exit(9)
    os.close(its)
    begin, left, buffer = time.monotonic(), last - first, b""
    try:
        while left:
            ready, _, _ = select.select([mine], [], [], max(0.0, begin + SLOWEST - time.monotonic()))
            if not ready:
                yield "hang", SLOWEST
                return
            piece = os.read(mine, 1 << 16)
            if not piece:
                _, status = os.waitpid(child, 0)
                child = 0
                name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
                yield f"abort: {name} {read_cause(said)}", time.monotonic() - begin
                return
            buffer += piece
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                yield line.decode(), time.monotonic() - begin
                begin, left = time.monotonic(), left - 1
    finally:
        os.close(mine)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        shutil.rmtree(copy, ignore_errors=True)
        said.unlink()


def read_cause(said: Path) -> str:
    """The last thing that was said on standard error before the end, numbers and addresses left out."""
    with said.open("rb") as opened:
        opened.seek(max(0, said.stat().st_size - 4000))
        lines = opened.read().decode("utf-8", "replace").strip().splitlines()
    return re.sub(r"0x[0-9a-f]+|[0-9]+", "#", lines[-1])[-160:] if lines else "in silence"


def _serve(reader: Reader, folder: Path, first: int, last: int, pipe: int, said: Path) -> None:
    """The child: one line per file; what an engine says goes to `said`."""
    chatter = os.open(said, os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    os.dup2(chatter, 1)
    os.dup2(chatter, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    wanted = reader.read(folder)  # in here, so that no thread of an engine has to survive the fork
    for seed in range(first, last):
        try:
            told = reader.work(folder, seed, wanted)
        except BaseException as error:
            told = _describe(error)
        _tell(pipe, told)
    os._exit(0)


def _describe(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"error: {type(error).__name__}: {str(error)[:200]!r} at {Path(place.filename).name}:{place.lineno}"


def _tell(pipe: int, told: str) -> None:
    os.write(pipe, told.replace("\n", " ").encode("utf-8", "replace") + b"\n")


def main() -> None:
    """Run the readers one after another; exit 1 where one has a bug."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="for all readers together")
    parser.add_argument("--count", type=int, help="files per reader")
    parser.add_argument("--readers", default=",".join(READERS), help=", ".join(READERS))
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    names = asked.readers.split(",")
    each = None if asked.seconds is None else asked.seconds / len(names)
    found = {}
    for name in names:
        found[name] = run_reader(READERS[name], asked.start, asked.count, each if asked.count is None else None)
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1))
    total = sum(one["files"] for one in found.values())
    bugs = [bug for one in found.values() for bug in one["bugs"]]
    print(f"{total} damaged files, {len(bugs)} bugs")
    sys.exit(bool(bugs))


if __name__ == "__main__":
    main()
