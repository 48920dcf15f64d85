"""From logits to a token: the same one in every language (docs/sampling.md says each step, in this order)."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np

from lime_edge.errors import LimeEdgeError

MASK = (1 << 64) - 1
CANDIDATES = 64  # looked at first when a probability mass is sought; eight times as many while they do not reach it
Pick = Callable[[np.ndarray], int]


class SplitMix64:
    """64 random bits a call, from a 64-bit seed.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 17.
    """

    def __init__(self, seed: int):
        self._state = seed

    def next(self) -> int:
        """The next number, 0..2^64 - 1."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def uniform(self) -> float:
        """A multiple of 2^-53 in [0, 1): the upper 53 bits of one number."""
        return (self.next() >> 11) * 2.0**-53


def make_sampler(temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int | None = None) -> Pick:
    """A function from logits (V,) float32 to a token id.

    Args:
        temperature: 0 is greedy. top_k: the k likeliest, 0 for all. top_p: the fewest that have this mass.
        seed: 0..2^64 - 1; None for one that nobody knows.
    """
    if temperature == 0:
        return pick_best
    random = SplitMix64(secrets.randbits(64) if seed is None else seed)

    def pick(logits: np.ndarray) -> int:
        ids, weights = weigh(logits, temperature, top_k, top_p)
        return int(ids[draw(weights, random.uniform())])

    return pick


def pick_best(logits: np.ndarray) -> int:
    """The likeliest token, of several the one with the lowest id.

    Raises:
        LimeEdgeError: the logits hold NaN or +inf, or nothing finite.
    """
    best = int(logits.argmax())  # NaN counts as the largest
    _check(logits[best])
    return best


def weigh(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """What may be drawn: exp((logit - largest) / temperature), after top-k and then top-p.

    Args:
        logits: (V,) float32.
    Returns:
        ids (N,) rising, and weights (N,) float64, not normalized.
    Raises:
        LimeEdgeError: the logits hold NaN or +inf, or nothing finite.
    Source: top-p, Holtzman et al., arXiv 1904.09751.
    """
    wide = logits.astype(np.float64)
    largest = wide.max()
    _check(largest)
    ids = choose_likeliest(wide, top_k) if top_k else np.arange(wide.size)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose weight is 0
        weights = np.exp((wide[ids] - largest) / temperature)
    if top_p < 1:
        kept = choose_mass(weights, wide[ids], top_p)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def choose_likeliest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values, rising; of equal ones the first."""
    if count >= values.size:
        return np.arange(values.size)
    least = np.partition(values, -count)[-count]
    above, ties = np.flatnonzero(values > least), np.flatnonzero(values == least)
    return np.sort(np.concatenate([above, ties[: count - above.size]]))


def choose_mass(weights: np.ndarray, values: np.ndarray, share: float) -> np.ndarray:
    """Places of the fewest that hold `share` of all weight, rising: likeliest first, of equal ones the first.

    Args:
        weights: (N,). values: (N,), what they are ordered by.
    """
    goal, count = share * np.cumsum(weights)[-1], CANDIDATES
    while True:
        places = choose_likeliest(values, count)
        places = places[np.argsort(-values[places], kind="stable")]
        held = np.cumsum(weights[places])
        if held[-1] >= goal or places.size == values.size:
            return np.sort(places[: np.searchsorted(held, goal) + 1])
        count *= 8


def draw(weights: np.ndarray, uniform: float) -> int:
    """The first place where the running sum of the weights exceeds `uniform` of their sum.

    Args:
        weights: (N,) float64, in the order of the ids. uniform: in [0, 1).
    """
    sums = np.cumsum(weights)  # one after another: pairwise sums round otherwise
    return int(np.searchsorted(sums, uniform * sums[-1], side="right"))


def _check(largest: np.floating) -> None:
    if not np.isfinite(largest):
        raise LimeEdgeError(
            f"the model's logits hold {largest}: no token can be picked",
            "lime-edge verify BUNDLE tells whether it computes here what PyTorch did; an expert with huge values?",
        )
