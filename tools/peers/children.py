"""Long-lived child processes, one engine each, asked in turn; and what the others burn meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
TICKS = os.sysconf("SC_CLK_TCK")


class EngineError(Exception):
    """An engine could not do what it was asked."""


class Child:
    """One worker process. Leaving the `with` block ends it."""

    def __init__(self, engine: str, threads: int, log: Path):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.before = self.ask("imports", engine=engine)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Have one thing done.

        Raises:
            EngineError: it failed, or the process died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = Path(self._log.name).read_text().strip().splitlines()[-1:]
            raise EngineError(f"the process ended: {''.join(tail) or self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise EngineError(reply["error"])
        return reply["ok"]

    def cpu_seconds(self) -> float:
        """Processor time the process has used so far. Source: proc_pid_stat(5), utime and stime."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
