"""A FAKE of adb's server with one phone: the server's protocol over TCP, and a "phone" that is a folder and a shell.

It speaks what adbutils asks for (Source: Android, adb's OVERVIEW.TXT, SERVICES.TXT and SYNC.TXT): `host:` services,
`shell:` and `sync:` with STAT and SEND. Commands run in this machine's /bin/sh with the phone's own tools (run-as, am,
pm, getprop, logcat, ...) replaced by small scripts. No phone, no Android: what toybox, SELinux or the activity manager
do is not in it.
"""

from __future__ import annotations

import json
import os
import socketserver
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

SERIAL, PACKAGE = "FAKE0001", "limeedge.example"
TOOLS = {
    "getprop": 'case "$1" in *.abi) echo arm64-v8a;; *.sdk) echo 34;; *) echo "Fake phone";; esac',
    "df": 'echo "filesystem 1 1 $(cat "$PHONE/free") 1% /data"',
    "pm": f'[ "$2" = {PACKAGE} ] && echo package:/data/app/base.apk',
    "run-as": f'[ "$1" = {PACKAGE} ] || {{ echo "unknown package"; exit 1; }}; shift; cd "$PHONE/app" && exec "$@"',
    "dumpsys": 'echo "Thermal Status: $(cat "$PHONE/thermal")"',
    "logcat": 'cat "$PHONE/log"',
    "pidof": '[ -f "$PHONE/running" ] && cat "$PHONE/running"',
    "am": 'exec "$PYTHON" "$PHONE/activity_manager.py" "$@"',
}
# `am start` with extras starts the app's activity in the background, as Android does; `am force-stop` ends it.
ACTIVITY_MANAGER = """
import json, os, signal, subprocess, sys
from pathlib import Path

phone = Path(os.environ["PHONE"])
words = sys.argv[1:]
if words[0] == "force-stop":
    (phone / "stopped").write_text("")
    if (phone / "running").exists():
        os.killpg(int((phone / "running").read_text()), signal.SIGKILL)
        (phone / "running").unlink()
    sys.exit()
extras = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "--es"}
(phone / "extras.json").write_text(json.dumps(extras))
if "/limeedge.android.BenchmarkActivity" not in words[words.index("-n") + 1]:
    sys.exit("Error type 3\\nError: Activity class does not exist.")
(phone / "log").write_text("")
app = json.loads((phone / "app.json").read_text())
supervise = [sys.executable, str(phone / "supervise.py"), json.dumps(app), json.dumps(extras)]
nothing = subprocess.DEVNULL
child = subprocess.Popen(supervise, start_new_session=True, stdin=nothing, stdout=nothing, stderr=nothing)
(phone / "running").write_text(str(child.pid))
print("Status: ok")
"""
SUPERVISE = """
import json, os, subprocess, sys
from pathlib import Path

phone = Path(os.environ["PHONE"])
app, extras = json.loads(sys.argv[1]), json.loads(sys.argv[2])
with (phone / "log").open("a") as log:
    subprocess.run([*app, str(phone / "app"), json.dumps(extras)], stdout=log, stderr=subprocess.STDOUT)
(phone / "running").unlink(missing_ok=True)
"""


