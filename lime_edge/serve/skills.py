"""Which skill a request means: by the model's name ("NAME:plural") or by the field `lime`; and the list of models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from lime_edge.bundle.experts import ALWAYS_ON, NONE, ROUTED, Selection, check_weights, parse_selection
from lime_edge.errors import LimeEdgeError, suggest
from lime_edge.serve.refusals import Refusal, refuse, refuse_model
from lime_edge.session.switching import ExpertSwitch

BLEND = "blend"  # what all blends are counted under


class Lime(msgspec.Struct, forbid_unknown_fields=True):
    """The field `lime` of a request. expert: a name, "none" or "routed". blend: weights that sum to 1."""

    expert: str | None = None
    blend: dict[str, float] | None = None


@dataclass(frozen=True)
class Shelf:
    """The skills that one served bundle offers at this moment.

    name: of the model. experts: that are installed. default: what the bare name means. can_route: whether the bundle
    has a routed graph; can_be_off: whether "none" means something. created: when the bundle was written, in seconds
    since 1970.
    """

    name: str
    experts: tuple[str, ...]
    default: Selection
    can_route: bool
    can_be_off: bool
    created: int

    @property
    def selections(self) -> tuple[str, ...]:
        """What may stand behind the colon."""
        return (*self.experts, *((NONE,) if self.can_be_off else ()), *((ROUTED,) if self.can_route else ()))

    def list_models(self) -> list[dict[str, Any]]:
        """The entries of /v1/models: the bundle, then one for each skill."""
        ids = [(self.name, name_skill(self.default)), *((f"{self.name}:{one}", one) for one in self.selections)]
        return [
            {"id": name, "object": "model", "created": self.created, "owned_by": "lime-edge", "lime": {"expert": skill}}
            for name, skill in ids
        ]


def describe_shelf(session: ExpertSwitch, name: str, default: Selection, created: int) -> Shelf:
    """What an opened session offers now."""
    adapter = session.bundle.manifest.adapter
    single = adapter.single is not None
    routed = bool(getattr(session.bundle.manifest.targets[session.target], ROUTED, None))
    off = not single and adapter.variant not in ALWAYS_ON
    return Shelf(name, session.experts, default, routed and not single, off, created)


def name_skill(selection: Selection) -> str:
    """One word for a selection: an expert's name, none, routed or blend."""
    return NONE if selection is None else selection if isinstance(selection, str) else BLEND


def find_shelf(model: str, shelves: Iterable[Shelf]) -> Shelf:
    """Whose model a name means.

    Raises:
        Refusal: 404.
    """
    known = {shelf.name: shelf for shelf in shelves}
    name = model.partition(":")[0]
    if name not in known:
        raise refuse_model(model, suggest(name, known))
    return known[name]


def choose_skill(model: str, given: Lime | str | None, shelf: Shelf) -> Selection:
    """The selection that a request means.

    Args:
        model: "NAME" or "NAME:SKILL". given: its field `lime`.
    Raises:
        Refusal: 404 for a skill that is not there; 400 for two at once, or a blend whose weights do not sum to 1.
    """
    skill = model.partition(":")[2]
    wanted = read_lime(given)
    if skill and wanted is not None:
        raise Refusal(400, "`model` names a skill and `lime` another: give one of them", param="lime")
    if skill:
        if skill not in shelf.selections:
            raise refuse_model(model, suggest(skill, shelf.selections))
        return None if skill == NONE else skill
    if wanted is None:
        return shelf.default
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name not in (shelf.selections if isinstance(wanted, str) else shelf.experts):
            hint = suggest(name, shelf.selections) or f"this model's skills are {', '.join(shelf.selections)}"
            raise Refusal(404, f"the skill {name!r} does not exist: {hint}", "model_not_found", "lime")
    return None if wanted == NONE else wanted


def read_lime(given: Lime | str | None) -> str | dict[str, float] | None:
    """What the field asks for: a skill's name, a blend, or None where it says nothing.

    Raises:
        Refusal: 400.
    """
    if given is None:
        return None
    try:
        if isinstance(given, str):
            asked = parse_selection(given)
            wanted = NONE if asked is None else asked if isinstance(asked, str) else dict(asked)
            return wanted if isinstance(wanted, str) else check_weights(wanted)
        if (given.expert is None) == (given.blend is None):
            raise Refusal(400, '`lime` holds either "expert" or "blend"', param="lime")
        return given.expert if given.blend is None else check_weights(given.blend)
    except LimeEdgeError as error:
        raise refuse(error, "lime") from None
