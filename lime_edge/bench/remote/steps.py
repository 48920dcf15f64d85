"""What is done on a device, step by step: its environment, its bundles, one command; every step whole or undone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lime_edge
from lime_edge.bench.remote.pack import pack_helper
from lime_edge.bench.remote.package import Package
from lime_edge.bench.remote.probe import ENVIRONMENT_SIZE, Facts
from lime_edge.bench.remote.ssh import Answer, Body, Connection, encode_request
from lime_edge.bundle.bundle import Bundle, read_manifest
from lime_edge.bundle.manifest import MANIFEST
from lime_edge.errors import EXIT_STORAGE, LimeEdgeError

PIECE = 1 << 18
Tell = Callable[[str, int, int], None]
INSTALL = """
new="$2.$$.partial"
mkdir -p "$1" && cat > "$new" && [ "$(wc -c < "$new")" -eq "$3" ] || { rm -f "$new"; exit 1; }
rm -f "$1"/helper-*.pyz; mv "$new" "$2"
"""


@dataclass(frozen=True)
class Load:
    """A bundle as it is brought: its manifest's bytes, and sha256 and size of every file."""

    bundle: Bundle
    manifest: bytes

    @classmethod
    def read(cls, path: Path) -> Load:
        """Open a bundle here.

        Raises:
            LimeEdgeError: what opening raises.
        """
        return cls(Bundle.open(path), read_manifest(path))

    @cached_property
    def files(self) -> dict[str, str]:
        """path -> sha256."""
        return {name: entry.sha256 for name, entry in self.bundle.manifest.files.items()}

    def describe_manifest(self) -> str:
        """sha256 of lime.json."""
        return hashlib.sha256(self.manifest).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Its name there: that of the folder here, and the first digits of its manifest's sha256."""
        name = "".join(c if c.isalnum() and c.isascii() or c in "._-" else "_" for c in self.bundle.path.resolve().name)
        return {"id": self.describe_manifest()[:16], "name": name.lstrip(".") or "bundle"}

    def place(self, root: str) -> str:
        """Its folder there."""
        own = self.describe()
        return f"{root}/bundles/{own['id']}/{own['name']}"


@dataclass(frozen=True)
class Installation:
    """What the environment is made of. package: lime_edge; wheels: carried, instead of an index; extras: "onnx"."""

    package: Package
    wheels: Path | None
    extras: str

    def list_carried(self) -> list[Path]:
        """Files of --wheels but lime_edge's own."""
        if self.wheels is None:
            return []
        found = [path for path in sorted(self.wheels.iterdir()) if path.name.endswith((".whl", ".tar.gz"))]
        return [path for path in found if not path.name.startswith("lime_edge-")]


