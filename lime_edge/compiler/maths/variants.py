"""The variants of the shared adapter, one object each: what differs between them is here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lime_edge.bundle.experts import ALWAYS_ON
from lime_edge.compiler.maths import fold, unfolded
from lime_edge.compiler.maths.fold import FoldedEmbedding, FoldedLinear
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.errors import Faults, LimeEdgeError

Unfold = Callable[[Mapping[str, Tensor], Tensor, float], unfolded.Parts]


@dataclass(frozen=True)
class LinearForm:
    """A variant on linear layers. unfold: the authors' computation; fold: p_ref into the weight."""

    unfold: Unfold
    fold: Callable[[Mapping[str, Tensor], Tensor, float], FoldedLinear]


@dataclass(frozen=True)
class TableForm:
    """A variant on embedding tables. tall_b: B has a row per id, (V, r), instead of one per output, (H, r)."""

    unfold: Unfold
    fold: Callable[[Mapping[str, Tensor], Tensor, float, int | None], FoldedEmbedding]
    tall_b: bool = True


@dataclass(frozen=True)
class Variant:
    """One way in which a shared adapter and its experts change a model.

    Attributes:
        name: as in adapter_config.json.
        parts: a site's tensors besides the experts, named as in the file.
        linear, table: what it does to layers; None for prompt tuning, which adds tokens instead.
        folds: p_ref goes into the weights. Where it does not (SliceFine) the expert multiplies what is there.
        neutral: the run-time vector's value that changes nothing: 0 where it is added, 1 where it multiplies.
        routing_reads: operands of the routing: the output and delta (2), or the output alone (1).
        routing_keeps: the share of delta that the first operand holds: DoRA routes on h + delta.
        windows: routing obeys n_gram. defaults: routing hyper-parameters that differ from the reference's usual ones.
    """

    name: str
    parts: tuple[str, ...]
    linear: LinearForm | None
    table: TableForm | None
    folds: bool = True
    neutral: float = 0.0
    routing_reads: int = 2
    routing_keeps: float = 0.0
    windows: bool = True
    defaults: tuple[tuple[str, object], ...] = ()

    @property
    def adapts_layers(self) -> bool:
        """Whether its sites are layers of the model; prompt tuning's is the prompt."""
        return self.linear is not None

    @property
    def switches_off(self) -> bool:
        """Whether an expert vector, p = 0, gives the original model. Said once, in `bundle.experts`."""
        return self.name not in ALWAYS_ON

    @property
    def tensors(self) -> tuple[str, ...]:
        """What folding takes: the site's parts and the frozen weight, or what SliceFine leaves of it."""
        return ("weight", *self.parts) if "part_T" not in self.parts else (*self.parts, "part_F")

    def require_off(self) -> None:
        """Refuse to switch off what cannot be.

        Raises:
            LimeEdgeError: no expert vector gives the original layer.
        """
        if not self.switches_off:
            raise LimeEdgeError(
                f"a {self.name} adapter cannot be switched off: no expert vector gives the original layer",
                "pin an expert, or use the original model",
            )

    def reference_of(self, p_ref: Tensor) -> Tensor:
        """The vector to subtract from p at run time, (H,): p_ref, and zero where nothing folds."""
        return p_ref if self.folds else torch.zeros_like(p_ref)

    def original_of(self, p_ref: Tensor) -> Tensor:
        """The residual (H,) that gives the original backbone back: d = -p_ref, since p = 0.

        Raises:
            LimeEdgeError: see `require_off`.
        """
        self.require_off()
        return -p_ref

    def find_form(self, embedding: bool) -> LinearForm | TableForm:
        """What the variant does to a layer.

        Raises:
            LimeEdgeError: it adapts no layers.
        """
        form = self.table if embedding else self.linear
        if form is None:
            raise LimeEdgeError(
                f"variant: expected one of {', '.join(LAYER_VARIANTS)}, found {self.name!r}", "it adapts no layers"
            )
        return form

    def fold_linear(self, tensors: Mapping[str, Tensor], p_ref: Tensor, scale: float) -> FoldedLinear:
        """Fold p_ref times the shared adapter into a linear layer's weight.

        Args:
            tensors: see `fold`: `weight` (H, D) and the variant's parts, `bias` (H,) where the layer has one. Any
                float dtype.
            p_ref: (H,), the reference vector, gamma p_shared included; not read where nothing folds.
            scale: s = alpha / r.
        Raises:
            LimeEdgeError: missing tensors or wrong shapes, all at once.
        """
        form = self.find_form(embedding=False)
        assert isinstance(form, LinearForm)
        given = {name: tensor.detach().double() for name, tensor in tensors.items()}
        self._check_names(given)
        self._check_shapes(given, p_ref, *self._shapes_of_linear(given))
        return form.fold(given, p_ref.detach().double(), scale)

    def fold_embedding(
        self, tensors: Mapping[str, Tensor], p_ref: Tensor, scale: float, pad_token_id: int | None = None
    ) -> FoldedEmbedding:
        """Fold p_ref times the shared adapter into an embedding table.

        Args:
            tensors: see `fold`: `weight` (V, H) and the variant's parts. Any float dtype.
            p_ref, scale: as `fold_linear`. pad_token_id: an id that no expert touches, or None.
        Raises:
            LimeEdgeError: as `fold_linear`.
        """
        form = self.find_form(embedding=True)
        assert isinstance(form, TableForm)
        given = {name: tensor.detach().double() for name, tensor in tensors.items()}
        self._check_names(given)
        self._check_shapes(given, p_ref, *self._shapes_of_table(given, form))
        return form.fold(given, p_ref.detach().double(), scale, pad_token_id)

    def recover_routing(
        self, folded_output: Tensor, delta: Tensor, p_ref: Tensor, experts: int
    ) -> tuple[Tensor, Tensor | None]:
        """The two operands of `routing.route`, from what a folded site has at hand.

        Args:
            folded_output: (B, T, H), W'x + b' (or table'[id]) before the residual is added; SliceFine:
                W'x before scale and bias.
            delta: (B, T, H), the branch: branch_b branch_a x, DoRA's n included. SliceFine: not read.
            p_ref: (H,), the folded reference vector. SliceFine: not read.
            experts: E.
        Returns:
            frozen (B, T, E) and delta (B, T, E); for SliceFine the latter is None.
        Source: docs/folding.md, "Routing on a folded layer".
        """
        frozen = folded_output[..., :experts]
        if self.routing_reads == 1:
            return frozen, None
        adapted = delta[..., :experts]
        return frozen + (self.routing_keeps - p_ref[:experts]) * adapted, adapted

    def read_routing(self, hyper: Mapping[str, object]) -> RoutingConfig:
        """The routing that the variant really applies.

        Args:
            hyper: hyper-parameters, keys as in the reference.
        Raises:
            LimeEdgeError: a value out of range.
        Source: conformance README, "LoRA ignores n_gram"; prompt tuning's default sparse_mode:
            Kowsher/LiME at 82f981f.
        """
        values = {**dict(self.defaults), **hyper}
        return RoutingConfig.from_mapping(values if self.windows else {**values, "n_gram": 1})

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        missing = [name for name in self.tensors if name not in tensors]
        if missing:
            raise LimeEdgeError(
                f"{self.name} site: expected tensors {', '.join(self.tensors)}, found "
                f"{', '.join(sorted(tensors))} (missing: {', '.join(missing)})"
            )

    def _shapes_of_linear(self, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, tuple[int, ...]]]:
        """H, and what every tensor must measure."""
        if not self.folds:
            (rank, width), rest = tensors["part_T"].shape, len(tensors["part_F"])
            return rank + rest, {"part_F": (rest, width)}
        (height, width), rank = tensors["weight"].shape, len(tensors["A"])
        return height, {"A": (rank, width), "B": (height, rank), "m": (height,)}

    def _shapes_of_table(
        self, tensors: Mapping[str, Tensor], form: TableForm
    ) -> tuple[int, dict[str, tuple[int, ...]]]:
        if not self.folds:
            (words, rank), rest = tensors["part_T"].shape, tensors["part_F"].shape[1]
            return rank + rest, {"part_F": (words, rest)}
        (words, width), rank = tensors["weight"].shape, len(tensors["A"])
        return width, {"A": (rank, width), "B": (words if form.tall_b else width, rank), "m": (width,)}

    def _check_shapes(
        self, tensors: Mapping[str, Tensor], p_ref: Tensor, height: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        present = {**tensors, "p_ref": p_ref}
        with Faults(f"{self.name} site of {height} outputs") as faults:
            for name, shape in {**shapes, "bias": (height,), "p_ref": (height,)}.items():
                if name in present and tuple(present[name].shape) != shape:
                    faults.add(name, shape, tuple(present[name].shape))


LORA = Variant(
    "lora",
    ("A", "B"),
    LinearForm(unfolded.make_lora, fold.fold_lora),
    TableForm(unfolded.embed_lora, fold.fold_lora_table, tall_b=False),
    windows=False,
)
LORA_FA = Variant(
    "lora_fa",
    ("A", "B"),
    LinearForm(unfolded.make_lora, fold.fold_lora),
    TableForm(unfolded.embed_lora_fa, fold.fold_lora_fa_table),
)
DORA = Variant(
    "dora",
    ("A", "B", "m"),
    LinearForm(unfolded.make_dora, fold.fold_dora),
    TableForm(unfolded.embed_dora, fold.fold_dora_table),
    routing_keeps=1.0,
)
SLICEFINE = Variant(
    "slicefine",
    ("part_T",),
    LinearForm(unfolded.make_slicefine, fold.fold_slicefine),
    TableForm(unfolded.embed_slicefine, fold.fold_slicefine_table),
    folds=False,
    neutral=1.0,
    routing_reads=1,
)
PROMPT_TUNING = Variant("prompt_tuning", ("prompt_base", "prompt_delta"), None, None, defaults=(("sparse_mode", True),))
VARIANTS = {variant.name: variant for variant in (LORA, LORA_FA, DORA, SLICEFINE, PROMPT_TUNING)}
LAYER_VARIANTS = tuple(name for name, variant in VARIANTS.items() if variant.adapts_layers)


def find_variant(name: object) -> Variant:
    """The variant of that name.

    Raises:
        LimeEdgeError: unknown.
    """
    if name not in VARIANTS:
        raise LimeEdgeError(
            f"variant: expected one of {', '.join(VARIANTS)}, found {name!r}", "check `variant` in the hyper-parameters"
        )
    return VARIANTS[str(name)]
