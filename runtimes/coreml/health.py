"""What is known about Core ML here: a Mac runs it, elsewhere an interpreter in numpy proves packages."""

from __future__ import annotations

import sys

from lime_edge.session.health import Health, find_version, is_there

INSTALL = "pip install 'lime-edge[coreml]'"


def examine() -> Health:
    """Look for coremltools, and whether this is a Mac."""
    if not is_there("coremltools"):
        return Health("coremltools", None, "the package 'coremltools' is not installed", INSTALL)
    runs = "Core ML" if sys.platform == "darwin" else "the interpreter (numpy, slow): this is no Mac"
    return Health("coremltools", find_version("coremltools"), facts=(("runs", runs),))
