"""Attention with its cache as one operator, rotation included, or before it where the fused form refuses the width."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from lime_edge.compiler.model.compiled import CompiledModel, Group
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
        self.fuses_rotation = model.decoder.head_dim % ROTATED_MULTIPLE == 0

    def declare(self) -> None:
        """Declare the mask and the caches, and compute what all layers read."""
        g, c = self.graph, self.config
        g.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
        for index in range(len(c.layers)):
            for kind in ("key", "value"):
                shape: list[int | str] = ["batch_size", c.kv_heads, "past_sequence_length", c.head_dim]
                g.input(f"past_key_values.{index}.{kind}", g.real, shape)
        cos, sin = c.rope_tables(c.context)
        g.constant("cos_cache", cos.numpy())
        g.constant("sin_cache", sin.numpy())
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

    def write(self, index: int, qkv: str, group: Group, path: str) -> str:
        """Causal grouped-query attention over the cache: (B, S, N) -> (B, S, heads * D)."""
        g, c, attention = self.graph, self.config, self.config.layers[index]
        rotates = attention.rope and not self.fuses_rotation
        query, key, value = qkv, "", ""
        if c.qk_norm or rotates:
            query, key, value = self._split(qkv, group, path)
        if c.qk_norm:
            norms = c.prefix(index) + "self_attn"
            query = self._head_norm(f"{norms}.q_norm.weight", query, c.heads, f"{path}/q_norm")
            key = self._head_norm(f"{norms}.k_norm.weight", key, c.kv_heads, f"{path}/k_norm")
        if rotates:
            query, key = self._rotate(query, f"{path}/q_rotation"), self._rotate(key, f"{path}/k_rotation")
        past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        present = [f"present.{index}.{kind}" for kind in ("key", "value")]
        for name in present:
            shape: list[int | str] = ["batch_size", c.kv_heads, "total_sequence_length", c.head_dim]
            g.output(name, g.real, shape)
        inputs = [query, key, value, *past, "seqlens_k", "total_sequence_length_i32"]
        fused = attention.rope and self.fuses_rotation
        if fused:
            inputs += ["cos_cache", "sin_cache"]
        return g.node(
            "GroupQueryAttention",
            inputs,
            f"{path}/GroupQueryAttention",
            [f"{path}/GroupQueryAttention/output", *present],
            domain=MICROSOFT,
            num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            do_rotary=int(fused),
            rotary_interleaved=0,
            scale=c.head_dim**-0.5,
            local_window_size=-1 if attention.window is None else attention.window,
        )

    def _split(self, qkv: str, group: Group, path: str) -> list[str]:
        sizes = self.graph.constant(f"{path}/sizes", np.array(group.widths, np.int64))
        parts = [f"{path}/{part}" for part in "qkv"]
        self.graph.node("Split", [qkv, sizes], f"{path}/Split", parts, axis=-1)
        return parts

    def _rotate(self, x: str, path: str) -> str:
        """Half against half in every head, whose width the tables tell: (B, S, heads * D). Source: decoder.rotate."""
        inputs = [x, POSITIONS, "cos_cache", "sin_cache"]
        return self.graph.node("RotaryEmbedding", inputs, path, domain=MICROSOFT, interleaved=0)

    def _head_norm(self, name: str, x: str, heads: int, path: str) -> str:
        """RMSNorm over each head's width: (B, S, heads * D) -> the same."""
        g, c = self.graph, self.config
        split = g.constant(f"{path}/split", np.array([0, 0, heads, c.head_dim], np.int64))
        merge = g.constant(f"{path}/merge", np.array([0, 0, heads * c.head_dim], np.int64))
        x = g.node("Reshape", [x, split], f"{path}/Split")
        weight = g.constant(name, self.model.vectors[name].numpy())
        x = g.node("SimplifiedLayerNormalization", [x, weight], f"{path}/Norm", epsilon=c.norm_eps, axis=-1)
        return g.node("Reshape", [x, merge], f"{path}/Merge")
