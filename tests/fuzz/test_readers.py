"""Mutated files of a bundle and of experts from elsewhere: refused in words, or the same answer; never anything else.

LIME_EDGE_FUZZ_SECONDS says for how long each test goes on (a few seconds by default, `make fuzz` an hour in all); the
seed is printed when one fails.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from manifests import make_bundle, make_expert, reseal, seal

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import parse_expert
from lime_edge.bundle.manifest import MANIFEST, decode_manifest, find_contradictions
from lime_edge.errors import Faults, LimeEdgeError

SECONDS = float(os.environ.get("LIME_EDGE_FUZZ_SECONDS", "3"))
SLOWEST = 10.0  # seconds that no file may take
NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, 1e308, "", "a\n", "../x", "none", "routed", "con", "\u202e"),
    *("x" * 70000, [], {}, [[]], [0] * 100, {"kind": "always"}, {"": ""}, "0" * 64, "experts/one.safetensors"),
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def draw() -> Iterator[random.Random]:
    """A generator for every round, until the time is up."""
    end, seed = time.monotonic() + SECONDS, int(os.environ.get("LIME_EDGE_FUZZ_SEED", "0"))
    while time.monotonic() < end:
        print("LIME_EDGE_FUZZ_SEED", seed)
        yield random.Random(seed)
        seed += 1


def attempt(work: Callable[[], Any]) -> Any:
    """What the work gives, or None where it is refused in words; every other exception is a bug."""
    begin = time.monotonic()
    try:
        return work()
    except LimeEdgeError as error:
        assert error.problem and "\x1b" not in str(error)
        return None
    finally:
        assert time.monotonic() - begin < SLOWEST


def damage(data: bytes, random: random.Random) -> bytes:
    """Flipped, cut, doubled or foreign bytes."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        place = random.randrange(len(changed) + 1)
        kind = random.randrange(5)
        if kind == 0 and changed:
            changed[place % len(changed)] = random.randrange(256)
        elif kind == 1:
            del changed[place : place + random.choice((1, 4, 64))]
        elif kind == 2:
            changed[place:place] = changed[place : place + random.choice((1, 8, 64))]
        elif kind == 3:
            changed[place:place] = random.randbytes(random.choice((1, 8)))
        else:
            changed[place:place] = random.choice((b"[" * 5000, b"9" * 5000, b"\xff", b"null", b'"', b"1e999", b"-"))
    return bytes(changed)


def disturb(body: Any, random: random.Random) -> None:
    """One value anywhere in a JSON document replaced, left out, doubled under another name."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(body)
    holder, key = random.choice(places)
    kind = random.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(("more", "", "../x", str(key) + "x", "A"))] = deepcopy(holder[key])
    elif kind == 2:
        holder[key] = deepcopy(random.choice(places)[0])
    else:
        holder[key] = deepcopy(random.choice(NASTY))


def answers(path: Path) -> dict[str, bytes]:
    bundle = Bundle.open(path)
    bank = bundle.open_bank()
    return {name: bank.residual(name).tobytes() for name in bank.names}


def test_damaged_manifests(tmp_path: Path) -> None:
    data = (make_bundle(tmp_path / "x.lime") / MANIFEST).read_bytes()
    whole = decode_manifest(data, MANIFEST)
    for random_ in draw():
        found = attempt(lambda random_=random_: decode_manifest(damage(data, random_), MANIFEST))
        assert found is None or found == whole, "its own hash covers everything"


def test_resealed_manifests(tmp_path: Path) -> None:
    """Hashes made to fit: what is taken is whole by every rule, and what is made of it opens or is refused."""
    path = make_bundle(tmp_path / "x.lime")
    text = (path / MANIFEST).read_text()
    for random_ in draw():
        body = json.loads(text)
        for _ in range(random_.choice((1, 1, 2, 5))):
            disturb(body, random_)
        try:
            sealed = seal(body)
        except (ValueError, RecursionError):  # a document in itself
            continue
        if (found := attempt(lambda sealed=sealed: decode_manifest(sealed, MANIFEST))) is not None:
            with Faults("found") as faults:
                find_contradictions(found, faults)
            (path / MANIFEST).write_bytes(sealed)
            attempt(lambda: answers(path))


def test_damaged_experts() -> None:
    data = make_expert("one", 3).to_bytes()
    for random_ in draw():
        found = attempt(lambda random_=random_: parse_expert(damage(data, random_), "x", 5))
        if found is not None:  # no hash here: whatever it says, a target can hold it
            assert found.vector.ndim == 1 and 1 <= found.vector.size <= 5 and np.isfinite(found.vector).all()


def test_damaged_bundles(tmp_path: Path) -> None:
    """Any file of it: refused, when opened or when used, or the same answers."""
    path = make_bundle(tmp_path / "x.lime")
    wanted = answers(path)
    for random_ in draw():
        copy = Path(shutil.copytree(path, tmp_path / "copy.lime"))
        files = sorted(file for file in copy.rglob("*") if file.is_file())
        file = random_.choice(files)
        file.write_bytes(damage(file.read_bytes(), random_))
        found = attempt(lambda copy=copy: answers(copy))
        assert found is None or found == wanted
        shutil.rmtree(copy)


def test_resealed_bundles(tmp_path: Path) -> None:
    """Hashes made to fit the damage: no crash, no traceback, and numbers that every target can hold."""
    path = make_bundle(tmp_path / "x.lime")
    for random_ in draw():
        copy = Path(shutil.copytree(path, tmp_path / "copy.lime"))
        file = random_.choice(sorted(file for file in copy.rglob("*") if file.is_file() and file.name != MANIFEST))
        file.write_bytes(damage(file.read_bytes(), random_))
        reseal(copy)
        for data in (attempt(lambda copy=copy: answers(copy)) or {}).values():
            assert np.abs(np.frombuffer(data, np.float32)).max() <= 65504
        shutil.rmtree(copy)
