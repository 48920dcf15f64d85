"""lime_edge: LiME models on devices: one backbone, many experts, switched without reloading."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lime_edge.errors import LimeEdgeError

if TYPE_CHECKING:
    from lime_edge.session.decoder import Session
    from lime_edge.session.encoder import EncoderSession

__version__ = "0.1.0"
__all__ = ["LimeEdgeError", "open"]


def open(
    path: Path | str,
    target: str | None = None,
    threads: int | None = None,
    max_length: int | None = None,
    verify: bool = False,
) -> Session | EncoderSession:
    """Open a bundle and load its artifact.

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
    from lime_edge.session.decoder import SessionOptions
    from lime_edge.targets.registry import open_session

    bundle, options = Bundle.open(path, verify), SessionOptions(threads=threads, max_length=max_length)
    if bundle.manifest.model.get("kind") == "encoder":
        from lime_edge.session.encoder import open_encoder_session

        return open_encoder_session(bundle, target, options)
    return open_session(bundle, target, options)
