"""An expert that comes over the network: the checks of `lime-edge experts add`, then into the running session."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.change import add_experts, check_experts
from lime_edge.bundle.experts import Expert
from lime_edge.errors import LimeEdgeError
from lime_edge.serve.refusals import Refusal
from lime_edge.session.decoder import Session


def install_expert(session: Session, expert: Expert, keep: bool) -> tuple[str, ...]:
    """Add an expert to a session, and where `keep` to its bundle; on the session's thread.

    Returns:
        The names of all that are installed now.
    Raises:
        Refusal: 409, the name is taken: nobody replaces a skill that others use.
        LimeEdgeError: what `experts add` refuses; nothing was changed.
    """
    taken = {name.lower() for name in session.experts}
    if expert.name.lower() in taken:
        raise Refusal(409, f"an expert {expert.name!r} exists already: pass ?name=OTHER", "name_taken", "name")
    check_experts(Bundle.open(session.bundle.path) if keep else session.bundle, [expert])
    with tempfile.TemporaryDirectory(prefix="lime-edge.") as folder:
        file = Path(folder) / "expert.safetensors"
        file.write_bytes(expert.to_bytes())
        session.install(file, expert.name)
    if keep:
        try:
            add_experts(session.bundle.path, [expert])
        except LimeEdgeError:
            session.remove(expert.name)
            raise
    return session.experts
