"""The compiled model: folded and quantized weights, residual branches, experts. Plain data.

`Compiled` is what every kind of model has, `CompiledModel` a decoder language model; encoders are in `encoder`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch

from lime_edge.bundle.sites import Site, SiteTable
from lime_edge.compiler.formats.architecture import HEAD, PLACES, Decoder, list_layers
from lime_edge.compiler.formats.backbone import Layer
from lime_edge.compiler.maths.prompt_tuning import VirtualTokens
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.maths.variants import LORA, Variant

Stored = QuantizedTensor | torch.Tensor


@dataclass(frozen=True)
class Branch:
    """What the expert multiplies at one site.

    LoRA, LoRA-FA, DoRA: y += d * (B A x), with a (r, D), b (H, r) float32, scale inside b. On the
    embedding a is a table (V, r) that is looked up.
    SliceFine: a and b are None; the first `rows` rows of W'x are multiplied by d before the bias.
    """

    a: torch.Tensor | None
    b: torch.Tensor | None
    rows: int = 0

    def round_half(self) -> Branch:
        """A and B as float16 holds them, so that half of their bytes say it all; still float32 here.

        First a power of two moves from one to the other (exactly), so that both are equally far from float16's ends.
        """
        if self.a is None or self.b is None:
            return self
        largest = [max(float(matrix.abs().max()), 1e-30) for matrix in (self.a, self.b)]
        shift = 2.0 ** round(math.log2(largest[1] / largest[0]) / 2)
        a, b = (self.a * shift).half().float(), (self.b / shift).half().float()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return self  # an adapter out of all proportion stays as it is
        return replace(self, a=a, b=b)


@dataclass(frozen=True)
class Group:
    """Linears that share one input and are computed as one product (q, k, v; gate, up).

    names: module names in output order; widths: their output widths.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Output width of the whole group."""
        return sum(self.widths)


@dataclass(frozen=True)
class Part:
    """One member of a group: its site (None: not adapted), output width, SliceFine's rows, the branch's rank."""

    site: Site | None
    width: int
    rows: int
    rank: int

    @property
    def adapted(self) -> int:
        """How many of its outputs the expert multiplies: none, SliceFine's rows, or all."""
        return 0 if self.site is None else self.rows or self.width


@dataclass(frozen=True)
class GroupBranch:
    """The branches of a group as one: a (R, D) stacked, b (N, R) block-diagonal with zero rows between.

    a and b are None for SliceFine.
    """

    a: torch.Tensor | None
    b: torch.Tensor | None
    parts: tuple[Part, ...]

    @property
    def width(self) -> int:
        """Output width of the whole group."""
        return sum(part.width for part in self.parts)

    @property
    def gaps(self) -> bool:
        """Whether some outputs of the group are not the expert's."""
        return any(part.adapted != part.width for part in self.parts)

    def find_runs(self) -> list[tuple[int, int]]:
        """(offset, width) of the stretches of the flat residual that the group reads; one where there is no gap."""
        runs = [(part.site.offset, part.adapted) for part in self.parts if part.site is not None]
        return runs if self.gaps else [(runs[0][0], self.width)]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What every exporter packs, whatever the kind of model; a kind adds what runs it.

    weights: matrices by tensor name, QuantizedTensor or float32; vectors: norms and biases, float32;
    branches: by site name, empty for a single-expert model; reference: what to subtract from an expert (sum_H,)
    float32, p_ref or zeros; experts: stored full vectors (sum_H,), already rounded to their storage dtype;
    fingerprint: of the original backbone; single: the one expert that was folded, or None; routing: how the experts
    are weighed in routed mode, None where they are not; pad_token_id: an id that no adapted embedding touches.
    """

    weights: Mapping[str, Stored] = field(repr=False)
    vectors: Mapping[str, torch.Tensor] = field(repr=False)
    branches: Mapping[str, Branch] = field(repr=False)
    sites: SiteTable = field(repr=False)
    reference: torch.Tensor = field(repr=False)
    experts: Mapping[str, torch.Tensor] = field(repr=False)
    fingerprint: str
    fold: str
    single: str | None
    quant: str
    group: int
    variant: Variant = LORA
    routing: RoutingConfig | None = None
    pad_token_id: int | None = None

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The backbone's layers by module name, in computation order."""
        raise NotImplementedError

    @property
    def context(self) -> int:
        """Tokens that the model takes at most."""
        raise NotImplementedError

    @property
    def swaps(self) -> bool:
        """Whether there is anything an expert changes: not in a single-expert model."""
        return bool(self.branches)

    def common(self) -> dict[str, Any]:
        """The fields that every kind has, for the dataclass of one kind."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Compiled)}

    def weight(self, name: str) -> torch.Tensor:
        """A matrix as float32, dequantized where it is quantized."""
        return as_float(self.weights[name])

    def bank(self, site: Site) -> torch.Tensor:
        """Every expert's residual at a site, d_e = p_e - p_ref: (E, H) float32, in expert order."""
        rows = [cut(site, vector).float() for vector in self.experts.values()]
        return torch.stack(rows) - cut(site, self.reference)

    def weight_hash(self) -> str:
        """sha256 over the canonical integers (or floats) and scales: equal across targets."""
        return self._weight_hash

    @cached_property
    def _weight_hash(self) -> str:  # every target's manifest entry asks for it: hash the weights once
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            stored = self.weights[name]
            parts = (stored.codes, stored.scales) if isinstance(stored, QuantizedTensor) else (stored,)
            digest.update(name.encode())
            for part in parts:
                digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()


