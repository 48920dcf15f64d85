"""Which devices: addresses as one types them, and the file that lists a fleet."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lime_edge.errors import Faults, LimeEdgeError, suggest

FOLDER = ".lime-edge"  # on the device, below the user's home
SSH, ADB = "ssh", "adb"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,63}")
HINT = "an address is ssh://[USER@]HOST[:PORT], adb, or adb:SERIAL; HOST may be a name of ~/.ssh/config"
OPTIONS = {"python": str, "site_packages": bool, "folder": str, "package": str}


@dataclass(frozen=True)
class Device:
    """A machine to measure on.

    name: in tables; address: as given. kind: "ssh" or "adb". host, user, port: of ssh; None: what the user's ssh
    configuration says. serial: of adb; None: the only one there. python: an interpreter on the device; None: the first
    one that is new enough. site_packages: take the packages this interpreter has, install lime_edge alone. folder: the
    one folder used there, below the home unless it begins with "/". package: the Android app.
    """

    name: str
    address: str
    kind: str
    host: str = ""
    user: str | None = None
    port: int | None = None
    serial: str | None = None
    python: str | None = None
    site_packages: bool = False
    folder: str = FOLDER
    package: str = "limeedge.example"


def parse_address(address: str, name: str | None = None) -> Device:
    """A device from its address.

    Raises:
        LimeEdgeError: it is no address, or it holds a password.
    """
    if address == ADB or address.startswith(f"{ADB}:"):
        serial = address[len(ADB) + 1 :] or None
        if address == f"{ADB}:" or (serial and not re.fullmatch(r"[\w.:\[\]-]{1,128}", serial)):
            raise LimeEdgeError(f"{address!r} is no address", HINT)
        return Device(name or address, address, ADB, serial=serial)
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise LimeEdgeError("the address of a device cannot be read", HINT) from None
    if parts.password is not None:
        raise LimeEdgeError(
            f"ssh://{parts.username or ''}@{host}: the address holds a password",
            "it would be seen by everyone on this machine: use a key (ssh-copy-id) and ssh-agent",
        )
    extra = parts.path.strip("/") or parts.query or parts.fragment
    if parts.scheme != SSH or not host or extra or host.startswith("-") or (parts.username or "").startswith("-"):
        raise LimeEdgeError(f"{address!r} is no address", HINT)
    typed = parts.netloc.rpartition("@")[2].rpartition(":")[0] if port is not None else parts.netloc.rpartition("@")[2]
    return Device(name or typed, address, SSH, typed.strip("[]"), parts.username, port)


def read_hosts(file: Path) -> list[Device]:
    """The devices of a hosts file: [[device]] tables with name, address and options.

    Raises:
        LimeEdgeError: unreadable, or with faults: all of them.
    """
    hint = 'a hosts file has tables: [[device]], name = "pi5", address = "ssh://pi@raspberrypi" (docs/remote.md)'
    try:
        facts = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LimeEdgeError(f"{file}: no such file", hint) from None
    except (OSError, ValueError) as error:
        raise LimeEdgeError(f"{file}: not readable TOML: {error}", hint) from None
    tables = facts.get("device")
    devices: list[Device] = []
    with Faults(str(file), hint) as faults:
        for key in set(facts) - {"device"}:
            faults.add(f"{key} is not known", "[[device]] tables", key)
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            faults.add("[[device]]", "one table or more", "none")
            return []
        for place, table in enumerate(tables, 1):
            device = _read_table(table, f"device {place}", faults)
            if device and device.name in {other.name for other in devices}:
                faults.add(f"device {place}: name", "each once", repr(device.name))
            elif device:
                devices.append(device)
    return devices


def _read_table(table: dict[str, Any], where: str, faults: Faults) -> Device | None:
    before = len(faults.lines)
    for key in sorted({"name", "address"} - set(table)):
        faults.add(f"{where}: {key} is missing")
    for key, value in table.items():
        wanted = OPTIONS.get(key, str if key in ("name", "address") else None)
        if wanted is None:
            known = suggest(key, ["name", "address", *OPTIONS])
            faults.add(f"{where}: {key} is not known{f' ({known})' if known else ''}")
        elif not isinstance(value, wanted) or value == "":
            faults.add(f"{where}: {key}", "true or false" if wanted is bool else "a text", repr(value))
    name = table.get("name")
    if isinstance(name, str) and not NAME.fullmatch(name):
        faults.add(f"{where}: name", "letters, digits, '.', '_', '-' and spaces", repr(name))
    if len(faults.lines) > before:
        return None
    try:
        device = parse_address(table["address"], table["name"])
    except LimeEdgeError as error:
        faults.add(f"{where}: address: {error.problem}")
        return None
    return replace(device, **{key: value for key, value in table.items() if key in OPTIONS})


def gather_devices(
    addresses: list[str], hosts: Path | None, python: str | None = None, site_packages: bool = False
) -> list[Device]:
    """The devices of a command line; its --python and --site-packages hold for those whose file says nothing else.

    Raises:
        LimeEdgeError: a bad address or file, or a device named twice.
    """
    devices = [parse_address(address) for address in addresses] + (read_hosts(hosts) if hosts else [])
    names = [device.name for device in devices]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LimeEdgeError(f"{', '.join(twice)}: each device once", "give them other names in a hosts file: `hosts`")
    return [
        replace(device, python=device.python or python, site_packages=device.site_packages or site_packages)
        for device in devices
    ]
