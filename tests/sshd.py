"""Debian's openssh-server as a device on loopback: a port, host keys, authorized keys and a home of its own.

Nothing of the user's is touched: the client too gets a home of its own, with its own ~/.ssh.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
FAST = ["-N", "", "-q", "-t", "ed25519"]


class Wire:
    """Everything between client and server goes through here: counted, and cut when it is told to.

    sent: bytes from the client. cut_after: how many of them pass before both ends are closed; None: all.
    """

    def __init__(self, target: int):
        self.target = target
        self.sent = 0
        self.cut_after: int | None = None
        self.cuts = 0
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self, cut_after: int | None = None) -> None:
        """Count from zero."""
        self.sent, self.cut_after = 0, cut_after

    def cut(self) -> None:
        """Close every connection, at once."""
        self.cuts += 1
        ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self._ends += [client, server]
            for source, sink, counted in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._carry, args=(source, sink, counted), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 14):
                if counted:
                    left = None if self.cut_after is None else self.cut_after - self.sent
                    self.sent += len(data)
                    if left is not None and len(data) >= left:
                        sink.sendall(data[: max(0, left)])
                        self.cut_after = None
                        self.cut()
                        return
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class Sshd:
    """A running server. home: what a login finds as $HOME; user_home: the client's; cache: of the client."""

    wire: Wire
    folder: Path
    cache: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "device"

    @property
    def root(self) -> Path:
        """Where lime-edge keeps its things there."""
        return self.home / ".lime-edge"

    @property
    def user_home(self) -> Path:
        return self.folder / "workstation"

    @property
    def address(self) -> str:
        return "ssh://desk-device"  # a name of the client's ~/.ssh/config

    def environment(self) -> dict[str, str]:
        """For lime-edge on the workstation's side."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SSH_", "ANDROID_"))}
        return kept | {
            "HOME": str(self.user_home),
            "XDG_CACHE_HOME": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, *words: str, check: bool = True, **settings: object) -> subprocess.CompletedProcess[str]:
        """lime-edge, in a process of its own."""
        done: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]
            [sys.executable, "-m", "lime_edge", *words],
            env=self.environment(),
            capture_output=True,
            text=True,
            **settings,
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *words: str) -> subprocess.Popen[str]:
        """The same, not waited for."""
        return subprocess.Popen(
            [sys.executable, "-m", "lime_edge", *words],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's & ignores it
        )

    def find_helpers(self) -> list[int]:
        """Processes that lime-edge started on the device and that are still there."""
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if str(self.root).encode() in file.read_bytes() and file.parent.name != str(os.getpid()):
                    found.append(int(file.parent.name))
        return found

    def write_client(self, known: str | None = None, extra: str = "") -> None:
        """The client's ~/.ssh: config and known_hosts. known: a host key; None: the server's own."""
        ssh = self.user_home / ".ssh"
        key = (self.folder / "host_key.pub").read_text() if known is None else known
        entry = f"[127.0.0.1]:{self.wire.port} {' '.join(key.split()[:2])}\n" if key else ""
        (ssh / "known_hosts").write_text(entry)
        lines = f"Host desk-device\n    HostName 127.0.0.1\n    Port {self.wire.port}\n"
        (ssh / "config").write_text(lines + extra)


def find_children(parent: int) -> list[int]:
    """Children of a process, and theirs."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            child = int(status.parent.name)
            found += [child, *find_children(child)]
    return found


def make_key(file: Path, comment: str) -> str:
    """A new key pair; its public half."""
    file.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", *FAST, "-C", comment, "-f", str(file)], check=True)
    return file.with_suffix(".pub").read_text().strip()


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(folder: Path, cache: Path, command: str | None = None) -> Iterator[Sshd]:
    """A server until the block ends.

    Args:
        cache: the client's caches: what one test built, others take.
        command: runs in place of what is asked for, which is in $SSH_ORIGINAL_COMMAND; None: a shell with $HOME set.
    """
    assert SSHD, "openssh-server is missing: apt-get install openssh-server"
    port = find_port()
    server = Sshd(Wire(port), folder, cache)
    for path in (server.home, server.user_home / ".ssh"):
        path.mkdir(parents=True, mode=0o700)
    make_key(folder / "host_key", "host")
    own = make_key(server.user_home / ".ssh" / "id_ed25519", "user")
    (folder / "authorized_keys").write_text(f"{own}\n")
    server.write_client()
    if command is None:
        home = shlex.quote(str(server.home))
        command = f'HOME={home}; export HOME; cd; exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
    (folder / "sshd_config").write_text(
        f"""Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
MaxStartups 100
PasswordAuthentication no
KbdInteractiveAuthentication no
ForceCommand {command}
"""
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where privileges are given up; of the package's service
    log = (folder / "sshd.log").open("wb")
    server.processes.append(
        subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stdout=log, stderr=log)
    )
    try:
        _wait_for(server, port)
        yield server
    finally:
        children = find_children(server.processes[0].pid)
        for child in [server.processes[0].pid, *children]:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        server.processes[0].wait()
        server.wire.close()
        log.close()


def _wait_for(server: Sshd, port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if server.processes[0].poll() is not None:
                break
            time.sleep(0.05)
    raise AssertionError(f"sshd did not start: {(server.folder / 'sshd.log').read_text()}")
