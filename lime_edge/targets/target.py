"""What a target is to the rest of lime_edge: an entry that names its folders and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from lime_edge.targets.facts import TargetFacts

METADATA = "option"


@dataclass(frozen=True)
class Option:
    """One field of a target's options, as people meet it; the command line's option has the field's name.

    about: what it is, for --help. words: what it may be, where that is a list. least: of a number.
    read: its value from the text on a command line; None where its type says how.
    of_device: the device says the default, in its attribute of this name.
    """

    name: str
    about: str
    default: Any
    words: tuple[str, ...] = ()
    least: int | None = None
    read: Callable[[str], Any] | None = None
    of_device: bool = False


def option(default: Any, about: str, **facts: Any) -> Any:
    """A field of an options class. facts: of `Option`."""
    return field(default=default, metadata={METADATA: {"about": about, **facts}})


@dataclass(frozen=True)
class Target:
    """One target.

    title: as people write it. folder: its name in lime_edge.exporters and in lime_edge.runtimes, each with a module
    `entry`. options: a dataclass that its exporter takes, every field made by `option`. facts: what lime.json says of
    an artifact; its tag is the target's name. panel: of its options in --help. companions: what else may be written
    beside its artifact, for other engines: name, and for whom. packages: that its engine is installed with.
    """

    title: str
    folder: str
    options: type[Any]
    facts: type[TargetFacts]
    panel: str = ""
    companions: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its key in manifests, its folder in bundles, and what stands behind `target`."""
        return str(self.facts.__struct_config__.tag)

    def list_options(self) -> list[Option]:
        """Its options, in order."""
        return [_read_field(one) for one in fields(self.options)]


def _read_field(one: Field[Any]) -> Option:
    assert one.default is not MISSING and METADATA in one.metadata, f"{one.name}: make it with option()"
    return Option(one.name, default=one.default, **one.metadata[METADATA])


def list_by_name(targets: Mapping[str, Target]) -> dict[str, list[Target]]:
    """Which targets read an option, by its name."""
    found: dict[str, list[Target]] = {}
    for target in targets.values():
        for one in target.list_options():
            found.setdefault(one.name, []).append(target)
    return found
