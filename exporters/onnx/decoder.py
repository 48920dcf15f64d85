"""ONNX: one graph for prompt and decode, fused for ONNX Runtime, the expert as one input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from lime_edge import __version__
from lime_edge.compiler.maths.block import Place, Source, run_block
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import CompiledModel, Group
from lime_edge.exporters.onnx.attention import AttentionWriter, check_head_width
from lime_edge.exporters.onnx.experts import PinnedExperts, RoutedExperts, fuse_norm
from lime_edge.exporters.onnx.external import WeightFile
from lime_edge.exporters.onnx.functions import HALF, SWIGLU, make_swiglu
from lime_edge.exporters.onnx.graph import LIME, LOGITS_START, LOGITS_TO_KEEP, MICROSOFT, OPSET, Graph
from lime_edge.exporters.onnx.image_rows import replace_rows
from lime_edge.exporters.onnx.prompt import prepend_virtual
from lime_edge.exporters.onnx.weights import pack_weight
from lime_edge.targets.entries import OnnxOptions

FILE = "model.onnx"
ROUTED_FILE = "routed.onnx"
Progress = Callable[[str, int, int], None]
NORM_PATHS: dict[Place, str] = {
    "before_attention": "input_norm",
    "after_attention": "attn_norm",
    "before_mlp": "post_norm",
    "after_mlp": "mlp_norm",
}


def write_decoder(model: CompiledModel, directory: Path, options: OnnxOptions, progress: Progress) -> dict[str, Any]:
    """Write model.onnx and model.onnx.data; for a routed checkpoint also routed.onnx on the same data.

    Two graphs, because routing costs: a pinned expert must not pay for it, and both read one weight file.

    Args:
        model: compiled; its integers are only re-packed. directory: exists, empty.
        options: the type of activations. progress: called with (step, done, total).
    Returns:
        The target's manifest entry: file, opset, and the names the runtime binds.
    """
    check_head_width(model)
    metadata = {"fingerprint": model.fingerprint, "fold": model.fold, "quant": model.quant}
    weights = WeightFile(directory / f"{FILE}.data")
    graph = Graph(weights, half=options.activations == "float16")
    DecoderWriter(model, graph, PinnedExperts(model, graph) if model.swaps else None).write(progress)
    graph.save(directory / FILE, __version__, metadata)
    facts = {
        "file": f"onnx/{FILE}",
        "opset": OPSET,
        "onnx": onnx.__version__,
        "expert_input": model.swaps,
        "virtual_tokens": 0 if model.virtual is None else len(model.virtual.base),
        "layers": len(model.decoder.layers),
        "nodes": len(graph.nodes),
        "functions": sorted(graph.used_functions()),
        "weight_hash": model.weight_hash(),
    }
    if graph.half:
        facts["compute"] = "float16"
    if model.routing is not None and model.swaps:
        routed = Graph(weights, graph.half)
        DecoderWriter(model, routed, RoutedExperts(model, routed, model.routing)).write(progress)
        routed.save(directory / ROUTED_FILE, __version__, metadata)
        facts |= {"routed": f"onnx/{ROUTED_FILE}", "routed_nodes": len(routed.nodes)}
    return facts


@dataclass(frozen=True)
class Stream:
    """The residual stream, and what is still to be added to it: one operator adds and normalises."""

    sum: str
    update: str = ""


class DecoderWriter:
    """Writes a CompiledModel's decoder into a Graph, layer by layer."""

    joins_norms = True  # a branch takes the norm after it along

    def __init__(self, model: CompiledModel, graph: Graph, experts: PinnedExperts | RoutedExperts | None):
        self.model, self.graph, self.config, self.experts = model, graph, model.decoder, experts
        self.attention = AttentionWriter(model, graph)

    def write(self, progress: Progress) -> None:
        """Write everything: inputs, embedding, layers, head."""
        total = len(self.config.layers)
        self.graph.output("logits", TensorProto.FLOAT, ["batch_size", "num_logits", self.config.vocab])
        self.graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        self.attention.declare()
        if self.experts is not None:
            self.experts.declare()
        embedded = self._embed()
        if self.model.image_tokens:
            embedded = replace_rows(self.model, self.graph, embedded)
        if self.model.virtual is not None:
            routed = self.experts if isinstance(self.experts, RoutedExperts) else None
            embedded = prepend_virtual(self.model, self.graph, embedded, routed)
        self.attention.find_positions(embedded)
        stream = Stream(embedded)
        for index in range(total):
            progress("write onnx", index, total)
            stream = run_block(self.config.block, LayerWriter(self, index), stream)
        self._write_head(stream)
        progress("write onnx", total, total)

    def _embed(self) -> str:
        """Token embeddings, with what the expert does to them (see decoder.Embedding)."""
        g, path, y = self.graph, "/model/embed_tokens", self._look_up()
        branch = self.model.group_branch(self.model.embedding_group)
        if branch is None or self.experts is None:
            return y
        if branch.a is None or branch.b is None:
            return g.node("Mul", [y, self.experts.multiply(branch, y, y, path)], f"{path}/lime/Mul")
        table = g.constant(f"{path}.lime_a", branch.a.numpy())
        b = g.constant(f"{path}.lime_b", branch.b.T.numpy())
        hidden = g.node("Gather", [table, "input_ids"], f"{path}/lime/A")
        delta = g.node("MatMul", [hidden, b], f"{path}/lime/B")
        scaled = g.node("Mul", [delta, self.experts.multiply(branch, y, hidden, path)], f"{path}/lime/Mul")
        return g.node("Add", [y, scaled], f"{path}/lime/Add")

    def _look_up(self) -> str:
        g, name = self.graph, f"{self.config.embedding}.weight"
        stored = self.model.weights[name]
        if not isinstance(stored, QuantizedTensor):
            table = g.constant(name, stored.numpy())
            return g.node("Gather", [table, "input_ids"], "/model/embed_tokens/Gather")
        packed = pack_weight(stored)
        columns = stored.codes.shape[1]
        bytes_per_row = packed.codes.shape[1] * packed.codes.shape[2]
        codes = g.constant(f"{name}.codes", packed.codes.reshape(-1, bytes_per_row))
        if stored.bits == 4:
            scales = g.constant(f"{name}.scales", packed.scales)
            return g.node(
                "GatherBlockQuantized",
                [codes, "input_ids", scales],
                "/model/embed_tokens/Gather",
                domain=MICROSOFT,
                block_size=packed.block,
                gather_axis=0,
                quantize_axis=1,
                bits=4,
            )
        scales = g.constant(f"{name}.row_scales", stored.scales.numpy())
        rows = g.node("Gather", [codes, "input_ids"], "/model/embed_tokens/Gather")
        if bytes_per_row != columns:
            limits = [
                g.constant(f"/model/embed_tokens/{k}", np.array([v], np.int64))
                for k, v in (("start", 0), ("end", columns), ("axis", 2))
            ]
            rows = g.node("Slice", [rows, *limits], "/model/embed_tokens/Slice")
        rows = g.node("Cast", [rows], "/model/embed_tokens/Cast", to=g.real)
        zero = g.constant("/model/embed_tokens/zero", np.array(128, np.float32))
        rows = g.node("Sub", [rows, zero], "/model/embed_tokens/Sub")
        factor = g.node("Gather", [scales, "input_ids"], "/model/embed_tokens/GatherScale")
        return g.node("Mul", [rows, factor], "/model/embed_tokens/Mul")

    def norm_sum(self, name: str, path: str, stream: Stream) -> tuple[str, Stream]:
        """Add what is pending to the stream and normalise the sum: (normalised, new stream)."""
        g, eps = self.graph, self.config.norm_eps
        if not stream.update:
            return self.norm(name, path, stream.sum), stream
        plain = self.config.block.norm == "rms"
        gains = self._gains(name)
        if plain and self.joins_norms and (fused := fuse_norm(g, stream.update, stream.sum, gains[0], eps, path)):
            return fused[0], Stream(fused[1])
        outputs = [f"{path}/SkipNorm/output", "", "", f"{path}/SkipNorm/sum"]
        g.node(
            "SkipSimplifiedLayerNormalization" if plain else "SkipLayerNormalization",
            [stream.sum, stream.update, *gains],
            f"{path}/SkipNorm",
            outputs,
            domain=MICROSOFT,
            epsilon=eps,
        )
        return outputs[0], Stream(outputs[3])

    def norm(self, name: str, path: str, x: str) -> str:
        """A norm alone."""
        op = "SimplifiedLayerNormalization" if self.config.block.norm == "rms" else "LayerNormalization"
        return self.graph.node(op, [x, *self._gains(name)], f"{path}/Norm", epsilon=self.config.norm_eps, axis=-1)

    def _gains(self, name: str) -> list[str]:
        """The norm's weight, and its bias where it has one."""
        names = (f"{name}.weight", f"{name}.bias")
        return [self.graph.constant(key, self.model.vectors[key].numpy()) for key in names if key in self.model.vectors]

    def gate(self, group: Group, x: str, path: str) -> str:
        """activation(gate) * up, from one product; activation(up) where there is no gate."""
        g, plan = self.graph, self.config.block
        both = self.project(group, x, f"{path}/{'gate_up' if plan.gated else 'up'}_proj")
        if not plan.gated:
            return self._activate(both, f"{path}/act")
        if plan.activation == "silu":
            name = HALF + SWIGLU if g.half else SWIGLU
            if name not in g.functions:
                g.functions[name] = make_swiglu(g.half)
            return g.node(name, [both], f"{path}/SwiGLU", domain=LIME)
        names = [f"{path}/gate", f"{path}/up"]
        g.node("Split", [both], f"{path}/Split", names, axis=-1, num_outputs=2)
        return g.node("Mul", [self._activate(names[0], f"{path}/act"), names[1]], f"{path}/Mul")

    def _activate(self, x: str, path: str) -> str:
        g, name = self.graph, self.config.block.activation
        if name == "relu2":
            positive = g.node("Relu", [x], f"{path}/Relu")
            return g.node("Mul", [positive, positive], f"{path}/Square")
        if name == "silu":
            return g.node("QuickGelu", [x], path, domain=MICROSOFT, alpha=1.0)
        return g.node("Gelu", [x], path, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")

    def project(self, group: Group, x: str, path: str) -> str:
        """A group of linears on one input, with what the expert does to them (see decoder.Projection)."""
        names, bias = [f"{name}.weight" for name in group.names], self.model.group_bias(group)
        branch = self.model.group_branch(group)
        if branch is None or self.experts is None:
            return self._matmul(names, bias, x, path)
        g = self.graph
        if branch.a is None or branch.b is None:
            y = self._matmul(names, None, x, path)
            y = g.node("Mul", [y, self.experts.multiply(branch, y, y, path)], f"{path}/lime/Mul")
            if bias is None:
                return y
            return g.node("Add", [y, g.constant(f"{path}.bias", bias.numpy())], f"{path}/lime/Bias")
        y = self._matmul(names, bias, x, path)
        return self.experts.add_branch(branch, x, y, path)

    def _matmul(self, names: list[str], bias: torch.Tensor | None, x: str, path: str) -> str:
        """One product for several stacked weights."""
        g, stored = self.graph, [self.model.weights[name] for name in names]
        bias_name = "" if bias is None else g.constant(f"{path}.bias", bias.numpy())
        quantized = [tensor for tensor in stored if isinstance(tensor, QuantizedTensor)]
        if not quantized:
            plain = torch.cat([tensor for tensor in stored if isinstance(tensor, torch.Tensor)])
            weight = g.constant(f"{path}.weight", plain.T.numpy())
            y = g.node("MatMul", [x, weight], f"{path}/MatMul")
            return g.node("Add", [y, bias_name], f"{path}/Add") if bias_name else y
        packed = [pack_weight(tensor) for tensor in quantized]
        codes = g.constant(f"{path}.codes", np.concatenate([p.codes for p in packed]))
        scales = g.constant(f"{path}.scales", np.concatenate([p.scales for p in packed]))
        inputs = [x, codes, scales] + (["", "", bias_name] if bias_name else [])
        return g.node(
            "MatMulNBits",
            inputs,
            f"{path}/MatMulNBits",
            domain=MICROSOFT,
            K=quantized[0].codes.shape[1],
            N=sum(p.codes.shape[0] for p in packed),
            bits=packed[0].bits,
            block_size=packed[0].block,
            accuracy_level=0 if g.half else 4,  # a GPU computes in float16 whatever is said
        )

    def _write_head(self, stream: Stream) -> None:
        """Final norm, the last `logits_to_keep` positions (0: all), logits."""
        g, model = self.graph, self.model
        x, _ = self.norm_sum(self.config.norm, "/model/norm", stream)
        if g.half:
            start = g.input(LOGITS_START, TensorProto.INT64, [1])
        else:
            start = g.node("Neg", [g.input(LOGITS_TO_KEEP, TensorProto.INT64, [1])], "/head/Neg")
        end = g.constant("/head/end", np.array([np.iinfo(np.int64).max], np.int64))
        x = g.node("Slice", [x, start, end, "axis_1"], "/head/Slice")
        name = model.head_name
        stored = model.weights[name]
        tied = name == f"{self.config.embedding}.weight"
        if tied and not isinstance(stored, QuantizedTensor):
            g.node("FusedMatMul", [x, name], "/lm_head/MatMul", domain=MICROSOFT, transB=1)
        else:
            self._matmul([name], None, x, "/lm_head")  # a tied head's codes are the table's, stored once
        if (limit := self.config.logit_cap) is not None:
            most = g.constant("/lm_head/limit", np.array(limit, np.float32))
            share = g.node("Tanh", [g.node("Div", [g.nodes[-1].output[0], most], "/lm_head/Div")], "/lm_head/Tanh")
            g.node("Mul", [share, most], "/lm_head/Cap")
        if g.half:
            g.node("Cast", [g.nodes[-1].output[0]], "/lm_head/Cast", to=TensorProto.FLOAT)
        g.nodes[-1].output[0] = "logits"


@dataclass(frozen=True)
class LayerWriter:
    """The operations of a layer's plan as nodes (`maths.block.Operations`)."""

    writer: DecoderWriter
    index: int

    @property
    def path(self) -> str:
        """What the names of its nodes begin with."""
        return f"/model/layers.{self.index}"

    def read(self, place: Place, stream: Stream) -> tuple[str, Stream]:
        """What is pending added, and the sum normalised where there is a norm."""
        name = self.writer.config.block.norms.find(place)
        if name is not None:
            return self.writer.norm_sum(self._name(name), f"{self.path}/{NORM_PATHS[place]}", stream)
        stream = self._join(stream, f"{self.path}/{NORM_PATHS[place]}")
        return stream.sum, stream

    def normalise(self, place: Place, x: str) -> str:
        """A norm alone."""
        name = self.writer.config.block.norms.find(place)
        assert name is not None
        return self.writer.norm(self._name(name), f"{self.path}/{NORM_PATHS[place]}", x)

    def attend(self, x: str) -> str:
        """Attention, and the products before and after it."""
        groups, path = self.writer.model.groups(self.index), f"{self.path}/attn"
        qkv = self.writer.project(groups["qkv"], x, f"{path}/qkv_proj")
        return self.writer.project(groups["o"], self.writer.attention.write(self.index, qkv, path), f"{path}/o_proj")

    def feed(self, x: str) -> str:
        """The MLP."""
        groups, path = self.writer.model.groups(self.index), f"{self.path}/mlp"
        return self.writer.project(groups["down"], self.writer.gate(groups["gate_up"], x, path), f"{path}/down_proj")

    def add(self, stream: Stream, x: str, source: Source) -> Stream:
        """x is to be added; what was, is added now."""
        return Stream(self._join(stream, f"{self.path}/{source}").sum, x)

    def _join(self, stream: Stream, path: str) -> Stream:
        if not stream.update:
            return stream
        return Stream(self.writer.graph.node("Add", [stream.sum, stream.update], f"{path}/Residual"))

    def _name(self, norm: str) -> str:
        return self.writer.config.prefix(self.index) + norm