@dataclass
class FakePhone:
    """The fake. folder: the phone's; pushed: bytes that arrived by sync SEND; state: what the server says of it."""

    folder: Path
    port: int = 0
    pushed: int = 0
    state: str = "device"
    cut_after: int | None = None  # bytes of pushes after which every connection is dropped
    commands: list[str] = field(default_factory=list)

    @property
    def app(self) -> Path:
        """The app's own folder."""
        return self.folder / "app"

    def environment(self) -> dict[str, str]:
        """For lime-edge on the workstation's side."""
        kept = {key: value for key, value in os.environ.items() if key != "ANDROID_SERIAL"}
        return kept | {"ANDROID_ADB_SERVER_PORT": str(self.port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """lime-edge, in a process of its own."""
        command = [sys.executable, "-m", "lime_edge", *words]
        return subprocess.run(command, env=self.environment(), capture_output=True, text=True)

    def place(self, path: str) -> Path:
        """A path of the phone, here."""
        return self.folder / path.lstrip("/")


@contextmanager
def serve(folder: Path, app: list[str]) -> Iterator[FakePhone]:
    """The fake server and its phone, until the block ends.

    Args:
        app: the command that stands for the app's activity; it is given the app's folder and the extras as JSON.
    """
    phone = FakePhone(folder)
    for path in ("app/files", "data/local/tmp", "bin"):
        (folder / path).mkdir(parents=True)
    for name, script in TOOLS.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    texts = {
        "activity_manager.py": ACTIVITY_MANAGER,
        "supervise.py": SUPERVISE,
        "log": "",
        "thermal": "0",
        "free": "9000000",
    }
    for name, text in (texts | {"app.json": json.dumps(app)}).items():
        (folder / name).write_text(text)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address, daemon_threads = True, True

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError, EOFError):
                _Conversation(phone, self.request).hold()

    with Server(("127.0.0.1", 0), Handler) as server:
        phone.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield phone
        finally:
            server.shutdown()
            subprocess.run([str(folder / "bin" / "am"), "force-stop", PACKAGE], env=_phone_environment(phone))


def _phone_environment(phone: FakePhone) -> dict[str, str]:
    path = f"{phone.folder}/bin:{os.environ['PATH']}"
    return os.environ | {"PHONE": str(phone.folder), "PATH": path, "PYTHON": sys.executable}


class _Conversation:
    """One connection: requests have four hexadecimal digits of length before them; answers begin with OKAY or FAIL."""

    def __init__(self, phone: FakePhone, connection: object):
        self.phone, self.connection = phone, connection

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.connection.recv(count - len(data))  # type: ignore[attr-defined]
            if not piece:
                raise EOFError
            data += piece
        return data

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)  # type: ignore[attr-defined]

    def answer(self, text: str) -> None:
        self.send(b"OKAY" + f"{len(text):04x}{text}".encode())

    def fail(self, text: str) -> None:
        self.send(b"FAIL" + f"{len(text):04x}{text}".encode())

    def hold(self) -> None:
        while True:
            request = self.read(int(self.read(4), 16)).decode()
            if request == "host:version":
                return self.answer("0029")
            if request == "host:devices":
                return self.answer(f"{SERIAL}\t{self.phone.state}\n")
            if request == f"host:tport:serial:{SERIAL}":
                self.send(b"OKAY" + bytes(8))
            elif request.startswith("shell:"):
                self.send(b"OKAY")
                return self.shell(request.removeprefix("shell:"))
            elif request == "sync:":
                self.send(b"OKAY")
                return self.sync()
            else:
                return self.fail(f"unknown service {request}")

    def shell(self, command: str) -> None:
        self.phone.commands.append(command)
        here = command.replace("/data/local/tmp", str(self.phone.place("/data/local/tmp")))
        done = subprocess.run(
            ["/bin/sh", "-c", here],
            env=_phone_environment(self.phone),
            cwd=self.phone.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.send(done.stdout)

    def sync(self) -> None:
        while True:
            verb, length = self.read(4), struct.unpack("<I", self.read(4))[0]
            path = self.read(length).decode()
            if verb == b"STAT":
                file = self.phone.place(path)
                found = file.stat() if file.exists() else None
                facts = (found.st_mode, found.st_size, int(found.st_mtime)) if found else (0, 0, 0)
                self.send(b"STAT" + struct.pack("<III", *facts))
            elif verb == b"SEND":
                self.take(*path.rsplit(",", 1))
            else:
                return self.send(b"FAIL" + struct.pack("<I", 0))

    def take(self, path: str, mode: str) -> None:
        file = self.phone.place(path)
        with file.open("wb") as out:
            while (kind := self.read(4)) == b"DATA":
                data = self.read(struct.unpack("<I", self.read(4))[0])
                out.write(data)
                self.phone.pushed += len(data)
                if self.phone.cut_after is not None and self.phone.pushed > self.phone.cut_after:
                    self.phone.state = "offline"
                    raise EOFError
        assert kind == b"DONE"
        self.read(4)  # the modification time
        file.chmod(stat.S_IMODE(int(mode)))
        self.send(b"OKAY" + struct.pack("<I", 0))
