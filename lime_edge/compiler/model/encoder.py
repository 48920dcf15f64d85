"""Encoders and vision models in PyTorch: a transformers model with compiled layers, the oracle of every exporter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_edge.compiler.formats.backbone import Layer, Source
from lime_edge.compiler.formats.encoder import EncoderBackbone, Input, Pooling, make_sample
from lime_edge.compiler.model.compiled import Branch, Compiled, cut
from lime_edge.compiler.model.encoder_layers import CompiledLayer, SiteParts, StoredProduct, StoredTable

SENTENCE = "sentence_embedding"


@dataclass(frozen=True, kw_only=True)
class CompiledEncoder(Compiled):
    """An encoder or vision model; `module` runs it. backbone: the original, for all that is not a layer's weight."""

    backbone: EncoderBackbone = field(repr=False)

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The plain linear layers and embeddings that the model calls."""
        return self.backbone.layers

    @property
    def context(self) -> int:
        """Tokens of the longest text; 0 for pixels."""
        return self.backbone.context

    @cached_property
    def module(self) -> EncoderModule:
        """The model that runs, made once."""
        return EncoderModule(self)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], vector: Tensor | None) -> dict[str, Tensor]:
        """The oracle: outputs for an expert's full vector p (sum_H,), or routed for None."""
        self.module.use_routing(vector is None)
        try:
            return self.module.compute(inputs, self.reference if vector is None else vector.float() - self.reference)
        finally:
            self.module.use_routing(False)


class EncoderModule(nn.Module):
    """The model with its layers compiled; it runs, and is what every exporter traces.

    `routed` switches every site; the residual is then not read.
    """

    at_once = 1  # sequences of one calibration call: not every encoder leaves padding alone

    def __init__(self, compiled: CompiledEncoder):
        super().__init__()
        self.model, self.inputs = copy_structure(compiled.backbone.model), compiled.backbone.inputs
        self._called = compiled.layers
        self.sites, self.pooling = compiled.sites, compiled.backbone.pooling
        for name in compiled.layers:
            self.model.set_submodule(name, build_layer(compiled, name))
        self.adapted = any(layer.parts is not None for layer in self.layers.values())
        self.outputs: tuple[str, ...] = ()
        self.outputs = tuple(self.compute(make_sample(self.inputs), torch.zeros(self.sites.total)))

    @property
    def layers(self) -> dict[str, CompiledLayer]:
        """The compiled layers by name."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, CompiledLayer)}

    def use_routing(self, routed: bool) -> None:
        """Route every site, or take residuals from outside."""
        for layer in self.layers.values():
            layer.routed = routed

    @contextmanager
    def replace_products(self, make: Callable[[StoredProduct | StoredTable], nn.Module]) -> Iterator[None]:
        """Put an exporter's products into the layers, and the compiler's own back afterwards."""
        originals = {layer: layer.product for layer in self.layers.values()}
        try:
            for layer, product in originals.items():
                assert isinstance(product, StoredProduct | StoredTable)
                layer.product = make(product)
            yield
        finally:
            for layer, product in originals.items():
                layer.product = product

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inputs in the order of `inputs`, then the residual d (sum_H,) float32; outputs in the order of `outputs`."""
        found = self.compute({entry.name: x for entry, x in zip(self.inputs, tensors, strict=False)}, tensors[-1])
        return tuple(found[name] for name in self.outputs)

    def compute(self, inputs: Mapping[str, Tensor], residual: Tensor) -> dict[str, Tensor]:
        """Run the model; every tensor output by its transformers name, and the sentence embedding.

        Args:
            inputs: by name, see `Input`. residual: (sum_H,) float32; not read when routed.
        """
        pieces = {}
        if self.adapted:
            parts = residual.split([site.width for site in self.sites])
            pairs = zip(self.sites, parts, strict=True)  # of a tower: the language model's are among them
            pieces = {f"{site.name}.residual": part for site, part in pairs if site.name in self._called}
        output = torch.func.functional_call(self.model, pieces, (), dict(inputs))
        found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
        if self.pooling is not None:
            found[SENTENCE] = pool(found["last_hidden_state"], inputs["attention_mask"], self.pooling)
        return found

    def list_readers(self) -> dict[Source, nn.Module]:
        """For every input that is multiplied, one layer that reads it."""
        layers = self.layers
        return {layer.source: layers[name] for name, layer in reversed([*self._called.items()]) if not layer.embedding}

    def read(self, ids: Tensor, real: Tensor, residual: Tensor) -> None:
        """Run over text, for who watches the layers.

        Args:
            ids: (B, S) int64. real: (B, S) bool, False where a row is padded. residual: (sum_H,) float32.
        """
        self.compute(feed_text(self.inputs, ids, real), residual)


