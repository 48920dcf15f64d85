"""What devices are asked to do, and what came of it on each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lime_edge.bench.remote.addresses import Device
from lime_edge.bench.remote.package import Package
from lime_edge.bench.remote.steps import Load
from lime_edge.errors import LimeEdgeError


@dataclass(frozen=True)
class Task:
    """What every device does.

    words: of lime-edge; a Load among them is a bundle that is brought, and stands for its folder there. text: standard
    input. targets: whose engines are needed; none: the bundle's first. as_is: what lies there is not mended first.
    clean: delete the device's folder afterwards. extras: of the Android app's benchmark; None: an app cannot do this.
    """

    words: tuple[str | Load, ...]
    text: str | None = None
    targets: tuple[str, ...] = ()
    wheels: Path | None = None
    package: Package = field(default_factory=lambda: Package(""))
    as_is: bool = False
    clean: bool = False
    extras: dict[str, str] | None = None

    @property
    def loads(self) -> list[Load]:
        """The bundles."""
        return [word for word in self.words if isinstance(word, Load)]

    @property
    def engines(self) -> str:
        """What to install with lime_edge: "onnx", "executorch,onnx"."""
        first = [next(iter(load.bundle.manifest.targets)) for load in self.loads]
        return ",".join(sorted(set(self.targets or first)))  # an extra has its target's name


@dataclass(frozen=True)
class Outcome:
    """What came of a task on a device.

    code: lime-edge's exit code; out: what it printed. error: why it did not end well, where it did not. files,
    commands: bytes that were sent. freed: by --clean; None: not asked.
    """

    device: Device
    code: int = 0
    out: bytes = b""
    error: LimeEdgeError | None = None
    warnings: tuple[str, ...] = ()
    files: int = 0
    commands: int = 0
    freed: int | None = None

    def describe(self) -> dict[str, Any]:
        """As the documents have it (docs/bench-schema.md)."""
        return {
            "name": self.device.name,
            "address": self.device.address,
            "sent_bytes": self.files,
            "warnings": list(self.warnings),
        }
