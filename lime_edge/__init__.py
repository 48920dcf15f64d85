"""lime_edge: LiME models on devices: one backbone, many experts, switched without reloading."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lime_edge.errors import LimeEdgeError

if TYPE_CHECKING:
    from lime_edge.session.decoder import Session
    from lime_edge.session.encoder import EncoderSession
    from lime_edge.session.switching import ExpertSwitch

__version__ = "0.1.0"
__all__ = ["LimeEdgeError", "open", "open_decoder", "open_encoder"]


def open(
    path: Path | str,
    target: str | None = None,
    threads: int | None = None,
    max_length: int | None = None,
    verify: bool = False,
) -> ExpertSwitch:
    """Open a bundle, whatever kind of model it holds, and load its artifact.

    The result is typed as what all sessions have: experts and switching. Where the kind is known beforehand,
    `open_decoder` and `open_encoder` give its own session, and refuse the other.

    Args:
        path: the bundle directory. target: "onnx", ...; None takes the bundle's first.
        threads: of the engine; None for the bundle's default. max_length: tokens the cache holds.
        verify: compare the sha256 of every file first.
    Returns:
        A Session for a language model, an EncoderSession for an encoder or a vision model.
    Raises:
        LimeEdgeError: damaged, foreign or newer bundle; missing engine.
    """
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.session.engines import SessionOptions
    from lime_edge.session.open import open_any

    return open_any(Bundle.open(path, verify), target, SessionOptions(threads, max_length))


def open_decoder(
    path: Path | str,
    target: str | None = None,
    threads: int | None = None,
    max_length: int | None = None,
    verify: bool = False,
) -> Session:
    """Open a language model's bundle: `generate`, `logits`.

    Args, Raises: as `open`; LimeEdgeError too where the bundle holds another kind of model.
    """
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.session import open as opening
    from lime_edge.session.engines import SessionOptions

    return opening.open_decoder(Bundle.open(path, verify), target, SessionOptions(threads, max_length))


def open_encoder(
    path: Path | str, target: str | None = None, threads: int | None = None, verify: bool = False
) -> EncoderSession:
    """Open the bundle of an encoder or a vision model: `run`.

    Args, Raises: as `open`; LimeEdgeError too where the bundle holds another kind of model.
    """
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.session import open as opening
    from lime_edge.session.engines import SessionOptions

    return opening.open_encoder(Bundle.open(path, verify), target, SessionOptions(threads))
