"""The compiled model: folded and quantized weights, residual branches, experts. Plain data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch

from lime_edge.bundle.sites import Site, SiteTable
from lime_edge.compiler.formats.architecture import Decoder
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.maths.routing import RoutingConfig

EMBEDDING = "model.embed_tokens"


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


@dataclass(frozen=True)
class VirtualTokens:
    """Prompt tuning: V virtual tokens before the prompt, base + d * delta.

    base, delta: (V, H) float32, p_ref folded into base. original: base without it, which routing reads.
    conditioning: how routing reads the input (None: it does not); input_proj: (H, H) or None.
    """

    base: torch.Tensor
    delta: torch.Tensor
    original: torch.Tensor
    conditioning: str | None
    input_proj: torch.Tensor | None


@dataclass(frozen=True)
class CompiledModel:
    """What every exporter packs; `lime_edge.compiler.model.decoder.DecoderModule` runs it (the oracle).

    weights: matrices by tensor name, QuantizedTensor or float32; vectors: norms and biases, float32;
    branches: by site name, empty for a single-expert model; reference: p_ref (sum_H,) float32;
    experts: stored full vectors (sum_H,), already rounded to their storage dtype; routing: how the
    experts are weighed in routed mode, None where they are not.
    """

    decoder: Decoder
    weights: dict[str, QuantizedTensor | torch.Tensor] = field(repr=False)
    vectors: dict[str, torch.Tensor] = field(repr=False)
    branches: dict[str, Branch] = field(repr=False)
    sites: SiteTable = field(repr=False)
    reference: torch.Tensor = field(repr=False)
    experts: dict[str, torch.Tensor] = field(repr=False)
    fingerprint: str
    fold: str
    single: str | None
    quant: str
    group: int
    variant: str = "lora"
    routing: RoutingConfig | None = None
    virtual: VirtualTokens | None = None

    def weight(self, name: str) -> torch.Tensor:
        """A matrix as float32, dequantized where it is quantized."""
        stored = self.weights[name]
        return stored.dequantize() if isinstance(stored, QuantizedTensor) else stored

    @property
    def head_name(self) -> str:
        """The tensor that makes logits: the embedding table when tied and not quantized apart."""
        return "lm_head.weight" if "lm_head.weight" in self.weights else f"{EMBEDDING}.weight"

    @property
    def swaps(self) -> bool:
        """Whether there is anything an expert changes: not in a single-expert model."""
        return bool(self.branches) or (self.virtual is not None and self.single is None)

    @property
    def embedding_group(self) -> Group:
        """The token table as a group of one."""
        return Group((EMBEDDING,), (self.decoder.hidden,))

    def all_branches(self) -> list[GroupBranch]:
        """Every group's branch, in computation order; groups without one are left out."""
        groups = [self.embedding_group]
        for layer in range(len(self.decoder.layers)):
            groups.extend(self.groups(layer).values())
        branches = [self.group_branch(group) for group in groups]
        return [branch for branch in branches if branch is not None]

    def groups(self, layer: int) -> dict[str, Group]:
        """The four groups of a layer: qkv, o, gate_up, down."""
        names = self.decoder.linears(layer)
        by_kind = {name.rsplit(".", 1)[-1]: (name, shape[0]) for name, shape in names.items()}
        members = {
            "qkv": ("q_proj", "k_proj", "v_proj"),
            "o": ("o_proj",),
            "gate_up": ("gate_proj", "up_proj"),
            "down": ("down_proj",),
        }
        return {
            key: Group(tuple(by_kind[k][0] for k in kinds), tuple(by_kind[k][1] for k in kinds))
            for key, kinds in members.items()
        }

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

    def bank(self, site: Site) -> torch.Tensor:
        """Every expert's residual at a site, d_e = p_e - p_ref: (E, H) float32, in expert order."""
        stop = site.offset + site.width
        rows = [vector[site.offset : stop].float() for vector in self.experts.values()]
        return torch.stack(rows) - self.reference[site.offset : stop]

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
