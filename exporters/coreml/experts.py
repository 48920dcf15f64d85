"""What multiplies a branch in an ML program: a slice of the expert input, or routing weights made on the spot."""

from __future__ import annotations

import numpy as np

from lime_edge.compiler.maths.routing import RoutingConfig, plan_routing, weigh
from lime_edge.compiler.model.compiled import CompiledModel, GroupBranch
from lime_edge.exporters.coreml.graph import Graph, Var, mb
from lime_edge.exporters.coreml.routing import ProgramOperations


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
        self.plan = plan_routing(config, self.count, model.variant.routing_reads)
        self.expert = None
        self._operations = ProgramOperations(None, None)

    def begin(self, index: Var, real: Var, length: Var, expert: Var | None) -> None:
        """Take the inputs of the function that is written next. index: (1, S) row numbers within the call."""
        rows = mb.expand_dims(x=mb.cast(x=real, dtype="fp16"), axes=[2, 3], name="real_rows")
        anchors = None
        if (n := self.plan.window) > 1:
            start = mb.mul(x=mb.floor_div(x=index, y=np.int32(n)), y=np.int32(n))
            last = mb.minimum(x=mb.add(x=start, y=np.int32(n - 1)), y=mb.sub(x=length, y=np.int32(1)))
            chosen = mb.equal(x=mb.expand_dims(x=last, axes=[2]), y=mb.expand_dims(x=index, axes=[1]))
            anchors = mb.cast(x=chosen, dtype="fp16", name="anchors")
        self._operations = ProgramOperations(rows, anchors)

    def multiply(self, branch: GroupBranch, y: Var, delta: Var, name: str) -> Var:
        """The group's multiplier per row, (1, S, N). y: before the residual (SliceFine: before the bias)."""
        weights = weigh(self.plan, self._operations, self._read(branch, y, delta, name))
        sites = sum(part.site is not None for part in branch.parts)
        weights = mb.reshape(x=weights, shape=[1, -1, sites * self.count])
        chosen = mb.linear(x=weights, weight=self.graph.half(f"{name}.bank", self.model.group_bank(branch).T))
        if branch.a is not None:
            return chosen
        ones = np.concatenate([(np.arange(part.width) >= part.adapted) for part in branch.parts])
        return mb.add(x=chosen, y=self.graph.half(f"{name}.ones", ones))

    def weigh(self, frozen: Var, adapted: Var, anchors: np.ndarray) -> Var:
        """Weights (1, V, E) of virtual tokens from their first E columns, (1, V, E) both, none of them padding."""
        reads = [frozen, adapted]
        if self.plan.window > 1:
            chosen = self.graph.half("prompt.anchors", np.eye(len(anchors))[anchors])
            reads = [mb.matmul(x=chosen, y=x) for x in reads]
        wide = [mb.expand_dims(x=x, axes=[2]) for x in reads]
        return mb.squeeze(x=weigh(self.plan, ProgramOperations(None, None), wide), axes=[2])

    def _read(self, branch: GroupBranch, y: Var, delta: Var, name: str) -> list[Var]:
        """What routing reads, (1, S, G, E) each. Source: fold.recover_routing."""
        frozen = self._leading(branch, y)
        if branch.a is None:
            return [frozen]
        adapted = self._leading(branch, delta)
        if self.model.variant.routing_keeps:
            frozen = mb.add(x=frozen, y=adapted)
        reference = self.graph.half(f"{name}.reference", self._references(branch))
        return [mb.sub(x=frozen, y=mb.mul(x=adapted, y=reference)), adapted]

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

    def _references(self, branch: GroupBranch) -> np.ndarray:
        """p_ref's first E values at every site: (1, 1, G, E)."""
        starts = [part.site.offset for part in branch.parts if part.site is not None]
        return np.stack([self.model.reference[start : start + self.count].numpy() for start in starts])[None, None]
