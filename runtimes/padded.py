"""What runtimes share whose calls have enumerated lengths: prompts cut into them, what is left over padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

IDS = "input_ids"


class PaddedDecoder:
    """A language model whose calls have enumerated lengths. Padding is never seen.

    Whoever loads the program sets length: tokens in the cache; _virtual: virtual tokens before them; _vocab: ids from
    here on are these.
    """

    length: int
    _virtual: int
    _vocab: int

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens; the cache is overwritten later."""
        self.length = min(self.length, length)

    def feed(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Run S tokens after those in the cache. ids: (S,) int64. Returns (keep or S, V) float32.

        Raises:
            LimeEdgeError: a routed prompt that no length holds.
        """
        fed = self.length + self._virtual if self.length else 0
        rows = min(keep, ids.size) if keep else ids.size
        if self.length == 0 and self._virtual:
            ids = np.concatenate([self._vocab + np.arange(self._virtual), ids])
        parts, start = [], 0
        for length in self._cut(ids.size, fed):
            piece = ids[start : start + length]
            padded = np.zeros((1, length), np.int32)
            padded[0, : piece.size] = piece
            parts.append(self._call(padded, piece.size, fed + start)[: piece.size])
            start += piece.size
        self.length = fed + ids.size - self._virtual
        logits = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return np.ascontiguousarray(logits[-rows:], np.float32)

    def _cut(self, count: int, fed: int) -> list[int]:
        """Lengths of the calls for `count` tokens after `fed` in the cache; routing must see all of them in one."""
        raise NotImplementedError

    def _call(self, ids: np.ndarray, count: int, position: int) -> np.ndarray:
        """Logits (length, V) of one call. ids: (1, length) int32, the first `count` of them real."""
        raise NotImplementedError


def plan_calls(count: int, lengths: Sequence[int], free: int | None = None) -> list[int]:
    """Cut a prompt into enumerated lengths: one padded call where at most half of it is padding.

    Args:
        count: tokens. lengths: enumerated, rising. free: rows left in the cache, where padding is written to it too (1
            is among the lengths then); None where it is not.
    """
    plan = []
    while count > 0:
        fitting = [length for length in lengths if free is None or length <= free]
        above = next((length for length in fitting if length >= count), None)
        below = max((length for length in fitting if 1 < length <= count), default=None)
        covers = above is not None and (below is None or above <= 2 * count)
        chosen = (above if covers else below) or fitting[0]
        plan.append(chosen)
        count, free = count - chosen, None if free is None else free - chosen
    return plan


class PaddedEncoder:
    """An encoder or vision model whose calls have enumerated lengths.

    Pinned, every row of a batch is a call of its own. Whoever loads the program sets _outputs: names; _lengths:
    enumerated, rising, none for pixels.
    """

    _outputs: tuple[str, ...]
    _lengths: Sequence[int]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, float32."""
        inputs = {name: self._cast(x) for name, x in inputs.items()}
        if self._routes:
            found = self._compute(inputs, None)
            return {name: np.asarray(found[name], np.float32) for name in self._outputs}
        count = len(next(iter(inputs.values())))
        rows = [self._run_row({name: x[row : row + 1] for name, x in inputs.items()}) for row in range(count)]
        return {name: np.concatenate([row[name] for row in rows]) for name in self._outputs}

    def _run_row(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One text or image; outputs that have a row per token lose those of the padding."""
        tokens = inputs[IDS].shape[1] if IDS in inputs else 0
        length = next((n for n in self._lengths if n >= tokens), tokens)
        if length > tokens:  # the mask is among the inputs, so its zeros tell the padding
            inputs = {name: np.pad(x, ((0, 0), (0, length - tokens))) for name, x in inputs.items()}
        found = self._compute(inputs, length)
        padded = {name: length > tokens and found[name].ndim == 3 for name in self._outputs}
        return {
            name: np.asarray(found[name][:, :tokens] if padded[name] else found[name], np.float32)
            for name in self._outputs
        }

    @property
    def _routes(self) -> bool:
        """Whether the checkpoint's experts are weighed: the batch is then one call as it is."""
        raise NotImplementedError

    def _cast(self, x: np.ndarray) -> np.ndarray:
        """An input in the type that the program takes."""
        raise NotImplementedError

    def _compute(self, inputs: dict[str, np.ndarray], length: int | None) -> dict[str, np.ndarray]:
        """All outputs of one call. length: of the text, 0 for pixels; None routes."""
        raise NotImplementedError
