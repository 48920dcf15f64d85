"""Core AI's language models: a function for every length of a call, all on the same two states.

Prompts are cut into the lengths that the file has; what is left over is padded. Padding is not seen, and the next call
overwrites what it left in the cache.
"""

from __future__ import annotations

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.residual import Subtract
from lime_edge.errors import LimeEdgeError
from lime_edge.runtimes.coreai.model import Model, choose_provider, wrap
from lime_edge.session.engines import SessionOptions
from lime_edge.targets.entries import CoreaiFacts

DTYPES = {"float16": np.float16, "float32": np.float32}


class SwitchedModel:
    """A loaded file whose expert can be switched: what language models and encoders share."""

    operators: bool | None = None  # it knows none
    subtract: Subtract | None = None  # numpy's

    def __init__(self, bundle: Bundle, options: SessionOptions):
        facts = bundle.manifest.facts_of(CoreaiFacts)
        self._dtype = DTYPES[facts.compute]
        self._takes_expert, self._routing = facts.expert_input, False
        self._expert = wrap(np.zeros(bundle.manifest.sites.total, self._dtype))
        self.provider = choose_provider(options.providers)
        self._model = Model(bundle.path / facts.file, self.provider, facts.compute_unit)

    def set_expert(self, residual: np.ndarray) -> None:
        """Use d (sum_H,) float32, rounded to what the file computes in, from the next call on."""
        self._routing = False
        self._expert = wrap(residual.astype(self._dtype))

    def set_routed(self) -> None:
        """Weigh the frozen bank per token from now on."""
        self._routing = True


class CoreaiEngine(SwitchedModel):
    """A loaded file with its cache as states; implements lime_edge.session.engines.Engine.

    Raises:
        LimeEdgeError: a length beyond the cache, no Core AI where it is asked for, or a file that it refuses.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        facts, model, decoder = bundle.manifest.facts_of(CoreaiFacts), bundle.manifest.backbone, bundle.manifest.decoder
        assert facts.max_length and decoder, "the manifest is checked: a language model's facts have them"
        self._virtual = facts.virtual_tokens  # in the cache before everything else
        self._rows = facts.max_length
        most = min(self._rows, model.context) - self._virtual
        self.capacity = options.max_length or most
        if not 1 <= self.capacity <= most:
            raise LimeEdgeError(
                f"max_length: expected 1..{most}, found {self.capacity}",
                "`max_seq_len` at export sets the cache of this target",
            )
        self.length = 0
        self._vocab, self._lengths = model.vocab, sorted(facts.lengths)
        super().__init__(bundle, options)
        shape = (facts.layers, 1, decoder.kv_heads, self._rows, decoder.head_dim)
        self._state = {name: wrap(np.zeros(shape, self._dtype)) for name in ("keys", "values")}

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens; the cache is overwritten later."""
        self.length = min(self.length, length)

    def feed(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Run S tokens after those in the cache. ids: (S,) int64. Returns (keep or S, V) float32.

        Raises:
            LimeEdgeError: a routed prompt that no length of the file holds.
        """
        fed = self.length + self._virtual if self.length else 0
        rows = min(keep, ids.size) if keep else ids.size
        if self.length == 0 and self._virtual:
            ids = np.concatenate([self._vocab + np.arange(self._virtual), ids])
        parts, start = [], 0
        for length in self._cut(ids.size, self._rows - fed):
            piece = ids[start : start + length]
            parts.append(self._call(piece, length, fed + start)[: piece.size])
            start += piece.size
        self.length = fed + ids.size - self._virtual
        logits = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return np.ascontiguousarray(logits[-rows:], np.float32)

    def _cut(self, count: int, free: int) -> list[int]:
        """Lengths of the calls for `count` tokens; routing must see all of them in one."""
        if not self._routing:
            return plan_calls(count, free, self._lengths)
        fitting = [length for length in self._lengths if count <= length <= free]
        if not fitting:
            longest = max(length for length in self._lengths if length <= free) - self._virtual * (free == self._rows)
            raise LimeEdgeError(
                f"routed: here this file takes up to {max(0, longest)} tokens in one call, found {count}",
                "export it with other `prompt_lengths`, or with a longer `max_seq_len`",
            )
        return [fitting[0]]

    def _call(self, piece: np.ndarray, length: int, position: int) -> np.ndarray:
        """Logits (length, V) of one call."""
        ids = np.zeros((1, length), np.int32)
        ids[0, : piece.size] = piece
        inputs = {"input_ids": ids, "position": np.array([position], np.int32)}
        if self._routing:
            inputs["length"] = np.array([piece.size], np.int32)
        elif self._takes_expert:
            inputs["expert"] = self._expert
        function = f"{'routed' if self._routing else 'main'}_{length}"
        return self._model.run(function, inputs, self._state)["logits"][0]


def plan_calls(count: int, free: int, lengths: list[int]) -> list[int]:
    """Cut a prompt into lengths that a file has: one padded call where at most half of it is padding.

    Args:
        count: tokens. free: rows left in the cache, padding must fit as well. lengths: rising, 1 among them.
    """
    plan = []
    while count > 0:
        fitting = [length for length in lengths if length <= free]
        above = next((length for length in fitting if length >= count), None)
        below = max((length for length in fitting if 1 < length <= count), default=None)
        covers = above is not None and (below is None or above <= 2 * count)
        chosen = (above if covers else below) or fitting[0]
        plan.append(chosen)
        count, free = count - chosen, free - chosen
    return plan
