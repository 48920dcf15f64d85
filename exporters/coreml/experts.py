"""What multiplies a branch in an ML program: a slice of the expert input, or routing weights made on the spot."""

from __future__ import annotations

import numpy as np

from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.model.compiled import CompiledModel, GroupBranch
from lime_edge.exporters.coreml.graph import Graph, Var, mb, scale

# compiler.routing guards two divisors, 1e-6 and 1e-9. Float16 holds the first; a sum of selected weights is never
# near the second, for the largest weight is always among them.
SMALLEST_SCALE = np.float16(1e-6)


class PinnedExperts:
    """One flat input (sum_H,), cut where a branch needs it."""

    def __init__(self, model: CompiledModel, graph: Graph):
        self.model, self.graph = model, graph
        self.expert: Var | None = None

    def begin(self, index: Var, real: Var, length: Var, expert: Var | None) -> None:
        """Take the inputs of the function that is written next."""
        self.expert = expert

    def multiply(self, branch: GroupBranch, y: Var, delta: Var, name: str) -> Var:
        """The group's multiplier (N,)."""
        if not branch.gaps:
            return self._cut(*branch.find_runs()[0])
        pieces = []
        for place, part in enumerate(branch.parts):
            if part.site is not None:
                pieces.append(self._cut(part.site.offset, part.adapted))
            if rest := part.width - part.adapted:
                fill = np.full(rest, 1.0 if branch.a is None else 0.0)
                pieces.append(self.graph.half(f"{name}.fill_{place}", fill))
        return pieces[0] if len(pieces) == 1 else mb.concat(values=pieces, axis=0)

    def _cut(self, offset: int, width: int) -> Var:
        if width == self.model.sites.total:
            return self.expert
        return mb.slice_by_index(x=self.expert, begin=[offset], end=[offset + width])


