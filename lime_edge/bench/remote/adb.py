"""A phone as adb's server shows it: its shell, files pushed to it, what an app of it may read; by adbutils."""

from __future__ import annotations

import shlex
import threading
from pathlib import Path
from typing import Any

from lime_edge.bench.remote.addresses import Device
from lime_edge.errors import EXIT_MISSING, EXIT_STORAGE, LimeEdgeError, need

PATIENCE = 60.0  # seconds for one command
SHARED = "/data/local/tmp"  # adb's user writes there, apps can read it
FAILED = "the command failed"


class Cut(Exception):
    """Ctrl-C came: the thread that talks to the phone ends at its next command."""


class Phone:
    """One phone. Every method blocks; `stop` makes the next one raise Cut.

    sent: bytes that were pushed. step: what is being done, for the message when it is cut.
    """

    def __init__(self, device: Device, raw: Any):
        self.device = device
        self.stop = threading.Event()
        self.sent = 0
        self.step = "looking at the phone"
        self._raw = raw

    def shell(self, command: str, check: bool = True) -> str:
        """What a command prints.

        Raises:
            LimeEdgeError: it failed (where checked), or the phone is gone.
        """
        return self._run(command, check).decode(errors="replace").strip()

    def run_as(self, script: str, *arguments: str, check: bool = True) -> str:
        """What a shell script prints, run as the app, in its folder."""
        return self._run(self._as_app(script, arguments), check).decode(errors="replace").strip()

    def read(self, path: str) -> bytes:
        """The bytes of a file of the app; empty where there is none."""
        return self._run(self._as_app('[ -f "$1" ] && cat "$1" || true', (path,)), True)

    def _as_app(self, script: str, arguments: tuple[str, ...]) -> str:
        words = ["run-as", self.device.package, "sh", "-c", script, "sh", *arguments]
        return " ".join(map(shlex.quote, words))

    def _run(self, command: str, check: bool) -> bytes:
        import adbutils

        if self.stop.is_set():
            raise Cut
        try:
            done = self._raw.shell2(command, timeout=PATIENCE, encoding=None)
        except (OSError, EOFError, ValueError, adbutils.AdbError) as error:
            raise self.explain_loss(error) from None
        if check and done.returncode:
            said = done.output.decode(errors="replace").strip()
            full = "No space left" in said
            hint = "free some space on the phone" if full else "see what adb shell says"
            where = f"{self.device.name}: {FAILED} while {self.step} (exit code {done.returncode}): {said[-400:]}"
            raise LimeEdgeError(where, hint, EXIT_STORAGE if full else EXIT_MISSING)
        return bytes(done.output)

    def push(self, file: Path, path: str) -> None:
        """Copy a file to the phone.

        Raises:
            LimeEdgeError: the phone is gone, or full.
        """
        import adbutils

        if self.stop.is_set():
            raise Cut
        try:
            self.sent += self._raw.sync.push(str(file), path, 0o644, check=True)
        except (OSError, EOFError, ValueError, adbutils.AdbError) as error:
            raise self.explain_loss(error) from None

    def explain_loss(self, error: Exception) -> LimeEdgeError:
        """The error of a phone that does not answer any more."""
        return LimeEdgeError(
            f"{self.device.name}: the phone was lost while {self.step}: {error or type(error).__name__}",
            "is the cable in, is USB debugging on? Run it again: what was begun there is removed then",
            EXIT_MISSING,
        )


def find_phone(device: Device) -> Phone:
    """The phone of an address, ready to be asked.

    Raises:
        LimeEdgeError: adbutils or adb is missing; no such phone, several, or one that has not allowed debugging.
    """
    try:
        import adbutils
    except ImportError:
        raise need("adbutils", "remote") from None
    try:
        client = adbutils.AdbClient()
        states = {info.serial: info.state for info in client.list()}
    except (OSError, EOFError, ValueError, adbutils.AdbError) as error:
        hint = "install adb (Android's platform tools) and see what adb devices says"
        raise LimeEdgeError(f"{device.name}: adb's server does not answer: {error}", hint, EXIT_MISSING) from None
    serial = device.serial
    there = ", ".join(f"{name} ({state})" for name, state in states.items()) or "none"
    ready = [name for name, state in states.items() if state == "device"]
    if serial is None:
        if len(ready) != 1:
            hint = "name one: adb:SERIAL" if ready else "plug one in and allow USB debugging on its screen"
            raise LimeEdgeError(f"{device.name}: expected one phone, found {there}", hint, EXIT_MISSING)
        serial = ready[0]
    if states.get(serial) != "device":
        found = f"it is {states[serial]}" if serial in states else f"found {there}"
        hint = "unlock the phone and allow USB debugging from this computer"
        raise LimeEdgeError(f"{device.name}: no phone {serial} that answers: {found}", hint, EXIT_MISSING)
    return Phone(device, client.device(serial))
