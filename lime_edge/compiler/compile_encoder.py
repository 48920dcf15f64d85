"""An encoder checkpoint in, a compiled encoder out: round the experts, fold, quantize."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_edge.bundle.sites import Site, SiteTable
from lime_edge.compiler.compile import CompileOptions, reference_vector, stored_experts
from lime_edge.compiler.formats.checkpoint import Checkpoint
from lime_edge.compiler.formats.encoder import EncoderCheckpoint, Input, Layer, Pooling, make_sample
from lime_edge.compiler.maths.fold import fold_embedding, fold_linear, fold_reference
from lime_edge.compiler.maths.quantize import QuantizedTensor, group_for, quantize
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.model.encoder_layers import CompiledLayer, Product, SiteParts, Stored, Table
from lime_edge.compiler.rounding.model import round_by_gram

SENTENCE = "sentence_embedding"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EncoderCalibration:
    """What gptq looks at: token ids, each sequence with the expert it is read with (None: they take turns)."""

    samples: tuple[tuple[tuple[int, ...], str | None], ...]
    source: str


class EncoderModule(nn.Module):
    """The model with its layers compiled; it runs, and is what every exporter traces.

    `routed` switches every site; the residual is then not read.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Input, ...], sites: SiteTable, pooling: Pooling | None):
        super().__init__()
        self.model, self.inputs, self.sites, self.pooling = model, inputs, sites, pooling
        self.adapted = any(layer.parts is not None for layer in self.layers.values())
        self.outputs: tuple[str, ...] = ()
        self.outputs = tuple(self.compute(make_sample(inputs), torch.zeros(sites.total)))

    @property
    def layers(self) -> dict[str, CompiledLayer]:
        """The compiled layers by name."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, CompiledLayer)}

    def use_routing(self, routed: bool) -> None:
        """Route every site, or take residuals from outside."""
        for layer in self.layers.values():
            layer.routed = routed

    @contextmanager
    def replace_products(self, make: Callable[[Product | Table], nn.Module]) -> Iterator[None]:
        """Put an exporter's products into the layers, and the compiler's own back afterwards."""
        originals = {layer: layer.product for layer in self.layers.values()}
        try:
            for layer, product in originals.items():
                assert isinstance(product, (Product, Table))
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
            pieces = {f"{site.name}.residual": part for site, part in zip(self.sites, parts, strict=True)}
        output = torch.func.functional_call(self.model, pieces, (), dict(inputs))
        found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
        if self.pooling is not None:
            found[SENTENCE] = pool(found["last_hidden_state"], inputs["attention_mask"], self.pooling)
        return found


@dataclass(frozen=True)
class CompiledEncoder:
    """What an encoder's exporter packs.

    weights: every matrix by layer name, quantized or float32; reference: what to subtract from an expert
    (sum_H,); experts: stored full vectors; single: the one expert that was folded, or None; routing: None
    where the checkpoint has none; rounding: what was used.
    """

    checkpoint: EncoderCheckpoint = field(repr=False)
    module: EncoderModule = field(repr=False)
    weights: dict[str, Stored] = field(repr=False)
    reference: Tensor = field(repr=False)
    experts: dict[str, Tensor] = field(repr=False)
    options: CompileOptions
    single: str | None
    routing: RoutingConfig | None
    rounding: str

    @property
    def sites(self) -> SiteTable:
        """The adapted layers."""
        return self.checkpoint.sites

    @property
    def fingerprint(self) -> str:
        """Of the original backbone."""
        return self.checkpoint.backbone.fingerprint

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], vector: Tensor | None) -> dict[str, Tensor]:
        """The oracle: outputs for an expert's full vector p (sum_H,), or routed for None."""
        self.module.use_routing(vector is None)
        try:
            return self.module.compute(inputs, self.reference if vector is None else vector.float() - self.reference)
        finally:
            self.module.use_routing(False)

    def weight_hash(self) -> str:
        """sha256 over the canonical integers (or floats) and scales, as `CompiledModel.weight_hash`."""
        return self._weight_hash

    @cached_property
    def _weight_hash(self) -> str:
        digest = hashlib.sha256()
        for name, stored in sorted(self.weights.items()):
            digest.update(f"{name}.weight".encode())
            for part in (stored.codes, stored.scales) if isinstance(stored, QuantizedTensor) else (stored,):
                digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


