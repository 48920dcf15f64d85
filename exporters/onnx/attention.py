"""Attention with its cache as one operator, rotation included, or before it where the fused form refuses the width."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.errors import Faults
from lime_edge.exporters.onnx.graph import MICROSOFT, Graph

# What GroupQueryAttention takes, without and with rotation. Source: onnxruntime's error messages, 1.31.1
HEAD_MULTIPLE, ROTATED_MULTIPLE = 8, 16
POSITIONS = "position_ids"


def check_head_width(model: CompiledModel) -> None:
    """Refuse what ONNX Runtime would refuse only when the graph is run.

    Raises:
        LimeEdgeError: head width.
    """
    with Faults("ONNX export", "ONNX Runtime's fused attention needs this size") as faults:
        if model.decoder.head_dim % HEAD_MULTIPLE:
            faults.add("head_dim", f"a multiple of {HEAD_MULTIPLE}", model.decoder.head_dim)


class AttentionWriter:
    """Writes the attention of one layer after another; they share the mask's sums and the rotation's tables."""

    def __init__(self, model: CompiledModel, graph: Graph):
        self.model, self.graph, self.config = model, graph, model.decoder
        norm, c = model.decoder.block.head_norm, model.decoder
        widths = [c.head_dim, *(rotation.width for rotation in c.rotations)]
        fits = all(width % ROTATED_MULTIPLE == 0 for width in widths)
        self.fuses_rotation = fits and not (norm is not None and norm.rotated)

    def declare(self) -> None:
        """Declare the mask and the caches, and compute what all layers read."""
        g, c = self.graph, self.config
        g.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
        for index in range(len(c.layers)):
            for kind in ("key", "value"):
                shape: list[int | str] = ["batch_size", c.kv_heads, "past_sequence_length", c.head_dim]
                g.input(f"past_key_values.{index}.{kind}", g.real, shape)
        for which in range(len(c.rotations)):
            for name, table in zip(name_tables(which), c.rope_tables(c.context, which), strict=True):
                g.constant(name, table.numpy())
        axis = g.constant("axis_1", np.array([1], np.int64))
        one = g.constant("one", np.array([1], np.int64))
        count = g.node("ReduceSum", ["attention_mask", axis], "/mask/ReduceSum", keepdims=0)
        count = g.node("Sub", [count, one], "/mask/Sub")
        g.node("Cast", [count], "/mask/Cast", ["seqlens_k"], to=TensorProto.INT32)
        total = g.node("Shape", ["attention_mask"], "/mask/Shape", start=1, end=2)
        total = g.node("Squeeze", [total], "/mask/Squeeze")
        g.node("Cast", [total], "/mask/CastTotal", ["total_sequence_length_i32"], to=TensorProto.INT32)

    def find_positions(self, stream: str) -> None:
        """Where the tokens of the call, `stream` (B, S, hidden), stand: (B, S), only where the rotation needs it.

        A row's tokens are its last ones, and padding is on the right: max(sum of the mask - S, 0) + 0..S-1.
        Source: onnxruntime 1.31.1, GroupQueryAttention's own positions with do_rotary.
        """
        if self.fuses_rotation:
            return
        g = self.graph
        names = {kind: g.constant(f"rotation/{kind}", np.array(v, np.int64)) for kind, v in (("zero", 0), ("step", 1))}
        length = g.node("Shape", [stream], "/rotation/Shape", start=1, end=2)
        before = g.node("Sub", ["/mask/ReduceSum/output", length], "/rotation/Before")
        start = g.node("Max", [before, names["zero"]], "/rotation/Start")
        start = g.node("Unsqueeze", [start, "axis_1"], "/rotation/Column")
        steps = g.node(
            "Range", [names["zero"], g.node("Squeeze", [length], "/rotation/Length"), names["step"]], "/rotation/Range"
        )
        g.node("Add", [start, steps], "/rotation/Add", [POSITIONS])

    def write(self, index: int, qkv: str, path: str) -> str:
        """Causal grouped-query attention over the cache: (B, S, N) -> (B, S, heads * D)."""
        g, c, attention = self.graph, self.config, self.config.layers[index]
        rotation, norm = c.rotation_of(index), c.block.head_norm
        rotates = rotation is not None and not self.fuses_rotation
        heads, (query, key, value) = {"q": c.heads, "k": c.kv_heads}, (qkv, "", "")
        if norm is not None or rotates:
            query, key, value = self._split(qkv, path)
        if norm is not None and not norm.rotated:
            query, key = (self._norm(index, x, kind, path) for kind, x in zip(heads, (query, key), strict=True))
        if rotation is not None and rotates:
            pairs = zip(heads, (query, key), strict=True)
            query, key = (self._rotate(x, rotation, heads[kind], f"{path}/{kind}_rotation") for kind, x in pairs)
        if norm is not None and norm.rotated:
            query, key = (self._norm(index, x, kind, path) for kind, x in zip(heads, (query, key), strict=True))
        past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        present = [f"present.{index}.{kind}" for kind in ("key", "value")]
        for name in present:
            shape: list[int | str] = ["batch_size", c.kv_heads, "total_sequence_length", c.head_dim]
            g.output(name, g.real, shape)
        inputs = [query, key, value, *past, "seqlens_k", "total_sequence_length_i32"]
        fused = rotation is not None and self.fuses_rotation
        if rotation is not None and fused:
            inputs += name_tables(rotation)
        cap: dict[str, Any] = {} if c.block.cap is None else {"softcap": c.block.cap}
        return g.node(
            "GroupQueryAttention",
            inputs,
            f"{path}/GroupQueryAttention",
            [f"{path}/GroupQueryAttention/output", *present],
            domain=MICROSOFT,
            num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            do_rotary=int(fused),
            rotary_interleaved=int(fused and c.block.interleaved),
            scale=c.head_dim**-0.5,
            local_window_size=-1 if attention.window is None else attention.window,
            **cap,
        )

    def _split(self, qkv: str, path: str) -> list[str]:
        sizes = self.graph.constant(f"{path}/sizes", np.array(self.config.head_widths, np.int64))
        parts = [f"{path}/{part}" for part in "qkv"]
        self.graph.node("Split", [qkv, sizes], f"{path}/Split", parts, axis=-1)
        return parts

    def _rotate(self, x: str, rotation: int, heads: int, path: str) -> str:
        """Every head's first elements, as many as the tables tell: (B, S, heads * D). Source: decoder.rotate."""
        width = self.config.rotations[rotation].width
        partial = width < self.config.head_dim
        part: dict[str, Any] = {"rotary_embedding_dim": width, "num_heads": heads} if partial else {}
        inputs = [x, POSITIONS, *name_tables(rotation)]
        interleaved = int(self.config.block.interleaved)
        return self.graph.node("RotaryEmbedding", inputs, path, domain=MICROSOFT, interleaved=interleaved, **part)

    def _norm(self, index: int, x: str, kind: str, path: str) -> str:
        """The norm on queries ("q") or keys ("k"): (B, S, heads * D) -> the same. Source: decoder.HeadNorm."""
        g, c, plan, path = self.graph, self.config, self.config.block, f"{path}/{kind}_norm"
        assert plan.head_norm is not None
        heads, short = (c.heads, plan.head_norm.query) if kind == "q" else (c.kv_heads, plan.head_norm.key)
        name, width = f"{c.prefix(index)}self_attn.{short}.weight", plan.head_norm.width
        vector = self.model.vectors[name].numpy()
        op = "SimplifiedLayerNormalization" if plan.norm == "rms" else "LayerNormalization"
        if width == "all":
            return g.node(op, [x, g.constant(name, vector)], f"{path}/Norm", epsilon=c.norm_eps, axis=-1)
        split = g.constant(f"{path}/split", np.array([0, 0, heads, c.head_dim], np.int64))
        merge = g.constant(f"{path}/merge", np.array([0, 0, heads * c.head_dim], np.int64))
        x = g.node("Reshape", [x, split], f"{path}/Split")
        shared = vector if width == "head" else np.ones(c.head_dim, np.float32)
        x = g.node(
            op,
            [x, g.constant(name if width == "head" else f"{path}/ones", shared)],
            f"{path}/Norm",
            epsilon=c.norm_eps,
            axis=-1,
        )
        if width == "each":  # the operator has one vector for all heads
            x = g.node("Mul", [x, g.constant(name, vector.reshape(heads, -1))], f"{path}/Weight")
        return g.node("Reshape", [x, merge], f"{path}/Merge")


def name_tables(rotation: int) -> list[str]:
    """The names of a rotation's tables of cos and sin."""
    return [f"{kind}_cache_{rotation}" if rotation else f"{kind}_cache" for kind in ("cos", "sin")]
