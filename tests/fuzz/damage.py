"""How files are damaged: bytes of any file, values of JSON, headers of safetensors. The same for the same seed."""

from __future__ import annotations

import json
import random
import struct
from copy import deepcopy
from typing import Any

NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**9, 10**30, 1.5, -1.0, 1e-30, 1e308, "", "a\n", "../x", "none", "routed"),
    *(
        "con",
        "\u202e",
        "[red]x",
        "\x1b[31m",
        "x" * 70000,
        [],
        {},
        [[]],
        [0] * 100,
        [None],
        {"kind": "always"},
        {"": ""},
    ),
    *("0" * 64, "experts/one.safetensors", "/etc/passwd", "F8_E4M3", "BF16", "I64", "{{ 9**9**9 }}", "NaN"),
)
RAW = (b"[" * 5000, b"9" * 5000, b"\xff", b"null", b'"', b"1e999", b"-", b"NaN", b"Infinity", b"\x00" * 8, b"\xff" * 8)


def damage_bytes(data: bytes, draw: random.Random, near: int | None = None) -> bytes:
    """Flipped, cut, doubled, swapped or foreign bytes.

    Args:
        near: only within the first so many bytes, where a file says what it is.
    """
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(min(near or len(changed), len(changed)) + 1)
        kind = draw.randrange(8)
        if kind == 0 and changed:
            changed[place % len(changed)] = draw.randrange(256)
        elif kind == 1:
            del changed[place : place + draw.choice((1, 4, 64))]
        elif kind == 2:
            changed[place:place] = changed[place : place + draw.choice((1, 8, 64))]
        elif kind == 3:
            changed[place:place] = draw.randbytes(draw.choice((1, 8)))
        elif kind == 4:
            del changed[place:]
        elif kind == 5:
            changed[place : place + 8] = struct.pack("<Q", draw.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
        elif kind == 6:
            changed[place : place + 4] = struct.pack("<I", draw.choice((0, 1, 8, 9, 255, 2**16, 2**31, 2**32 - 1)))
        else:
            changed[place:place] = draw.choice(RAW)
    return bytes(changed)


def disturb_json(body: Any, draw: random.Random) -> None:
    """One value anywhere in a document replaced, left out, doubled under another name, or made another number."""
    places: list[tuple[Any, Any]] = []
    stack = [body]
    while stack:
        value = stack.pop()
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            stack.append(value[key])
    if not places:
        return
    holder, key = draw.choice(places)
    kind = draw.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(("more", "", "../x", str(key) + "x", "A"))] = deepcopy(holder[key])
    elif kind == 2:
        holder[key] = deepcopy(draw.choice(places)[0])
    elif kind == 3 and isinstance(holder[key], int):
        holder[key] = draw.choice((0, -1, holder[key] + 1, holder[key] * 2, 10**5, 10**7, 10**9, 2**62))
    else:
        holder[key] = deepcopy(draw.choice(NASTY))


def damage_json(data: bytes, draw: random.Random) -> bytes:
    """A document with a few values disturbed, or with damaged bytes."""
    if draw.random() < 0.2:
        return damage_bytes(data, draw)
    body = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        disturb_json(body, draw)
    try:
        return json.dumps(body).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # a document in itself
        return damage_bytes(data, draw)


def damage_safetensors(data: bytes, draw: random.Random) -> bytes:
    """The header disturbed and the file put together again, numbers that are none, or damaged bytes."""
    kind = draw.randrange(4)
    if kind == 0:
        return damage_bytes(data, draw)
    (length,) = struct.unpack("<Q", data[:8])
    if kind == 1:
        return damage_bytes(data, draw, 8 + length)
    if kind == 2:
        changed = bytearray(data)
        for _ in range(draw.choice((1, 4))):
            place = 8 + length + 4 * draw.randrange(max(1, (len(data) - 8 - length) // 4))
            changed[place : place + 4] = struct.pack("<f", draw.choice((float("nan"), float("inf"), 3e38, 0.0, -1e30)))
        return bytes(changed[: len(data)])
    header = damage_json(data[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