class RoutedExperts:
    """Zero-parameter routing of every group's sites together: (1, S, G, E) weights, then the bank.

    Padding moves neither scale nor windows: without windows it is zeroed before the maxima; with them every row
    takes the routing of its window's last real row, through a product with one-hot rows.
    """

    def __init__(self, model: CompiledModel, graph: Graph, config: RoutingConfig):
        self.model, self.graph, self.config = model, graph, config
        self.count = len(model.experts)
        self.expert = None
        self._real: Var | None = None
        self._anchors: Var | None = None

    def begin(self, index: Var, real: Var, length: Var, expert: Var | None) -> None:
        """Take the inputs of the function that is written next. index: (1, S) row numbers within the call."""
        self._real = mb.expand_dims(x=mb.cast(x=real, dtype="fp16"), axes=[2, 3], name="real_rows")
        if (n := self.config.n_gram) > 1:
            start = mb.mul(x=mb.floor_div(x=index, y=np.int32(n)), y=np.int32(n))
            last = mb.minimum(x=mb.add(x=start, y=np.int32(n - 1)), y=mb.sub(x=length, y=np.int32(1)))
            chosen = mb.equal(x=mb.expand_dims(x=last, axes=[2]), y=mb.expand_dims(x=index, axes=[1]))
            self._anchors = mb.cast(x=chosen, dtype="fp16", name="anchors")

    def multiply(self, branch: GroupBranch, y: Var, delta: Var, name: str) -> Var:
        """The group's multiplier per row, (1, S, N). y: before the residual (SliceFine: before the bias)."""
        weights = self._select(mb.softmax(x=self._logits(branch, y, delta, name), axis=-1))
        sites = sum(part.site is not None for part in branch.parts)
        weights = mb.reshape(x=weights, shape=[1, -1, sites * self.count])
        chosen = mb.linear(x=weights, weight=self.graph.half(f"{name}.bank", self.model.group_bank(branch).T))
        if branch.a is not None:
            return chosen
        ones = np.concatenate([(np.arange(part.width) >= part.adapted) for part in branch.parts])
        return mb.add(x=chosen, y=self.graph.half(f"{name}.ones", ones))

    def weigh(self, frozen: Var, adapted: Var, anchors: np.ndarray) -> Var:
        """Weights (1, V, E) of virtual tokens from their first E columns, (1, V, E) both, none of them padding."""
        if self.config.n_gram > 1:
            chosen = self.graph.half("prompt.anchors", np.eye(len(anchors))[anchors])
            frozen, adapted = mb.matmul(x=chosen, y=frozen), mb.matmul(x=chosen, y=adapted)
        share = self.config.gamma_routing
        wide = [mb.expand_dims(x=x, axes=[2]) for x in (frozen, adapted)]
        logits = mb.add(x=self._relative(wide[0], 1.0 - share), y=self._relative(wide[1], share))
        return mb.squeeze(x=self._select(mb.softmax(x=logits, axis=-1)), axes=[2])

    def _logits(self, branch: GroupBranch, y: Var, delta: Var, name: str) -> Var:
        """(1, S, G, E). Source: fold.recover_routing, routing.measure_logits."""
        frozen, share = self._leading(branch, y), self.config.gamma_routing
        if branch.a is None:
            return self._relative(self._anchor(frozen), 1.0)
        adapted = self._leading(branch, delta)
        if self.model.variant == "dora":
            frozen = mb.add(x=frozen, y=adapted)
        reference = self.graph.half(f"{name}.reference", self._references(branch))
        frozen = mb.sub(x=frozen, y=mb.mul(x=adapted, y=reference))
        first = self._relative(self._anchor(frozen), 1.0 - share)
        return mb.add(x=first, y=self._relative(self._anchor(adapted), share))

    def _leading(self, branch: GroupBranch, x: Var) -> Var:
        """The first E columns of every site of a group: (1, S, N) -> (1, S, G, E)."""
        pieces, row = [], 0
        for part in branch.parts:
            if part.site is not None:
                piece = mb.slice_by_index(
                    x=x,
                    begin=[0, 0, row],
                    end=[0, 0, row + self.count],
                    begin_mask=[True, True, False],
                    end_mask=[True, True, False],
                )
                pieces.append(mb.expand_dims(x=piece, axes=[2]))
            row += part.width
        return pieces[0] if len(pieces) == 1 else mb.concat(values=pieces, axis=2)

    def _anchor(self, x: Var) -> Var:
        """Rows that routing reads: (1, S, G, E), padding zeroed or replaced."""
        if self._anchors is None:
            return mb.mul(x=x, y=self._real)
        sites = x.shape[2]
        flat = mb.matmul(x=self._anchors, y=mb.reshape(x=x, shape=[1, -1, sites * self.count]))
        return mb.reshape(x=flat, shape=[1, -1, sites, self.count])

    def _relative(self, x: Var, share: float) -> Var:
        """share / T * x / max|x| per site over the whole call."""
        peak = mb.reduce_max(x=mb.abs(x=x), axes=[1, 3], keep_dims=True)
        scaled = mb.real_div(x=x, y=mb.maximum(x=peak, y=SMALLEST_SCALE))
        return scale(scaled, share / max(self.config.temperature, 1e-6))

    def _references(self, branch: GroupBranch) -> np.ndarray:
        """p_ref's first E values at every site: (1, 1, G, E)."""
        starts = [part.site.offset for part in branch.parts if part.site is not None]
        return np.stack([self.model.reference[start : start + self.count].numpy() for start in starts])[None, None]

    def _select(self, probs: Var) -> Var:
        """The configured selection over the last axis. Source: routing.select."""
        config = self.config
        if config.sparse_mode and config.auto_topk:
            values, places = mb.topk(x=probs, k=min(2 * config.top_k, self.count), axis=-1, ascending=False)
            kept = mb.cast(x=mb.greater_equal(x=values, y=self._threshold(values)), dtype="fp16")
            return scatter(probs, places, mb.mul(x=values, y=kept))
        if config.sparse_mode or not (config.auto_topk or config.soft_topk):
            values, places = mb.topk(x=probs, k=config.top_k, axis=-1, ascending=False)
            return scatter(probs, places, values)
        if config.auto_topk:
            return self._gate(probs, self._threshold(probs))
        values, _ = mb.topk(x=probs, k=config.top_k, axis=-1, ascending=False)
        return self._gate(probs, mb.reduce_min(x=values, axes=[-1], keep_dims=True))

    def _threshold(self, values: Var) -> Var:
        """theta * the largest."""
        top = mb.reduce_max(x=values, axes=[-1], keep_dims=True)
        return scale(top, self.config.auto_topk_threshold)

    def _gate(self, probs: Var, threshold: Var) -> Var:
        """w sigmoid((w - threshold) / temperature), renormalised."""
        above = scale(mb.sub(x=probs, y=threshold), 1.0 / self.config.soft_topk_temperature)
        return renormalise(mb.mul(x=probs, y=mb.sigmoid(x=above)))


def renormalise(values: Var) -> Var:
    """Divided by their sum over the last axis."""
    return mb.real_div(x=values, y=mb.reduce_sum(x=values, axes=[-1], keep_dims=True))


def scatter(probs: Var, places: Var, values: Var) -> Var:
    """Values renormalised, at their places on the last axis; zeros elsewhere."""
    zeros = mb.sub(x=probs, y=probs)
    return mb.scatter_along_axis(data=zeros, indices=places, updates=renormalise(values), axis=-1, mode="update")
