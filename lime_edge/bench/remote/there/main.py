"""The helper: one verb a call.

    python3 helper.pyz VERB ROOT      a JSON request on standard input's first line; one JSON line comes back

Everything lies in ROOT:

    environments         env/KEY/             it has that name only when it is whole
    bundles              bundles/ID/NAME/     ID: the first digits of its lime.json's sha256; beside it arrived.json
    on their way         incoming/SHA256      files that arrived whole, until their bundle is put together
    caches               cache/
    half-made            *.partial, *.old     swept by the next one who holds the lock

Standard input stays open while the other side lives. When it closes, or is silent for too long, what was begun is
undone and what was started is killed: a lost connection leaves nothing running and nothing half-made.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import platform
import shutil
import signal
import sys
import sysconfig
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from lime_edge.bench.remote.there.bundles import assemble, compare, is_here, receive
from lime_edge.bench.remote.there.environment import environment, execute, find_ready, find_version, is_ready
from lime_edge.bench.remote.there.place import discard, hold
from lime_edge.bench.remote.there.wire import FULL, Lost, Refusal, Request, read_line, vanish, watch


def look(root: Path, request: Request, _: IO[bytes]) -> Request:
    """Facts of this Python, and which of the environment and the bundles are here.

    Request: key (of the environment), bundles [{id, name, as_is}], packages (names).
    """
    libc = platform.libc_ver()[1]
    return {
        "version": platform.python_version(),
        "tag": f"cp{sys.version_info[0]}{sys.version_info[1]}",
        "platform": sysconfig.get_platform().replace("-", "_").replace(".", "_"),
        "libc": [int(part) for part in libc.split(".")[:2]] if libc else [],
        "venv": all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
        "environment": bool(request["key"]) and is_ready(root / "env" / request["key"]),
        "environments": [(ready.parent.name, json.loads(ready.read_text())["lime_edge"]) for ready in find_ready(root)],
        "packages": {name: find_version(name) for name in request.get("packages", ())},
        "bundles": [is_here(root, one) for one in request["bundles"]],
        "free": shutil.disk_usage(next(place for place in (root, *root.parents) if place.exists())).free,
    }


def clean(root: Path, request: Request, _: IO[bytes]) -> Request:
    """Delete the whole folder."""
    size = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    for path in sorted(root.iterdir(), key=lambda path: path.name == ".lock"):
        discard(path)
    root.rmdir()
    return {"bytes": size}


VERBS: dict[str, Callable[[Path, Request, IO[bytes]], Request | int]] = {
    "look": look,
    "compare": compare,
    "receive": receive,
    "assemble": assemble,
    "environment": environment,
    "execute": execute,
    "clean": clean,
}


def main() -> int:
    """Do one verb; 0, or the exit code that the answer has too."""
    verb, root = sys.argv[1], Path(sys.argv[2])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, vanish)
    with open(0, "rb", buffering=0, closefd=False) as source:
        try:
            request = json.loads(read_line(source))
            if verb != "receive":
                threading.Thread(target=watch, daemon=True).start()
            if verb == "look":
                answer: Request | int = look(root, request, source)
            else:
                with hold(root):
                    answer = VERBS[verb](root, request, source)
            if isinstance(answer, int):
                return answer
        except Refusal as error:
            answer = error.answer
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = FULL if full else "nothing half-made is left there"
            answer = {"problem": f"{error.filename or root}: {error.strerror or error}", "hint": hint, "code": 5}
        except Lost:
            return 141
    with suppress(BrokenPipeError):
        print(json.dumps(answer), flush=True)
    code = answer.get("code", 0)
    return code if isinstance(code, int) else 1
