"""How far a target's answers may be from PyTorch's, by what it computes in."""

from __future__ import annotations

from dataclasses import dataclass

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import ROUTED

NARROW, ROUTED_FACTOR, NARROW_FACTOR = 16, 2, 3  # see choose_tolerance


@dataclass(frozen=True)
class Tolerance:
    """What a way of computing may differ by, in standard deviations of the output.

    mean: root mean square error of a row, averaged over rows. worst: the largest of any row. decisive: where the
    oracle's best lies further than this before its second, the best must be the same.
    """

    mean: float
    worst: float
    decisive: float


# By what a target computes in; how these were found: docs/bundle-format.md, "Golden outputs".
TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4, 1e-3),
    "float16": Tolerance(0.02, 0.05, 0.2),
    "int8-dynamic": Tolerance(0.1, 0.25, 1.0),  # activations rounded in blocks
    "int8-per-token": Tolerance(0.2, 0.4, 1.0),  # activations rounded with one scale a token: coarser
}


def find_compute(bundle: Bundle, target: str) -> str:
    """How a target computes, a key of TOLERANCES."""
    return bundle.manifest.targets[target].compute


def choose_tolerance(compute: str, label: str, width: int) -> Tolerance:
    """The limits of one output of that width under one selection.

    Rounding tips a routed token to other experts now and then, and a row of a few values averages nothing out.
    """
    limits, loose = TOLERANCES[compute], 1
    if compute != "float32":
        loose = (ROUTED_FACTOR if label == ROUTED else 1) * (NARROW_FACTOR if width < NARROW else 1)
    return Tolerance(limits.mean * loose, limits.worst * loose, limits.decisive * loose)
