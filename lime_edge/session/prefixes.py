"""Beginnings of sequences that were read once, for other sequences to begin with; the least recently used goes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from lime_edge.session.engines import Prefix

LIMIT = 256 << 20  # bytes
SHORTEST = 8  # tokens worth a copy


def count_common(one: Sequence[object], other: Sequence[object]) -> int:
    """With how many of the same both begin."""
    for count, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return count
    return min(len(one), len(other))


class PrefixCache:
    """Saved prefixes by who filled them and by their tokens, within a limit of bytes.

    Args:
        limit: bytes of all of them; 0 keeps none.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self._saved: OrderedDict[tuple[bytes, tuple[int, ...]], Prefix] = OrderedDict()  # oldest use first

    @property
    def nbytes(self) -> int:
        """Memory that is taken."""
        return sum(prefix.nbytes for prefix in self._saved.values())

    def __len__(self) -> int:
        return len(self._saved)

    def clear(self) -> None:
        """Forget all of them."""
        self._saved.clear()

    def find(self, filler: bytes, ids: Sequence[int], capacity: int) -> tuple[int, Prefix | None]:
        """The saved prefix with most tokens in common, and how many; 0 and None where it is not worth a copy.

        Args:
            filler: of what filled it (`ExpertSwitch.identify`). ids: of the sequence that is to begin with it.
            capacity: tokens that the sequence's cache holds.
        """
        best, found = SHORTEST - 1, None
        for key in self._saved:
            if key[0] == filler and len(key[1]) <= capacity and (count := count_common(key[1], ids)) > best:
                best, found = count, key
        if found is None:
            return 0, None
        self._saved.move_to_end(found)
        return best, self._saved[found]

    def keep(self, filler: bytes, ids: Sequence[int], prefix: Prefix) -> None:
        """Keep a prefix, and no shorter one that it begins with; what no longer fits goes."""
        own = tuple(ids)
        for key in [key for key in self._saved if key[0] == filler and key[1] == own[: len(key[1])]]:
            del self._saved[key]
        self._saved[filler, own] = prefix
        while self._saved and self.nbytes > self.limit:
            self._saved.popitem(last=False)