@dataclass
class Site:
    """A device that was looked at. there: what the helper says; warnings: for people; mended: files brought again."""

    connection: Connection
    facts: Facts
    python: str
    tell: Tell
    there: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)

    async def ask(self, verb: str, request: dict[str, Any], body: Body | None = None) -> dict[str, Any]:
        """One verb of the helper.

        Raises:
            LimeEdgeError: what it refuses; it did not answer.
        """
        answer = await self.connection.run(self._command(verb), encode_request(request), body)
        return self._read(answer)

    def _command(self, verb: str) -> list[str]:
        return [self.python, self._helper, verb, self.facts.root]

    @property
    def _helper(self) -> str:
        return f"{self.facts.root}/{pack_helper()[0]}"

    def _read(self, answer: Answer) -> dict[str, Any]:
        try:
            found = json.loads(answer.out.splitlines()[-1])
        except (ValueError, IndexError):
            said = "\n".join(f"    {line}" for line in answer.err.strip().splitlines()[-4:])
            raise LimeEdgeError(
                f"{self.name}: it ended while {self.connection.step} (exit code {answer.code})\n{said}".rstrip(),
                "what was begun there is undone: run it again",
                answer.code if answer.code == EXIT_STORAGE else 1,
            ) from None
        if "problem" in found:
            raise LimeEdgeError(f"{self.name}: {found['problem']}", found["hint"], found["code"])
        return dict(found)

    @property
    def name(self) -> str:
        """The device's."""
        return self.connection.device.name

    async def bring_helper(self) -> None:
        """Put the helper there, unless this version of it is there."""
        if self._helper in self.facts.helpers:
            return
        self.connection.step = "bringing the helper"
        source = pack_helper()[1]
        command = ["/bin/sh", "-c", INSTALL, "sh", self.facts.root, self._helper, str(len(source))]
        answer = await self.connection.run(command, body=lambda: _pieces(source), ends=True)
        if answer.code:
            said = next(iter(answer.err.strip().splitlines()), "")
            hint = "free some space there, or give the hosts file another folder"
            raise LimeEdgeError(f"{self.name}: {self.facts.root} cannot be written: {said}", hint, EXIT_STORAGE)

    async def look(self, loads: list[Load], key: str = "", as_is: bool = False) -> None:
        """Ask what is there already."""
        bundles = [load.describe() | {"as_is": as_is} for load in loads]
        self.there = await self.ask("look", {"key": key, "bundles": bundles})

    async def prepare(self, installation: Installation, loads: list[Load], as_is: bool) -> str:
        """Environment and bundles, as far as they are not there; the environment's key.

        Args:
            as_is: a bundle that lies there is taken as it is, damaged or not.
        """
        await self.bring_helper()
        self.connection.step = "looking at the device"
        await self.look([])
        own = installation.package.choose(self.there)
        carried = installation.list_carried()
        key = name_environment(installation, own, carried, self)
        await self.look(loads, key, as_is)
        self._check_disk(loads)
        if not self.there["environment"]:
            await self._make_environment(installation, key, own, carried)
        for load, here in zip(loads, self.there["bundles"], strict=True):
            if not here:
                await self._bring(load)
        return key

    def _check_disk(self, loads: list[Load]) -> None:
        """Refuse before anything is sent what the disk cannot hold; a bundle that shares files may need less."""
        needed = 0 if self.there["environment"] or self.connection.device.site_packages else ENVIRONMENT_SIZE
        free = int(self.there["free"])
        if needed > free:
            problem = (
                f"{self.name}: disk: expected {needed / 1e6:.0f} MB free for the environment, found {free / 1e6:.0f}"
            )
            hint = "free some space there, or give the hosts file another folder: a disk with room"
            raise LimeEdgeError(problem, hint, EXIT_STORAGE)
        size = max((load.bundle.total_bytes for load in loads), default=0)
        if self.facts.memory is not None and self.facts.memory < size:
            self.warnings.append(
                f"{self.facts.memory / 1e6:.0f} MB of memory are free, the bundle has {size / 1e6:.0f}"
            )

    async def _make_environment(
        self, installation: Installation, key: str, own: Path | None, carried: list[Path]
    ) -> None:
        files = [*([own] if own else []), *carried]
        if own and own.name.endswith(".tar.gz") and not self.facts.compiler:
            self.warnings.append("no C compiler there: lime_edge is built without its operators (apt install gcc)")
        await self._send([(path, _hash(path), path.stat().st_size) for path in files], "lime_edge")
        self.connection.step = "making the environment"
        self.tell("environment", 0, 1)
        await self.ask(
            "environment",
            {
                "key": key,
                "files": {path.name: _hash(path) for path in files},
                "version": lime_edge.__version__,
                "extras": installation.extras,
                "index": installation.wheels is None,
                "site_packages": self.connection.device.site_packages,
            },
        )
        self.tell("environment", 1, 1)

    async def _bring(self, load: Load) -> None:
        """Send what the device has in no bundle, and put the bundle together there."""
        self.connection.step = f"bringing {load.bundle.path}"
        request = load.describe() | {"files": load.files}
        missing = set((await self.ask("compare", request))["missing"])
        wanted = {entry.sha256: (name, entry.size) for name, entry in load.bundle.manifest.files.items()}
        files = [(load.bundle.path / wanted[d][0], d, wanted[d][1]) for d in sorted(missing)]
        await self._send(files, "bundle")
        answer = await self.ask("assemble", request | {"manifest": load.manifest.decode()})
        self.mended += answer["mended"]

    async def _send(self, files: list[tuple[Path, str, int]], what: str) -> None:
        """Send files by their contents: (path, sha256, size) of each."""
        if not files:
            return
        total = sum(size for *_, size in files)
        done = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal done
            for path, digest, size in files:
                yield encode_request({"sha256": digest, "size": size})
                async for piece in _read_file(path, digest, size):
                    yield piece
                    done += len(piece)
                    self.tell(f"{what}, kB", done // 1000, max(1, total // 1000))

        self.tell(f"{what}, kB", 0, max(1, total // 1000))
        await self.ask("receive", {"count": len(files), "bytes": total}, body)

    async def execute(
        self, key: str, words: list[str], text: str | None, on_output: Callable[[bytes], None] | None = None
    ) -> Answer:
        """Run lime-edge there."""
        self.connection.step = f"running lime-edge {words[0]}"
        request = encode_request({"key": key, "words": words, "text": text})
        self.tell(f"lime-edge {words[0]}", 0, 1)
        answer = await self.connection.run(self._command("execute"), request, on_output=on_output)
        self.tell(f"lime-edge {words[0]}", 1, 1)
        return answer

    async def clean(self) -> int:
        """Delete the folder there; bytes that were freed."""
        self.connection.step = "cleaning up"
        await self.bring_helper()
        return int((await self.ask("clean", {}))["bytes"])


def name_environment(installation: Installation, own: Path | None, carried: list[Path], site: Site) -> str:
    """The name of an environment: equal for equal packages, interpreter and options."""
    parts = [installation.package.key, own.name if own else lime_edge.__version__, installation.extras, site.python]
    parts += [str(site.there["version"]), str(site.connection.device.site_packages)]
    parts += [f"{path.name} {path.stat().st_size}" for path in carried]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _read_file(path: Path, digest: str, size: int) -> AsyncIterator[bytes]:
    """A file's bytes, which must be those that were promised."""
    found, count = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                found.update(piece)
                count += len(piece)
                if count <= size:
                    yield piece
    except OSError as error:
        raise LimeEdgeError(f"{path}: cannot be read: {error.strerror}", "copy or export the bundle again") from None
    if count != size or found.hexdigest() != digest:
        hint = f"the bundle is damaged here, or was changed meanwhile: lime-edge verify {path.parent}"
        raise LimeEdgeError(f"{path}: it is not what {MANIFEST} says", hint)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
