"""What a server is told when it starts: where it listens, who may ask, and how much at once."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from lime_edge.errors import Faults

LEAST = {"port": 0, "most_body": 1, "most_waiting": 0, "rows": 1, "prefixes": 0, "grace": 0}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeOptions:
    """How to serve.

    host, port: where to listen; port 0 takes a free one. keys: any of them lets a client in, none lets everybody.
    hosts: names besides the machine's own under which a server on the loopback address is asked (a proxy's).
    most_body: bytes of a request. most_tokens: of one answer, None for what a row holds. most_waiting: answers that may
    wait for a row. rows: answers that run at once. memory: bytes of their caches, None for what they take.
    prefixes: bytes of beginnings that are kept for later requests, 0 for none.
    allow_install: take experts by POST. keep_installed: and write them into the bundle. grace: seconds that running
    answers have to end after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = ()
    most_body: int = 1 << 20
    most_tokens: int | None = None
    most_waiting: int = 64
    rows: int = 16
    memory: int | None = None
    prefixes: int = 64 << 20
    allow_install: bool = False
    keep_installed: bool = False
    grace: float = 30.0

    def __post_init__(self) -> None:
        with Faults("serve", "lime-edge serve --help explains each") as faults:
            for name, least in LEAST.items():
                if getattr(self, name) < least:
                    faults.add(f"`{name}`", f"at least {least}", getattr(self, name))
            if self.port > 65535:
                faults.add("`port`", "at most 65535", self.port)
            if self.most_tokens is not None and self.most_tokens < 1:
                faults.add("`most_tokens`", "at least 1", self.most_tokens)
            if not all(key and key.isascii() and key.isprintable() and " " not in key for key in self.keys):
                faults.add("an API key", "printable ASCII letters without spaces", "something else (not shown)")
            if self.keep_installed and not self.allow_install:
                faults.add("`keep_installed` writes what `allow_install` takes: it needs that too")
            if self.allow_install and not self.keys and not self.is_local:
                faults.add(
                    f"`allow_install` on {self.host} lets everybody who reaches it change the model: it needs a key"
                )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine."""
    if host.lower() in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
