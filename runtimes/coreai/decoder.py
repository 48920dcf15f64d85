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
from lime_edge.runtimes.padded import IDS, PaddedDecoder, plan_calls
from lime_edge.session.engines import SessionOptions, choose_capacity
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


class CoreaiEngine(PaddedDecoder, SwitchedModel):
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
        self.capacity = choose_capacity(options, most)
        self.length = 0
        self._vocab, self._lengths = model.vocab, sorted(facts.lengths)
        super().__init__(bundle, options)
        shape = (facts.layers, 1, decoder.kv_heads, self._rows, decoder.head_dim)
        self._state = {name: wrap(np.zeros(shape, self._dtype)) for name in ("keys", "values")}

    def _cut(self, count: int, fed: int) -> list[int]:
        """Lengths of the calls for `count` tokens; padding is written to the cache, so it has to fit as well.

        Raises:
            LimeEdgeError: a routed prompt that no length of the file holds.
        """
        free = self._rows - fed
        if not self._routing:
            return plan_calls(count, self._lengths, free)
        fitting = [length for length in self._lengths if count <= length <= free]
        if not fitting:
            longest = max(length for length in self._lengths if length <= free) - self._virtual * (free == self._rows)
            raise LimeEdgeError(
                f"routed: here this file takes up to {max(0, longest)} tokens in one call, found {count}",
                "export it with other `prompt_lengths`, or with a longer `max_seq_len`",
            )
        return [fitting[0]]

    def _call(self, ids: np.ndarray, count: int, position: int) -> np.ndarray:
        """Logits (length, V) of one call."""
        inputs = {IDS: ids, "position": np.array([position], np.int32)}
        if self._routing:
            inputs["length"] = np.array([count], np.int32)
        elif self._takes_expert:
            inputs["expert"] = self._expert
        function = f"{'routed' if self._routing else 'main'}_{ids.shape[1]}"
        return self._model.run(function, inputs, self._state)["logits"][0]