def as_float(stored: Stored) -> torch.Tensor:
    """A matrix as float32, dequantized where it is quantized."""
    return stored.dequantize() if isinstance(stored, QuantizedTensor) else stored


def cut(site: Site, flat: torch.Tensor) -> torch.Tensor:
    """A site's stretch (H,) of a flat vector (sum_H,)."""
    return flat[site.offset : site.offset + site.width]


@dataclass(frozen=True, kw_only=True)
class CompiledModel(Compiled):
    """A decoder language model; `lime_edge.compiler.model.decoder.DecoderModule` runs it (the oracle).

    virtual: prompt tuning's tokens before the prompt. header: the prompt's last tokens, from which on the experts act;
    the original model reads what lies before them. 0: the experts act always. image_tokens: ids whose rows may be
    replaced by features of pictures; none in a model of text alone.
    """

    decoder: Decoder
    image_tokens: tuple[int, ...] = ()
    virtual: VirtualTokens | None = None
    header: int = 0

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The token table and every linear layer but the head."""
        return list_layers(self.decoder)

    @property
    def context(self) -> int:
        """Tokens that the model takes at most."""
        return self.decoder.context

    @property
    def head_name(self) -> str:
        """The tensor that makes logits: the embedding table when tied and not quantized apart."""
        return f"{HEAD}.weight" if f"{HEAD}.weight" in self.weights else f"{self.decoder.embedding}.weight"

    @property
    def swaps(self) -> bool:
        """Whether there is anything an expert changes: not in a single-expert model."""
        return bool(self.branches) or (self.virtual is not None and self.single is None)

    @property
    def embedding_group(self) -> Group:
        """The token table as a group of one."""
        return Group((self.decoder.embedding,), (self.decoder.hidden,))

    def all_branches(self) -> list[GroupBranch]:
        """Every group's branch, in computation order; groups without one are left out."""
        groups = [self.embedding_group]
        for layer in range(len(self.decoder.layers)):
            groups.extend(self.groups(layer).values())
        branches = [self.group_branch(group) for group in groups]
        return [branch for branch in branches if branch is not None]

    def groups(self, layer: int) -> dict[str, Group]:
        """The four groups of a layer: qkv, o, gate_up, down."""
        members: dict[str, list[tuple[str, int]]] = {}
        for name, shape in self.decoder.linears(layer).items():
            place = PLACES[name.rsplit(".", 1)[-1].removesuffix("_proj")]
            members.setdefault(place, []).append((name, shape[0]))
        return {place: Group(*map(tuple, zip(*found, strict=True))) for place, found in members.items()}

    def group_branch(self, group: Group) -> GroupBranch | None:
        """The branches of a group's sites as one, or None when no member is a branching site."""
        members = [self.branches.get(name) for name in group.names]
        if all(branch is None for branch in members):
            return None
        ranks = [0 if branch is None or branch.b is None else branch.b.shape[1] for branch in members]
        parts = tuple(
            Part(self.sites.find(name) if branch else None, width, branch.rows if branch else 0, rank)
            for name, width, branch, rank in zip(group.names, group.widths, members, ranks, strict=True)
        )
        stacks = [branch.a for branch in members if branch is not None and branch.a is not None]
        if not stacks:
            return GroupBranch(None, None, parts)
        b = torch.zeros(group.width, sum(ranks))
        row = column = 0
        for width, branch in zip(group.widths, members, strict=True):
            if branch is not None and branch.b is not None:
                b[row : row + width, column : column + branch.b.shape[1]] = branch.b
                column += branch.b.shape[1]
            row += width
        return GroupBranch(torch.cat(stacks), b, parts)

    def group_bank(self, branch: GroupBranch) -> torch.Tensor:
        """The banks of a group's G sites on a diagonal: (G * E, N), zeros where no expert multiplies."""
        count, sites = len(self.experts), [part.site for part in branch.parts if part.site is not None]
        bank = torch.zeros(len(sites) * count, branch.width)
        row = column = 0
        for part in branch.parts:
            if part.site is not None:
                bank[row : row + count, column : column + part.adapted] = self.bank(part.site)[:, : part.adapted]
                row += count
            column += part.width
        return bank

    def group_bias(self, group: Group) -> torch.Tensor | None:
        """Biases of a group concatenated (zeros for members without), or None."""
        biases = [self.vectors.get(f"{name}.bias") for name in group.names]
        if all(bias is None for bias in biases):
            return None
        return torch.cat(
            [torch.zeros(width) if bias is None else bias for bias, width in zip(biases, group.widths, strict=True)]
        )