@torch.no_grad()
def compile_encoder(
    checkpoint: EncoderCheckpoint,
    options: CompileOptions,
    calibration: EncoderCalibration | None = None,
    progress: Progress = lambda *_: None,
) -> CompiledEncoder:
    """Fold every site and quantize every matrix that the model multiplies by or looks up in.

    Args:
        calibration: what shows "gptq" the layers' inputs; without it int4 falls back to "search".
        progress: called with (step, done, total).
    Raises:
        LimeEdgeError: unknown expert in --fold, experts beyond float16.
    """
    adapter, backbone = checkpoint.adapter, checkpoint.backbone
    dtype = torch.float32 if options.quant == "none" else torch.float16
    experts = stored_experts(cast(Checkpoint, checkpoint), dtype)
    reference = fold_reference(adapter.variant, reference_vector(options.fold, experts))
    routing = adapter.routing_config if adapter.routing != "pinned" and not options.single else None
    model = copy.deepcopy(backbone.model)
    builder = _Builder(checkpoint, model, reference, experts, routing, options.fold if options.single else None)
    for index, name in enumerate(backbone.layers):
        progress("fold", index, len(backbone.layers))
        model.set_submodule(name, builder.build(name))
    progress("fold", len(backbone.layers), len(backbone.layers))
    module = EncoderModule(model.eval(), backbone.inputs, checkpoint.sites, backbone.pooling)
    rounding = options.rounding
    if rounding == "gptq" and (options.quant != "int4" or calibration is None):
        rounding = "search"
    residuals = {name: vector.float() - reference for name, vector in experts.items()}
    used = replace(options, rounding=rounding)
    weights = _quantize_layers(checkpoint, module, residuals, used, calibration, progress)
    kept = {options.fold: experts[options.fold]} if options.single else experts
    single = options.fold if options.single else None
    return CompiledEncoder(checkpoint, module, weights, reference, kept, options, single, routing, rounding)


@dataclass(frozen=True)
class _Builder:
    """Makes one compiled layer after another; `single` names the one expert, which needs no site parts."""

    checkpoint: EncoderCheckpoint
    model: nn.Module
    reference: Tensor
    experts: Mapping[str, Tensor]
    routing: RoutingConfig | None
    single: str | None

    def build(self, name: str) -> CompiledLayer:
        """The compiled layer of that module name: plain, or folded with its branch."""
        module = self.checkpoint.backbone.model.get_submodule(name)
        weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
        site = self.checkpoint.sites.find(name)
        if site is None:
            embedding = self.checkpoint.backbone.layers[name].embedding
            return CompiledLayer(Table(weight) if embedding else Product(weight, bias), None)
        if self.checkpoint.backbone.layers[name].embedding:
            return self._build_embedding(site, weight)
        return self._build_linear(site, weight, bias)

    def _build_linear(self, site: Site, weight: Tensor, bias: Tensor | None) -> CompiledLayer:
        adapter = self.checkpoint.adapter
        p_ref = self._cut(site, self.reference)
        folded = fold_linear(adapter.variant, adapter.sites[site.name].join(weight, bias), p_ref, adapter.scale)
        if self.single is not None:
            rows = folded.modulated_rows
            folded.weight[:rows] *= self._cut(site, self.experts[self.single].float())[:rows, None]
            return CompiledLayer(Product(folded.weight, folded.bias), None)
        if folded.branch_a is None or folded.branch_b is None:
            product = Product(folded.weight, None)
            return CompiledLayer(product, self._parts(site, None, None, folded.modulated_rows, folded.bias))
        a, b = self._stack_branches(site, folded.branch_b)
        return CompiledLayer(Product(folded.weight, folded.bias), self._parts(site, a, b, 0, None))

    def _build_embedding(self, site: Site, weight: Tensor) -> CompiledLayer:
        adapter = self.checkpoint.adapter
        tensors, p_ref = adapter.sites[site.name].join(weight), self._cut(site, self.reference)
        # in a single-expert model the padding id keeps its row; otherwise d = -p_ref gives that row back,
        # and its branch is whole, since routing's scale reads it
        pad = adapter.pad_token_id if self.single is not None else None
        folded = fold_embedding(adapter.variant, tensors, p_ref, adapter.scale, pad)
        columns = folded.modulated_columns
        if self.single is not None:
            kept = folded.table.clone()
            folded.table[:, :columns] *= self._cut(site, self.experts[self.single].float())[:columns]
            if pad is not None:
                folded.table[pad] = kept[pad]
            return CompiledLayer(Table(folded.table), None)
        b = None if folded.branch_b is None else folded.branch_b.t().contiguous()
        return CompiledLayer(Table(folded.table), self._parts(site, folded.branch_table, b, columns, None))

    def _stack_branches(self, site: Site, branch_b: Tensor) -> tuple[Tensor, Tensor]:
        """A of all sites that read this input, (D, R), so that it is computed once; B (R, H), zero for the others."""
        layers, sites = self.checkpoint.backbone.layers, self.checkpoint.adapter.sites
        members = [n for n, layer in layers.items() if layer.source == layers[site.name].source and n in sites]
        parts = [a for name in members if (a := sites[name].a) is not None]
        ranks = [len(part) for part in parts]
        start = sum(ranks[: members.index(site.name)])
        b = torch.zeros(sum(ranks), site.width)
        b[start : start + branch_b.shape[1]] = branch_b.t()
        return torch.cat(parts).t().contiguous(), b

    def _parts(self, site: Site, a: Tensor | None, b: Tensor | None, rows: int, bias: Tensor | None) -> SiteParts:
        bank = torch.stack([self._cut(site, vector.float()) for vector in self.experts.values()])
        adapter, p_ref = self.checkpoint.adapter, self._cut(site, self.reference)
        pad = adapter.pad_token_id if adapter.sites[site.name].embedding else None
        return SiteParts(adapter.variant, a, b, rows, bias, p_ref, bank - p_ref, self.routing, pad)

    @staticmethod
    def _cut(site: Site, flat: Tensor) -> Tensor:
        return flat[site.offset : site.offset + site.width].clone()


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


