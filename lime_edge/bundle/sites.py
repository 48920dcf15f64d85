"""Sites: the adapted layers, in order, and where each lies in the flat expert vector."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Site:
    """One adapted layer: its module name, output width H, and offset in the flat vector (floats)."""

    name: str
    width: int
    offset: int


@dataclass(frozen=True)
class SiteTable:
    """All sites in order. Two models with equal tables accept each other's vectors by shape."""

    sites: tuple[Site, ...]

    @classmethod
    def from_widths(cls, widths: Iterable[tuple[str, int]]) -> SiteTable:
        """Lay out (name, H) pairs one after the other."""
        sites, offset = [], 0
        for name, width in widths:
            sites.append(Site(name, width, offset))
            offset += width
        return cls(tuple(sites))

    @property
    def total(self) -> int:
        """sum_H: length of a flat expert vector."""
        return self.sites[-1].offset + self.sites[-1].width if self.sites else 0

    @cached_property
    def hash(self) -> str:
        """sha256 over names and widths in order: an expert file names the table it was made for."""
        text = json.dumps([[s.name, s.width] for s in self.sites], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def find(self, name: str) -> Site | None:
        """The site of that module name, or None."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}
