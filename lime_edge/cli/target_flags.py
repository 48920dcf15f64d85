"""The options that targets add to `lime-edge export`: made of the targets' entries, so that none is named here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from lime_edge.cli.options import complete_from
from lime_edge.errors import LimeEdgeError
from lime_edge.targets.entries import TARGETS
from lime_edge.targets.target import Option, Target, list_by_name

Told = dict[str, Any]  # by option: what the line says, its default where it says nothing


def add_target_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each of the targets' in the place of its parameter `told`, which gets them all."""
    signature = inspect.signature(command, eval_str=True)
    flags = [_make_parameter(name, readers) for name, readers in list_by_name(TARGETS).items()]

    @functools.wraps(command)
    def read(**given: Any) -> None:
        told = {flag.name: given.pop(flag.name) for flag in flags}
        command(**given, told=told)

    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += flags if parameter.name == "told" else [parameter]
    del read.__wrapped__
    read.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    read.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return read


def _make_parameter(name: str, readers: list[Target]) -> inspect.Parameter:
    facts = find_option(name, readers[0])
    about = f"{', '.join(target.title for target in readers)}: {facts.about}."
    kind: Any = str if facts.read is not None else type(facts.default)
    shown = ",".join(map(str, facts.default)) if isinstance(facts.default, tuple) else facts.default
    settings: dict[str, Any] = {"help": about, "min": facts.least, "rich_help_panel": readers[0].panel or None}
    if facts.words:
        settings["autocompletion"] = complete_from(*facts.words)
    wanted: Any = kind | None if facts.of_device else kind
    annotation: Any = Annotated[wanted, typer.Option(**settings)]
    default = None if facts.of_device else shown
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def find_option(name: str, target: Target) -> Option:
    """A target's option by its name."""
    return next(one for one in target.list_options() if one.name == name)


def read_told(told: Mapping[str, Any], targets: list[str], device: object) -> dict[str, Any]:
    """Every wanted target's options, from what the line says.

    Args:
        device: has the defaults that are a device's.
    Raises:
        LimeEdgeError: a value that nothing can be made of, or an option that no wanted target reads.
    """
    refuse_idle_options(told, targets)
    found = {}
    for target in (TARGETS[name] for name in targets if name in TARGETS):
        values = {one.name: _read(one, told[one.name], device) for one in target.list_options()}
        found[target.name] = target.options(**values)
    return found


def _read(one: Option, given: Any, device: object) -> Any:
    if given is None:  # nobody said it
        return getattr(device, one.name) if one.of_device else one.default
    return one.read(given) if one.read is not None else given


def refuse_idle_options(told: Mapping[str, Any], targets: list[str]) -> None:
    """An option that no wanted target reads was meant for another one.

    Raises:
        LimeEdgeError: naming the target to add.
    """
    for name, readers in list_by_name(TARGETS).items():
        facts = find_option(name, readers[0])
        value = facts.read(told[name]) if facts.read is not None else told[name]
        changed = value is not None if facts.of_device else value != facts.default
        if changed and not {target.name for target in readers} & set(targets):
            adds = " or ".join(f"--target {target.name}" for target in readers)
            raise LimeEdgeError(
                f"`{name}`: only {adds} reads it, found --target {', '.join(targets)}",
                f"add {adds}, or leave the option out",
            )
