"""A compiled vision-language model: a tower and a decoder that share weights, sites and experts. Both are oracles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lime_edge.compiler.formats.backbone import Layer, Source
from lime_edge.compiler.formats.vision import VisionBackbone, move_source
from lime_edge.compiler.formats.vision_families import FEATURES
from lime_edge.compiler.model.compiled import Compiled, CompiledModel
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.model.encoder import CompiledEncoder


@dataclass(frozen=True, kw_only=True)
class CompiledVision(Compiled):
    """A model of text and pictures: one flat expert over the tower's sites and the decoder's.

    header: of a prompt's tokens, see `CompiledModel`.
    """

    backbone: VisionBackbone = field(repr=False)
    header: int = 0

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The tower's, then the decoder's."""
        return self.backbone.layers

    @property
    def context(self) -> int:
        """Tokens that the decoder takes at most, image rows among them."""
        return self.backbone.language.decoder.context

    @cached_property
    def language(self) -> CompiledModel:
        """The decoder, which reads features where image tokens stand. Its experts are the whole vectors."""
        decoder, tokens = self.backbone.language.decoder, self.backbone.image_tokens
        return CompiledModel(**self.common(), decoder=decoder, image_tokens=tokens, header=self.header)

    @cached_property
    def tower(self) -> CompiledEncoder:
        """Vision tower and projector: tiles to features. Its experts are the whole vectors."""
        return CompiledEncoder(**self.common(), backbone=self.backbone.tower)

    @property
    def adapts_tower(self) -> bool:
        """Whether an expert changes what is seen: not where all sites are the language model's."""
        return any(site.name in self.backbone.tower.layers for site in self.sites)

    @torch.no_grad()
    def see(self, pixels: Tensor, vector: Tensor | None) -> Tensor:
        """Features of all tiles of a call: pixels (tiles, 3, S, S) to (tiles, rows, hidden).

        Args:
            vector: an expert's full vector p (sum_H,), or None: routed, all tiles together.
        """
        return self.tower.run({self.tower.module.inputs[0].name: pixels}, vector)[FEATURES]


class VisionReader:
    """Both halves, watched over calibration text; no picture is shown, so that the tower is not called."""

    at_once = DecoderModule.at_once

    def __init__(self, model: CompiledVision):
        self._language = DecoderModule(model.language)
        self._tower = model.tower.module

    def list_readers(self) -> dict[Source, nn.Module]:
        """For every input that is multiplied, what reads it."""
        tower = {move_source(source): module for source, module in self._tower.list_readers().items()}
        return tower | dict(self._language.list_readers())

    def read(self, ids: Tensor, real: Tensor, residual: Tensor) -> None:
        """Run the decoder; arguments as `DecoderModule.read`."""
        self._language.read(ids, real, residual)
