"""Where a prompt is cut: at fixed places in the cache, and never into a single token where there are two."""

from __future__ import annotations

CHUNK = 512  # prompt tokens fed at once: bounds the memory of a long prompt


def plan_chunks(held: int, count: int, size: int = CHUNK) -> list[int]:
    """Where to cut `count` tokens that follow `held`: at multiples of `size` in the cache, whatever is held already.

    So a prompt is cut alike whether or not its beginning was kept. No piece is a single token where there are two:
    engines compute a call of one token on another path, and in a quantized bundle the two round differently.

    Returns:
        The end of each piece, the last one `count`.
    """
    stops, start = [], 0
    while start < count:
        stop = min(count, (held + start) // size * size + size - held)
        while stop < count and 1 in (stop - start, count - stop):
            stop += 1
        stops.append(stop)
        start = stop
    return stops