def copy_structure(model: nn.Module) -> nn.Module:
    """The same modules anew, on the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


def build_layer(compiled: CompiledEncoder, name: str) -> CompiledLayer:
    """The layer of that module name: plain, or with its branch."""
    stored, bias = compiled.weights[f"{name}.weight"], compiled.vectors.get(f"{name}.bias")
    branch, table = compiled.branches.get(name), compiled.layers[name].embedding
    late = bias if branch is not None and branch.rows else None  # SliceFine's comes after the modulation
    product = StoredTable(stored) if table else StoredProduct(stored, bias if late is None else None)
    return CompiledLayer(product, None if branch is None else describe_site(compiled, name, branch, late))


def describe_site(compiled: CompiledEncoder, name: str, branch: Branch, late: Tensor | None) -> SiteParts:
    """What a layer needs to be a site. late: the bias that comes after the modulation, or None."""
    site, table = compiled.sites.find(name), compiled.layers[name].embedding
    assert site is not None
    a, b = branch.a, None if branch.b is None else branch.b.t().contiguous()
    if not table and a is not None:
        a, b = stack_branches(compiled, name)
    reference, bank = cut(site, compiled.reference).clone(), compiled.bank(site)
    pad = compiled.pad_token_id if table else None
    return SiteParts(compiled.variant, a, b, branch.rows, late, reference, bank, compiled.routing, pad)


def stack_branches(compiled: CompiledEncoder, name: str) -> tuple[Tensor, Tensor]:
    """A of all sites that read this input, (D, R), so that it is computed once; B (R, H), zero for the others."""
    layers = compiled.layers
    members = [n for n, layer in layers.items() if layer.source == layers[name].source and n in compiled.branches]
    parts = [a for n in members if (a := compiled.branches[n].a) is not None]
    start = sum(len(a) for a in parts[: members.index(name)])
    own = compiled.branches[name].b
    assert own is not None
    b = torch.zeros(sum(map(len, parts)), own.shape[0])
    b[start : start + own.shape[1]] = own.t()
    return torch.cat(parts).t().contiguous(), b


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector per sentence: (B, T, H) and mask (B, T) to (B, H).

    Source: sentence-transformers, models.Pooling and models.Normalize (the formulas, not the code).
    """
    if pooling.mode == "cls":
        pooled = hidden[:, 0]
    elif pooling.mode == "mean":
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp_min(1e-9)
    else:
        pooled = hidden.masked_fill(mask.unsqueeze(-1) == 0, -1e9).amax(1)
    return F.normalize(pooled, dim=-1) if pooling.normalize else pooled


def feed_text(inputs: tuple[Input, ...], ids: Tensor, real: Tensor | None = None) -> dict[str, Tensor]:
    """Text as the model's inputs, those besides at their defaults.

    Args:
        ids: (B, S) int64. real: (B, S) bool, False where a row is padded; None: nowhere.
    """
    ones = torch.ones_like(ids) if real is None else real.to(ids)
    given = {"": ids, "ones": ones, "zeros": torch.zeros_like(ids)}
    return {entry.name: given[entry.default] for entry in inputs}
