"""What must never be on a device, whatever happened: anything under its final name that is not whole."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path


def find_half_made(root: Path, partial: bool = False) -> list[str]:
    """Everything in lime-edge's folder there that is half-made, in words.

    Args:
        partial: temporary names may be there: their maker was killed and had no chance.
    """
    found = []
    if not root.exists():
        return []
    for path in root.iterdir():
        if path.name.endswith((".partial", ".old")) and not partial:
            found.append(f"left: {path.name}")
        elif path.suffix == ".pyz":
            name = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            if path.name != f"helper-{name}.pyz" or zipfile.ZipFile(path).testzip() is not None:
                found.append(f"helper: {path.name}")
    for folder in ("env", "bundles", "incoming"):
        for path in (root / folder).iterdir() if (root / folder).exists() else ():
            if path.name.endswith((".partial", ".old")):
                found += [] if partial else [f"left: {folder}/{path.name}"]
            elif folder == "env" and not (path / "ready.json").exists():
                found.append(f"environment: {path.name}")
            elif folder == "incoming" and hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
                found.append(f"arrived: {path.name}")
            elif folder == "bundles":
                found += [f"bundle {path.name}: {fault}" for fault in find_faults(path)]
    return found


def find_faults(place: Path) -> list[str]:
    """What a bundle there lacks, by its own manifest."""
    (bundle,) = [path for path in place.iterdir() if path.is_dir()]
    if not (place / "arrived.json").exists() or not (bundle / "lime.json").exists():
        return ["notes or manifest are missing"]
    manifest = (bundle / "lime.json").read_bytes()
    faults = [] if hashlib.sha256(manifest).hexdigest().startswith(place.name) else ["another manifest"]
    for name, entry in json.loads(manifest)["files"].items():
        file = bundle / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
            faults.append(name)
    return faults + [path.name for path in bundle.rglob("*.partial")]
