"""The kinds of model a bundle may hold. A session's kind is found here, once; nothing else asks the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.switching import ExpertSwitch
from lime_edge.session.vision import VisionSession

SessionT = TypeVar("SessionT", bound=ExpertSwitch)


@dataclass(frozen=True)
class Kind(Generic[SessionT]):
    """One kind of model.

    name: in the manifest, and of the file in every target's folder that runs or exports it. session: what opens it.
    noun, lacks, usage: for the user who asked for another kind.
    """

    name: str
    session: type[SessionT]
    noun: str
    lacks: str
    usage: str

    def open(self, *made_of: Any) -> SessionT:
        """A session of a bundle, its engine, its bank and the target's name."""
        return self.session(*made_of)


DECODER = Kind("decoder", Session, "a language model", "it takes no named inputs", "generate(prompt)")
ENCODER = Kind("encoder", EncoderSession, "an encoder", "it answers no prompts", "run(**inputs)")
VISION = Kind(
    "vision-language",
    VisionSession,
    "a vision-language model",
    "it takes no named inputs",
    "generate(prompt, images=[...])",
)
KINDS: dict[str, Kind[Any]] = {kind.name: kind for kind in (DECODER, ENCODER, VISION)}


def find_kind(bundle: Bundle) -> Kind[Any]:
    """What a bundle holds.

    Raises:
        LimeEdgeError: a kind that this version does not know.
    """
    name = bundle.manifest.kind
    if name not in KINDS:
        raise LimeEdgeError(
            f"{bundle.path}: kind of model: expected {' or '.join(KINDS)}, found {name!r}",
            "upgrade lime-edge on this device",
        )
    return KINDS[name]


def require_kind(bundle: Bundle, kind: Kind[Any]) -> None:
    """Refuse a bundle of another kind.

    Raises:
        LimeEdgeError: what it holds instead, and how that is opened.
    """
    found = find_kind(bundle)
    if not issubclass(found.session, kind.session):  # what sees reads text alone too
        raise LimeEdgeError(
            f"{bundle.path} holds {found.noun}: {found.lacks}", f"call lime_edge.open(BUNDLE).{found.usage}"
        )
