"""What the layers' inputs look like: a folded float model runs over the calibration, and sums of x x^T are kept."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lime_edge.compiler.formats.backbone import Source
from lime_edge.compiler.model.compiled import Compiled
from lime_edge.compiler.options import Progress
from lime_edge.compiler.rounding.calibrate import Calibration, Sample

Grams = dict[Source, Tensor]  # (D, D) float32, sum of x x^T over tokens


class Reader(Protocol):
    """A model that runs over text and whose layers can be watched."""

    @property
    def at_once(self) -> int:
        """Sequences of one call, the shorter ones padded on the right."""

    def list_readers(self) -> Mapping[Source, nn.Module]:
        """For every input that is multiplied, a module that is called with it."""

    def read(self, ids: Tensor, real: Tensor, residual: Tensor) -> None:
        """Run: ids (B, S) int64, real (B, S) bool, d (sum_H,) float32."""


@torch.no_grad()
def collect_grams(
    model: Compiled,
    reader: Reader,
    calibration: Calibration,
    wanted: Container[Source] | None = None,
    progress: Progress = lambda *_: None,
) -> Grams:
    """Run over the samples, experts active; sum x x^T of the inputs.

    Args:
        model: folded, weights float32. reader: what runs it.
        wanted: the inputs; None: all of them (as much work as the forward pass itself).
        progress: called with ("calibrate", done, total).
    """
    grams: Grams = {}
    keep: list[Tensor] = [torch.empty(0)]  # the batch's real positions, (B, S) bool
    readers = {key: module for key, module in reader.list_readers().items() if wanted is None or key in wanted}
    hooks = [module.register_forward_pre_hook(_adder(grams, key, keep)) for key, module in readers.items()]
    batches = list(_batches(model, calibration, reader.at_once))
    for index, (expert, samples) in enumerate(batches):
        progress("calibrate", index, len(batches))
        ids, keep[0] = _pad([sample.tokens[: model.context] for sample in samples])
        reader.read(ids, keep[0], expert)
    progress("calibrate", len(batches), len(batches))
    for hook in hooks:
        hook.remove()
    return grams


def _pad(rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """ids (B, S) int64 padded on the right with 0, and (B, S) bool: which are real."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    return ids, torch.arange(length) < torch.tensor([[len(row)] for row in rows])


def _adder(grams: Grams, key: Source, keep: list[Tensor]) -> Callable[..., None]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        x = x[keep[0]] if x.shape[:-1] == keep[0].shape else x.flatten(0, -2)  # a pooled input has a row a sequence
        gram = x.t() @ x
        grams[key] = grams[key] + gram if key in grams else gram

    return add


def _batches(model: Compiled, calibration: Calibration, at_once: int) -> Iterator[tuple[Tensor, list[Sample]]]:
    """(residual (sum_H,), samples of similar length) per expert; nameless samples go round the experts."""
    names = list(model.experts)
    by_expert: dict[str, list[Sample]] = {name: [] for name in names}
    turn = 0
    for sample in calibration.samples:
        by_expert[sample.expert or names[turn % len(names)]].append(sample)
        turn += sample.expert is None
    for name, samples in by_expert.items():
        residual = model.experts[name].float() - model.reference
        samples.sort(key=lambda sample: len(sample.tokens))
        for start in range(0, len(samples), at_once):
            yield residual, samples[start : start + at_once]
