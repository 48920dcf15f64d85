"""From a bundle and a target's name to a session; engines are found through `lime_edge.targets.registry`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.engines import SessionOptions, blame_engine
from lime_edge.session.health import Health
from lime_edge.session.kinds import DECODER, ENCODER, Kind, SessionT, find_kind, require_kind
from lime_edge.session.switching import ExpertSwitch
from lime_edge.targets.registry import find_target, load_runtime

OpenEngine = Callable[[Bundle, SessionOptions], Any]


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
    kind = find_kind(bundle)
    target, load = load_engine(bundle, target)
    bundle.check_target(target)  # an engine sees no file that is not as it was written
    try:
        engine = load(bundle, options or SessionOptions())
    except LimeEdgeError:
        raise
    except Exception as error:  # of files that are whole: what an engine cannot load, or has no memory for
        raise blame_engine(target, error) from error
    return kind.open(bundle, engine, bundle.open_bank(engine.subtract), target)


def load_engine(bundle: Bundle, target: str | None) -> tuple[str, OpenEngine]:
    """The target that is meant and what loads this bundle's kind of model there.

    Args:
        target: None takes the bundle's first.
    Raises:
        LimeEdgeError: no such target, the bundle was not exported for it, it does not run this kind of model, or its
            packages are missing.
    """
    present = tuple(bundle.manifest.targets)
    target = target or present[0]
    runtime = find_target(target)
    if target not in present:
        raise LimeEdgeError(f"{bundle.path}: holds no {target} artifact", f"it holds {', '.join(present)}")
    kind = find_kind(bundle)
    engines: dict[str, OpenEngine] = load_runtime(runtime, "entry").ENGINES
    if kind.name not in engines:
        raise LimeEdgeError(
            f"{bundle.path} holds {kind.noun}, which {runtime.title} does not run", "take another target"
        )
    return target, engines[kind.name]


def explain_operators(target: str) -> str | None:
    """Why a target's compiled operators cannot be used on this machine, empty where they can; None: it has none."""
    explain = getattr(load_runtime(find_target(target), "health"), "explain_operators", None)
    return None if explain is None else explain()


def examine_engine(target: str) -> Health:
    """What a target's engine says about itself on this machine; nothing is loaded but the engine."""
    return load_runtime(find_target(target), "health").examine()
