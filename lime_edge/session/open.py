"""From a bundle and a target's name to a session: the one place that imports engines, and does so by name."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.engines import SessionOptions
from lime_edge.session.health import Health
from lime_edge.session.kinds import DECODER, ENCODER, Kind, SessionT, find_kind, require_kind
from lime_edge.session.switching import ExpertSwitch
from lime_edge.targets.registry import check_target

RUNTIMES = "lime_edge.runtimes"


def open_any(bundle: Bundle, target: str | None = None, options: SessionOptions | None = None) -> ExpertSwitch:
    """Load a bundle's artifact for one target, whatever kind of model it holds.

    Args:
        target: None takes the bundle's first.
    Raises:
        LimeEdgeError: the bundle was not exported for it, or its engine is missing.
    """
    return _open(find_kind(bundle), bundle, target, options)


def open_decoder(bundle: Bundle, target: str | None = None, options: SessionOptions | None = None) -> Session:
    """Load a language model's artifact for one target.

    Args, Raises: as `open_any`; LimeEdgeError too where the bundle holds another kind of model.
    """
    return _open(DECODER, bundle, target, options)


def open_encoder(bundle: Bundle, target: str | None = None, options: SessionOptions | None = None) -> EncoderSession:
    """Load the artifact of an encoder or a vision model for one target.

    Args, Raises: as `open_any`; LimeEdgeError too where the bundle holds another kind of model.
    """
    return _open(ENCODER, bundle, target, options)


def _open(kind: Kind[SessionT], bundle: Bundle, target: str | None, options: SessionOptions | None) -> SessionT:
    require_kind(bundle, kind)
    target, runtime = load_runtime(bundle, target)
    bundle.check_target(target)  # an engine sees no file that is not as it was written
    engine = runtime.open_engine(bundle, options or SessionOptions())
    return kind.open(bundle, engine, bundle.open_bank(engine.subtract), target)


def load_runtime(bundle: Bundle, target: str | None) -> tuple[str, ModuleType]:
    """The target that is meant and the module that runs this bundle's kind of model there.

    Args:
        target: None takes the bundle's first.
    Raises:
        LimeEdgeError: no such target, the bundle was not exported for it, or its packages are missing.
    """
    present = tuple(bundle.manifest.targets)
    target = target or present[0]
    folder = check_target(target)
    if target not in present:
        raise LimeEdgeError(f"{bundle.path}: holds no {target} artifact", f"it holds {', '.join(present)}")
    return target, importlib.import_module(f"{RUNTIMES}.{folder}.{find_kind(bundle).name}")


def explain_operators(target: str) -> str | None:
    """Why a target's compiled operators cannot be used on this machine, empty where they can; None: it has none."""
    name = f"{RUNTIMES}.{check_target(target)}.operators"
    if importlib.util.find_spec(name) is None:
        return None
    operators: Any = importlib.import_module(name)
    return operators.explain_absence()


def examine_engine(target: str) -> Health:
    """What a target's engine says about itself on this machine; nothing is loaded but the engine."""
    return importlib.import_module(f"{RUNTIMES}.{check_target(target)}.health").examine()
