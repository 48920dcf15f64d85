"""A device over ssh: the user's own configuration, keys, agent and known_hosts; keys only, no passwords."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lime_edge.bench.remote.addresses import Device
from lime_edge.errors import EXIT_MISSING, LimeEdgeError, need

PATIENCE = 20.0  # seconds to connect
BEAT = 15.0  # seconds between signs of life, in both directions
PIECE = 1 << 16
Body = Callable[[], AsyncIterator[bytes]]


@dataclass(frozen=True)
class Answer:
    """What a command on the device printed, and its exit code."""

    code: int
    out: bytes
    err: str


@dataclass
class Traffic:
    """Bytes that went to the device: contents of files, and commands with their requests."""

    files: int = 0
    commands: int = 0


class Connection:
    """One device that answers. `step` says what is being done, for the message when it is cut."""

    def __init__(self, device: Device, raw: Any):
        self.device = device
        self.traffic = Traffic()
        self.step = "connecting"
        self._raw = raw

    async def run(
        self,
        command: list[str],
        text: bytes = b"",
        body: Body | None = None,
        on_output: Callable[[bytes], None] | None = None,
        ends: bool = False,
    ) -> Answer:
        """Run a command; its input is `text`, then `body`, and stays open until it ends.

        Args:
            on_output: is called with what it prints, as it prints it. ends: close the input after `body`.
        Raises:
            LimeEdgeError: the connection was lost.
        """
        import asyncssh

        line = " ".join(map(shlex.quote, command))
        self.traffic.commands += len(line) + len(text)
        try:
            async with self._raw.create_process(line, encoding=None, request_pty=False) as process:
                feeding = asyncio.create_task(self._feed(process, text, body, ends))
                reading = asyncio.gather(_collect(process.stdout, on_output), _collect(process.stderr, None))
                waited: set[asyncio.Future[Any]] = {feeding, reading}
                try:
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                    if not reading.done() and isinstance(fault := feeding.exception(), LimeEdgeError):
                        raise fault  # what was to be sent is not what it should be
                    out, err = await reading
                    await process.wait_closed()
                finally:
                    for one in waited:
                        one.cancel()
                    await asyncio.gather(feeding, reading, return_exceptions=True)
                code = process.exit_status
        except (OSError, asyncssh.Error) as error:
            raise self.explain_loss(str(error)) from None
        if code is None:
            raise self.explain_loss("the connection closed")
        return Answer(code, out, err.decode(errors="replace"))

    async def _feed(self, process: Any, text: bytes, body: Body | None, ends: bool) -> None:
        """Write the input; then a sign of life now and then."""
        process.stdin.write(text)
        if body is not None:
            async for piece in body():
                process.stdin.write(piece)
                await process.stdin.drain()
                self.traffic.files += len(piece)
        if ends:
            process.stdin.write_eof()
            return
        while True:
            await asyncio.sleep(BEAT)
            process.stdin.write(b"\n")
            await process.stdin.drain()

    def explain_loss(self, why: str) -> LimeEdgeError:
        """The error of a connection that ended before its answer."""
        return LimeEdgeError(
            f"{self.device.name}: the connection was lost while {self.step}: {why or 'no answer'}",
            "what was begun there is undone: run it again, what arrived whole is not sent again",
            EXIT_MISSING,
        )


async def _collect(stream: Any, tell: Callable[[bytes], None] | None) -> bytes:
    pieces = []
    while piece := await stream.read(PIECE):
        pieces.append(piece)
        if tell:
            tell(piece)
    return b"".join(pieces)


def encode_request(request: dict[str, Any]) -> bytes:
    """A request's line."""
    return json.dumps(request).encode() + b"\n"


@asynccontextmanager
async def connect(device: Device) -> AsyncIterator[Connection]:
    """Connect, the host's key checked.

    Raises:
        LimeEdgeError: asyncssh is missing; no answer; the host's key is unknown or another; no key of ours is taken.
    """
    try:
        import asyncssh
    except ImportError:
        raise need("asyncssh", "remote") from None
    checks = _HostKey(device)
    try:
        options = await asyncssh.SSHClientConnectionOptions.construct(
            config=(),  # the user's own; left out, none is read
            host=device.host,
            port=device.port or (),
            username=device.user or (),
            client_factory=lambda: checks.watch(asyncssh),
            password_auth=False,
            kbdint_auth=False,
            connect_timeout=PATIENCE,
            login_timeout=PATIENCE,
            keepalive_interval=BEAT,
            keepalive_count_max=4,
        )
        checks.files = options.known_hosts
        if options.known_hosts is None:
            raise LimeEdgeError(
                f"{device.name}: the ssh configuration turns the check of host keys off (UserKnownHostsFile none)",
                "lime-edge sends a model and runs it there: take that line out for this host",
            )
        raw = await asyncssh.connect(device.host, device.port or (), options=options)
    except (OSError, TimeoutError, ValueError, asyncssh.Error) as error:
        raise _explain(device, error, checks) from None
    async with raw:
        connection = Connection(device, raw)
        try:
            yield connection
        except BaseException:
            raw.abort()  # no polite goodbye: the helper sees its input close at once
            raise


class _HostKey:
    """What the host showed as its key, and what known_hosts says of it."""

    def __init__(self, device: Device):
        self.device = device
        self.files: Any = ()  # as asyncssh has them: nothing stands for ~/.ssh/known_hosts
        self.shown: Any = None
        self.known = False

    def watch(self, asyncssh: Any) -> Any:
        """An SSHClient that notes a key which is not trusted, and does not trust it."""
        checks = self

        class Client(asyncssh.SSHClient):
            def validate_host_public_key(self, host: str, addr: str, port: int, key: Any) -> bool:
                checks.shown = key
                with contextlib.suppress(OSError, ValueError):
                    files = checks.files or str(Path("~/.ssh/known_hosts").expanduser())
                    checks.known = bool(asyncssh.match_known_hosts(files, host, addr, port)[0])
                return False

        return Client()

    def explain(self) -> tuple[str, str]:
        """Problem and hint."""
        device = self.device
        where = f"-p {device.port} {device.host}" if device.port else device.host
        mark = f" ({self.shown.get_algorithm()} {self.shown.get_fingerprint()})" if self.shown else ""
        if self.known:
            entry = f"[{device.host}]:{device.port}" if device.port and device.port != 22 else device.host
            return (
                f"{device.name}: the host's key is another one than known_hosts has{mark}: somebody may be in between",
                f"if the device was set up anew: ssh-keygen -R '{entry}', then ssh {where} once and compare the key",
            )
        return (
            f"{device.name}: the host's key is not known{mark}",
            f"run ssh {where} once, compare the key with the device's own (ssh-keygen -lf), and accept it",
        )


def _explain(device: Device, error: Exception, checks: _HostKey) -> LimeEdgeError:
    import asyncssh

    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        problem, hint = checks.explain()
    elif isinstance(error, asyncssh.PermissionDenied):
        who = f"{device.user}@{device.host}" if device.user else device.host
        problem = f"{device.name}: {error.reason}: no key of yours is accepted there"
        hint = f"ssh-copy-id {who}; a key with a passphrase: ssh-add first. Passwords are not asked for"
    elif isinstance(error, TimeoutError | asyncio.TimeoutError):
        problem, hint = (
            f"{device.name}: no answer from {device.host} within {PATIENCE:.0f} s",
            "is it on and reachable?",
        )
    else:
        problem = f"{device.name}: cannot connect to {device.host}: {error}"
        hint = "is it on, is sshd running there, is the address right? See what ssh itself says"
    return LimeEdgeError(problem, hint, EXIT_MISSING)