def name_kind(name: str, layer: Layer, shared: int) -> str:
    """Which of `rounding.KINDS` a layer is, by its place and shape.

    Args:
        name: module name; one without a number lies outside the repeated blocks: "head".
        shared: layers that read the same input, this one included.
    """
    if layer.embedding or not any(part.isdigit() for part in name.split(".")):
        return "head"
    if shared > 1 or "qkv" in name.lower():
        return "qkv"
    rows, columns = layer.shape
    return "o" if rows == columns else "gate_up" if rows > columns else "down"


def choose_bits(layers: Mapping[str, Layer], options: CompileOptions) -> dict[str, int]:
    """Layer name -> 4 or 8: int4 keeps `int8_kinds` and odd widths at int8. Empty for float32."""
    if options.quant == "none":
        return {}
    sources = [layer.source for layer in layers.values()]
    bits = {}
    for name, layer in layers.items():
        kind = name_kind(name, layer, sources.count(layer.source))
        low = options.quant == "int4" and kind not in options.int8_kinds
        bits[name] = group_for(layer.shape[1], 4 if low else 8, options.group)[0]
    return bits


def _quantize_layers(
    checkpoint: EncoderCheckpoint,
    module: EncoderModule,
    residuals: Mapping[str, Tensor],
    options: CompileOptions,
    calibration: EncoderCalibration | None,
    progress: Progress,
) -> dict[str, Stored]:
    """Put codes into every product and table of the float module; returns what they hold, by layer name."""
    layers, compiled = checkpoint.backbone.layers, module.layers
    bits = choose_bits(layers, options)
    if not bits:
        return {name: compiled[name].weight for name in layers}
    grams: dict[int, Tensor] = {}
    if options.rounding == "gptq" and calibration is not None:
        narrow = [name for name, count in bits.items() if count == 4 and not layers[name].embedding]
        wanted = {layers[name].source: name for name in narrow}
        grams = collect_encoder_grams(module, wanted, residuals, calibration, progress)
    weights: dict[str, Stored] = {}
    for index, (name, layer) in enumerate(layers.items()):
        progress("quantize", index, len(layers))
        product = compiled[name].product
        weight, gram = compiled[name].weight, grams.get(layer.source)
        if bits[name] == 4 and gram is not None and not layer.embedding:
            stored = round_by_gram(weight, gram, options.group)
        else:
            stored = quantize(weight, bits[name], options.group, search=options.rounding != "nearest")
        compiled[name].product = Table(stored) if layer.embedding else Product(stored, getattr(product, "bias", None))
        weights[name] = stored
    progress("quantize", len(layers), len(layers))
    return weights


def collect_encoder_grams(
    module: EncoderModule,
    wanted: Mapping[int, str],
    residuals: Mapping[str, Tensor],
    calibration: EncoderCalibration,
    progress: Progress,
) -> dict[int, Tensor]:
    """Run the float model over the samples, experts active; sum x x^T of the inputs wanted.

    Args:
        wanted: source -> name of one layer that reads it. residuals: d by expert.
    Returns:
        source -> (D, D) float32.
    """
    grams: dict[int, Tensor] = {}
    layers, names, hooks, turn = module.layers, list(residuals), [], 0

    def add(source: int, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        grams[source] = grams.get(source, torch.zeros(())) + flat.t() @ flat

    for source, name in wanted.items():
        hooks.append(layers[name].register_forward_pre_hook(lambda _, x, s=source: add(s, x[0])))
    for index, (tokens, expert) in enumerate(calibration.samples):
        progress("calibrate", index, len(calibration.samples))
        module.compute(feed_tokens(module.inputs, tokens), residuals[expert or names[turn % len(names)]])
        turn += expert is None
    progress("calibrate", len(calibration.samples), len(calibration.samples))
    for hook in hooks:
        hook.remove()
    return grams


def feed_tokens(inputs: tuple[Input, ...], tokens: Sequence[int]) -> dict[str, Tensor]:
    """One sequence as the model's inputs, the others at their defaults."""
    ids = torch.tensor([list(tokens)])
    make = {"": lambda: ids, "ones": lambda: torch.ones_like(ids), "zeros": lambda: torch.zeros_like(ids)}
    return {entry.name: make[entry.default]() for entry in inputs}
