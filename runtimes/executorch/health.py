"""What is known about ExecuTorch here without loading it: its Python binding imports torch, for seconds."""

from __future__ import annotations

from lime_edge.session.health import Health, find_version, is_there

INSTALL = "pip install 'lime-edge[executorch]' torch"


def examine() -> Health:
    """Look for the packages that its Python runtime needs."""
    version = find_version("executorch")
    missing = [name for name in ("executorch", "torch") if not is_there(name)]
    if missing:
        return Health("executorch", version, f"not installed: {', '.join(missing)}", INSTALL)
    return Health("executorch", version, facts=(("checked", "installed; not loaded, that takes seconds"),))
