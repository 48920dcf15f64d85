"""A CompiledModel's decoder as one function of an ML program: prompt and decode, the cache as state.

What a static program needs beside the oracle: positions are an input, so that prompt lengths can be enumerated;
the cache is written by a product with one-hot rows (nothing scatters); rows after `length` are padding, which
no real row sees and nothing stores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lime_edge.compiler.formats.architecture import Decoder
from lime_edge.compiler.maths.block import HeadNorm, Place, Source, run_block
from lime_edge.compiler.model.compiled import CompiledModel, Group
from lime_edge.exporters.coreml.experts import PinnedExperts, RoutedExperts
from lime_edge.exporters.coreml.graph import Graph, Var, mb, scale, spell
from lime_edge.exporters.coreml.prompt import select_virtual

UNSEEN = -30000.0  # added to a score that a row must not see; float16 holds it, and exp of it is 0
SMALLEST_PEAK = 2.0**-10  # guard of the norm's scale: eps / peak^2 stays far below float16's limit
Activation = Callable[[Var], Var]
ACTIVATIONS: dict[str, Activation] = {
    "silu": lambda x: mb.silu(x=x),
    "gelu": lambda x: mb.gelu(x=x, mode="EXACT"),
    "gelu_pytorch_tanh": lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
    "relu2": lambda x: mb.square(x=mb.relu(x=x)),
}


@dataclass(frozen=True)
class Frame:
    """What every layer of one call shares.

    ids, position, length: the inputs. rows: (1, S) position of every row. real: (1, S) bool, not padding.
    write: (1, 1, S, L) float16, the cache row that each real row goes to. keep: (1, 1, L, 1), 1 where none does.
    tables: of every rotation, cos and sin (1, 1, S, pairs). masks: by window, (1, 1, S, L), added to scores.
    """

    ids: Var
    index: Var
    length: Var
    real: Var
    write: Var
    keep: Var
    tables: list[tuple[Var, Var]]
    masks: dict[int | None, Var]


class DecoderWriter:
    """Writes one function of a decoder.

    Args:
        model: compiled, its tensors as they are stored (coreml.store_as_half). experts: what multiplies the branches.
        capacity: L, rows of the cache. longest: the longest enumerated prompt.
    """

    def __init__(
        self,
        model: CompiledModel,
        graph: Graph,
        experts: PinnedExperts | RoutedExperts | None,
        capacity: int,
        longest: int,
    ):
        self.model, self.graph, self.config, self.experts = model, graph, model.decoder, experts
        self.capacity, self.longest = capacity, longest

    def write(self, ids: Var, position: Var, length: Var, expert: Var | None, states: list[Var]) -> Var:
        """The whole model: logits (1, S, V) of every row.

        Args:
            states: keys and values of each layer in turn, (1, kv_heads, L, D).
        """
        frame = self._frame(ids, position, length)
        if self.experts is not None:
            self.experts.begin(frame.index, frame.real, length, expert)
        x = self._embed(frame)
        for index in range(len(self.config.layers)):
            x = run_block(self.config.block, LayerWriter(self, index, frame, states[2 * index : 2 * index + 2]), x)
        logits = mb.linear(x=self.norm(self.config.norm, x), weight=self._weight([self.model.head_name]), name="head")
        return logits if self.config.logit_cap is None else cap(logits, self.config.logit_cap)

    def _frame(self, ids: Var, position: Var, length: Var) -> Frame:
        c = self.config
        ones = mb.add(x=mb.mul(x=ids, y=np.int32(0)), y=np.int32(1))
        index = mb.sub(x=mb.cumsum(x=ones, axis=1), y=np.int32(1), name="row_index")
        rows = mb.add(x=index, y=position, name="row_position")
        real = mb.less(x=index, y=length, name="row_is_real")
        slots = self.graph.constant("slots", np.arange(self.capacity, dtype=np.int32).reshape(1, 1, 1, -1))
        column = mb.expand_dims(x=rows, axes=[1, 3])
        written = mb.logical_and(x=mb.equal(x=slots, y=column), y=mb.expand_dims(x=real, axes=[1, 3]))
        write = mb.cast(x=written, dtype="fp16", name="cache_write")
        touched = mb.reduce_sum(x=mb.transpose(x=write, perm=[0, 1, 3, 2]), axes=[-1], keep_dims=True)
        keep = mb.sub(x=np.float16(1), y=touched, name="cache_keep")
        tables = [self._rotation(rows, which) for which in range(len(c.rotations))]
        behind = mb.sub(x=column, y=slots, name="slots_behind")
        windows = {layer.window for layer in c.layers}
        masks = {window: self._mask(behind, window) for window in sorted(windows, key=lambda w: w or 0)}
        return Frame(ids, index, length, real, write, keep, tables, masks)

    def _rotation(self, rows: Var, which: int) -> tuple[Var, Var]:
        """cos and sin (1, 1, S, pairs) of every row; the tables are float32, and rounded after the lookup."""
        found, mark = [], f"_{which}" if which else ""
        tables = self.config.rope_tables(self.capacity + self.longest, which)
        for kind, table in zip(("cos", "sin"), tables, strict=True):
            values = mb.gather(x=self.graph.constant(f"{kind}_table{mark}", table.numpy()), indices=rows, axis=0)
            found.append(mb.expand_dims(x=mb.cast(x=values, dtype="fp16"), axes=[1], name=f"rope_{kind}{mark}"))
        return found[0], found[1]

    def _mask(self, behind: Var, window: int | None) -> Var:
        """(1, 1, S, L): 0 where a row may see a slot, UNSEEN elsewhere. Source: decoder.causal_mask."""
        hidden = mb.less(x=behind, y=np.int32(0))
        if window is not None:
            hidden = mb.logical_or(x=hidden, y=mb.greater_equal(x=behind, y=np.int32(window)))
        name = f"mask_{'all' if window is None else window}"
        return mb.mul(x=mb.cast(x=hidden, dtype="fp16"), y=np.float16(UNSEEN), name=name)

    def _embed(self, frame: Frame) -> Var:
        """Token embeddings, with what the expert does to them (see decoder.Embedding, decoder.Prefix)."""
        model, ids = self.model, frame.ids
        if model.virtual is not None:
            ids = mb.minimum(x=ids, y=np.int32(self.config.vocab - 1))
        x = mb.gather(x=self._weight([f"{self.config.embedding}.weight"]), indices=ids, axis=0, name="embeddings")
        if model.virtual is not None:
            routed = self.experts if isinstance(self.experts, RoutedExperts) else None
            expert = None if self.experts is None else self.experts.expert
            return select_virtual(model, self.graph, x, frame.ids, frame.index, frame.length, expert, routed)
        branch = model.group_branch(model.embedding_group)
        if branch is None or self.experts is None:
            return x
        if branch.a is None or branch.b is None:
            return mb.mul(x=x, y=self.experts.multiply(branch, x, x, "embed"))
        rows = mb.gather(x=self.graph.half(f"{self.config.embedding}.lime_a", branch.a), indices=ids, axis=0)
        delta = mb.linear(x=rows, weight=self.graph.half(f"{self.config.embedding}.lime_b", branch.b))
        return mb.add(x=x, y=mb.mul(x=delta, y=self.experts.multiply(branch, x, delta, "embed")))

    def norm(self, name: str, x: Var) -> Var:
        """A norm of the residual stream."""
        vectors = self.model.vectors
        y = normalise(x, self.graph.half(f"{name}.weight", vectors[f"{name}.weight"]), self.config, [-1])
        return (
            mb.add(x=y, y=self.graph.half(f"{name}.bias", vectors[f"{name}.bias"])) if f"{name}.bias" in vectors else y
        )

    def feed(self, index: int, x: Var) -> Var:
        """The MLP."""
        prefix, groups = self.config.prefix(index), self.model.groups(index)
        act, group = ACTIVATIONS[self.config.block.activation], groups["gate_up"]
        if self.config.block.gated:
            gate, up = self._gate_up(group, x, prefix)
            gated = mb.mul(x=act(gate), y=up)
        else:
            gated = act(self.project(group, x, f"{prefix}up"))
        return self.project(groups["down"], gated, f"{prefix}down")

    def _gate_up(self, group: Group, x: Var, prefix: str) -> list[Var]:
        if self.model.group_branch(group) is not None or len(group.names) == 1:
            return mb.split(x=self.project(group, x, f"{prefix}gate_up"), num_splits=2, axis=-1)
        alone = [Group((name,), (width,)) for name, width in zip(group.names, group.widths, strict=True)]
        return [self.project(one, x, f"{prefix}{one.names[0].rsplit('.', 1)[-1]}") for one in alone]

    def attend(self, index: int, qkv: Var, frame: Frame, states: list[Var]) -> Var:
        """Causal grouped-query attention over the cache: (1, S, N) -> (1, S, heads * D).

        The heads that share keys are rows of one product, so that no key is repeated.
        """
        c, plan, rotation = self.config, self.config.block, self.config.rotation_of(index)
        heads = mb.reshape(x=qkv, shape=[1, -1, c.heads + 2 * c.kv_heads, c.head_dim])
        heads = mb.transpose(x=heads, perm=[0, 2, 1, 3])
        turned, value = mb.split(x=heads, split_sizes=[c.heads + c.kv_heads, c.kv_heads], axis=1)
        if plan.head_norm is not None and not plan.head_norm.rotated:
            turned = self._norm_heads(index, turned, plan.head_norm)
        if rotation is not None:
            turned = rotate(turned, *frame.tables[rotation], c.head_dim, plan.interleaved)
        if plan.head_norm is not None and plan.head_norm.rotated:
            turned = self._norm_heads(index, turned, plan.head_norm)
        query, key = mb.split(x=turned, split_sizes=[c.heads, c.kv_heads], axis=1)
        query = scale(query, c.head_dim**-0.5)
        keys, values = (self._store(state, new, frame) for state, new in zip(states, (key, value), strict=True))
        query = mb.reshape(x=query, shape=[1, c.kv_heads, -1, c.head_dim])
        scores = mb.reshape(x=mb.matmul(x=query, y=keys, transpose_y=True), shape=[1, c.heads, -1, self.capacity])
        if plan.cap is not None:
            scores = cap(scores, plan.cap)
        shares = mb.softmax(x=mb.add(x=scores, y=frame.masks[c.layers[index].window]), axis=-1)
        shares = mb.reshape(x=shares, shape=[1, c.kv_heads, -1, self.capacity])
        out = mb.reshape(x=mb.matmul(x=shares, y=values), shape=[1, c.heads, -1, c.head_dim])
        return mb.reshape(x=mb.transpose(x=out, perm=[0, 2, 1, 3]), shape=[1, -1, c.heads * c.head_dim])

    def _store(self, state: Var, new: Var, frame: Frame) -> Var:
        """Put the real rows into the cache, (1, kv_heads, L, D), and give all of it."""
        kept = mb.mul(x=mb.read_state(input=state), y=frame.keep)
        added = mb.matmul(x=frame.write, y=new, transpose_x=True)
        return mb.coreml_update_state(state=state, value=mb.add(x=kept, y=added))

    def _norm_heads(self, index: int, x: Var, norm: HeadNorm) -> Var:
        """The norm on the heads of query and key together, (1, heads + kv_heads, S, D). Source: decoder.HeadNorm."""
        c, prefix = self.config, self.config.prefix(index) + "self_attn"
        counts = {norm.query: c.heads, norm.key: c.kv_heads}
        vectors = [(self.model.vectors[f"{prefix}.{name}.weight"].numpy(), count) for name, count in counts.items()]
        rows = [np.tile(v, (count, 1)) if norm.width == "head" else v.reshape(count, -1) for v, count in vectors]
        weight = self.graph.half(f"{prefix}.qk_norm.weight", np.concatenate(rows)[None, :, None])
        if norm.width != "all":
            return normalise(x, weight, c, [-1])
        parts = mb.split(x=x, split_sizes=[c.heads, c.kv_heads], axis=1)
        ones = self.graph.half("one", np.ones(1))
        return mb.mul(x=mb.concat(values=[normalise(part, ones, c, [1, 3]) for part in parts], axis=1), y=weight)

    def project(self, group: Group, x: Var, name: str) -> Var:
        """A group of linears on one input, with what the expert does to them (see decoder.Projection)."""
        weight, bias = self._weight([f"{part}.weight" for part in group.names]), self.model.group_bias(group)
        added = None if bias is None else self.graph.half(f"{name}.bias", bias)
        branch = self.model.group_branch(group)
        if branch is None or self.experts is None:
            return mb.linear(x=x, weight=weight, bias=added, name=spell(name))
        if branch.a is None or branch.b is None:
            y = mb.linear(x=x, weight=weight, name=spell(name))
            y = mb.mul(x=y, y=self.experts.multiply(branch, y, y, name))
            return y if added is None else mb.add(x=y, y=added)
        y = mb.linear(x=x, weight=weight, bias=added, name=spell(name))
        delta = mb.linear(x=x, weight=self.graph.half(f"{name}.lime_a", branch.a))
        delta = mb.linear(x=delta, weight=self.graph.half(f"{name}.lime_b", branch.b))
        return mb.add(x=y, y=mb.mul(x=delta, y=self.experts.multiply(branch, y, delta, name)))

    def _weight(self, names: list[str]) -> Var:
        return self.graph.matrix("+".join(names), [self.model.weights[name] for name in names])


def normalise(x: Var, weight: Var, config: Decoder, axes: list[int]) -> Var:
    """RMSNorm or LayerNorm over some axes, without the bias. Its means are taken of values divided by the largest, so
    that no square overflows: 1 / rms(x) = 1 / (peak sqrt(mean((x / peak)^2) + eps / peak^2)).
    """
    peak = mb.reduce_max(x=mb.abs(x=x), axes=axes, keep_dims=True)
    peak = mb.maximum(x=peak, y=np.float16(SMALLEST_PEAK))
    y = mb.real_div(x=x, y=peak)
    root = mb.real_div(x=np.float16(config.norm_eps**0.5), y=peak)
    if config.block.norm == "layer":
        y = mb.sub(x=y, y=mb.reduce_mean(x=y, axes=axes, keep_dims=True))
    mean = mb.add(x=mb.reduce_mean(x=mb.mul(x=y, y=y), axes=axes, keep_dims=True), y=mb.mul(x=root, y=root))
    if config.block.norm == "layer":
        return mb.mul(x=mb.mul(x=y, y=mb.rsqrt(x=mean, epsilon=np.float16(0))), y=weight)
    inverse = mb.real_div(x=mb.rsqrt(x=mean, epsilon=np.float16(0)), y=peak)
    return mb.mul(x=mb.mul(x=x, y=inverse), y=weight)


def cap(x: Var, limit: float) -> Var:
    """limit * tanh(x / limit). Source: decoder.cap."""
    return scale(mb.tanh(x=scale(x, 1.0 / limit)), limit)


def rotate(x: Var, cos: Var, sin: Var, width: int, interleaved: bool) -> Var:
    """Rotate every head's first elements, as many as the tables say: (1, N, S, D). Source: decoder.rotate.

    Args:
        width: D.
    """
    pairs = cos.shape[-1]
    turned, rest = x, None
    if 2 * pairs < width:
        turned, rest = mb.split(x=x, split_sizes=[2 * pairs, width - 2 * pairs], axis=-1)
    if interleaved:  # neighbours as an axis of their own, and that axis cut
        shape = mb.reshape(x=turned, shape=[1, x.shape[1], -1, pairs, 2])
        first, second = (mb.squeeze(x=one, axes=[-1]) for one in mb.split(x=shape, num_splits=2, axis=-1))
    else:
        first, second = mb.split(x=turned, num_splits=2, axis=-1)
    left = mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin))
    right = mb.add(x=mb.mul(x=second, y=cos), y=mb.mul(x=first, y=sin))
    if interleaved:
        turned = mb.reshape(x=mb.stack(values=[left, right], axis=-1), shape=[1, x.shape[1], -1, 2 * pairs])
        return turned if rest is None else mb.concat(values=[turned, rest], axis=-1)
    return mb.concat(values=[left, right] if rest is None else [left, right, rest], axis=-1)


@dataclass(frozen=True)
class LayerWriter:
    """The operations of a layer's plan as those of an ML program (`maths.block.Operations`).

    states: keys and values of the layer.
    """

    writer: DecoderWriter
    index: int
    frame: Frame
    states: list[Var]

    def read(self, place: Place, stream: Var) -> tuple[Var, Var]:
        """The stream normalised, where there is a norm, and the stream."""
        known = self.writer.config.block.norms.find(place) is not None
        return (self.normalise(place, stream) if known else stream), stream

    def normalise(self, place: Place, x: Var) -> Var:
        """Through the norm of that place."""
        config = self.writer.config
        return self.writer.norm(f"{config.prefix(self.index)}{config.block.norms.find(place)}", x)

    def attend(self, x: Var) -> Var:
        """Attention, and the products before and after it."""
        writer, prefix, groups = (
            self.writer,
            self.writer.config.prefix(self.index),
            self.writer.model.groups(self.index),
        )
        qkv = writer.project(groups["qkv"], x, f"{prefix}qkv")
        return writer.project(groups["o"], writer.attend(self.index, qkv, self.frame, self.states), f"{prefix}o")

    def feed(self, x: Var) -> Var:
        """The MLP."""
        return self.writer.feed(self.index, x)

    def add(self, stream: Var, x: Var, source: Source) -> Var:
        """The residual sum, by a name that a person finds."""
        name = "attended" if source == "attention" else "output"
        return mb.add(x=stream, y=x, name=spell(f"{self.writer.config.prefix(self.index)}{name}"))
