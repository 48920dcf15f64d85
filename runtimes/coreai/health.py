"""What is known about Core AI here: a Mac of version 27 has it, elsewhere Apple's package interprets."""

from __future__ import annotations

import sys

from lime_edge.session.health import Health, find_version, is_there

INSTALL = "pip install 'lime-edge[coreai]'"


def examine() -> Health:
    """Look for coreai-core, and whether this is a Mac."""
    if not is_there("coreai"):
        return Health("coreai-core", None, "the package 'coreai-core' is not installed", INSTALL)
    runs = "Core AI" if sys.platform == "darwin" else "Apple's interpreter (slow, keeps memory): this is no Mac"
    return Health("coreai-core", find_version("coreai-core"), facts=(("runs", runs),))
