"""ONNX: one graph for prompt and decode, fused for ONNX Runtime, the expert as one input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from lime_edge import __version__
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import CompiledModel, Group
from lime_edge.exporters.onnx.attention import AttentionWriter, check_head_width
from lime_edge.exporters.onnx.experts import PinnedExperts, RoutedExperts, fuse_norm
from lime_edge.exporters.onnx.external import WeightFile
from lime_edge.exporters.onnx.functions import HALF, SWIGLU, make_swiglu
from lime_edge.exporters.onnx.graph import LIME, LOGITS_START, LOGITS_TO_KEEP, MICROSOFT, OPSET, Graph
from lime_edge.exporters.onnx.prompt import prepend_virtual
from lime_edge.exporters.onnx.weights import pack_weight
from lime_edge.targets.entries import OnnxOptions

FILE = "model.onnx"
ROUTED_FILE = "routed.onnx"
Progress = Callable[[str, int, int], None]


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
        stream = self._embed()
        if self.model.virtual is not None:
            routed = self.experts if isinstance(self.experts, RoutedExperts) else None
            stream = prepend_virtual(self.model, self.graph, stream, routed)
        self.attention.find_positions(stream)
        update = ""
        for index in range(total):
            progress("write onnx", index, total)
            stream, update = self._write_layer(index, stream, update)
        self._write_head(stream, update)
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

    def _write_layer(self, index: int, stream: str, update: str) -> tuple[str, str]:
        """One layer. `update` is what the layer before adds to the stream; returns (stream, update)."""
        path, prefix = f"/model/layers.{index}", self.config.prefix(index)
        groups = self.model.groups(index)
        x, stream = self._norm(f"{prefix}input_layernorm.weight", f"{path}/input_norm", stream, update)
        qkv = self._project(groups["qkv"], x, f"{path}/attn/qkv_proj")
        attended = self.attention.write(index, qkv, groups["qkv"], f"{path}/attn")
        update = self._project(groups["o"], attended, f"{path}/attn/o_proj")
        x, stream = self._norm(f"{prefix}post_attention_layernorm.weight", f"{path}/post_norm", stream, update)
        gated = self._gate(groups["gate_up"], x, f"{path}/mlp")
        return stream, self._project(groups["down"], gated, f"{path}/mlp/down_proj")

    def _norm(self, name: str, path: str, stream: str, update: str) -> tuple[str, str]:
        """Add the update to the stream and normalise the sum: (normalised, new stream)."""
        g, eps = self.graph, self.config.norm_eps
        weight = g.constant(name, self.model.vectors[name].numpy())
        if not update:
            out = g.node("SimplifiedLayerNormalization", [stream, weight], f"{path}/Norm", epsilon=eps, axis=-1)
            return out, stream
        if self.joins_norms and (fused := fuse_norm(g, update, stream, weight, eps, path)):
            return fused
        outputs = [f"{path}/SkipNorm/output", "", "", f"{path}/SkipNorm/sum"]
        g.node(
            "SkipSimplifiedLayerNormalization",
            [stream, update, weight],
            f"{path}/SkipNorm",
            outputs,
            domain=MICROSOFT,
            epsilon=eps,
        )
        return outputs[0], outputs[3]

    def _gate(self, group: Group, x: str, path: str) -> str:
        """activation(gate) * up, from one product."""
        g, both = self.graph, self._project(group, x, f"{path}/gate_up_proj")
        if self.config.activation == "silu":
            name = HALF + SWIGLU if g.half else SWIGLU
            if name not in g.functions:
                g.functions[name] = make_swiglu(g.half)
            return g.node(name, [both], f"{path}/SwiGLU", domain=LIME)
        names = [f"{path}/gate", f"{path}/up"]
        g.node("Split", [both], f"{path}/Split", names, axis=-1, num_outputs=2)
        approximate = "tanh" if self.config.activation == "gelu_pytorch_tanh" else "none"
        active = g.node("Gelu", names[:1], f"{path}/act", approximate=approximate)
        return g.node("Mul", [active, names[1]], f"{path}/Mul")

    def _project(self, group: Group, x: str, path: str) -> str:
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

    def _write_head(self, stream: str, update: str) -> None:
        """Final norm, the last `logits_to_keep` positions (0: all), logits."""
        g, model = self.graph, self.model
        x, _ = self._norm(f"{self.config.norm}.weight", "/model/norm", stream, update)
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
        if g.half:
            g.node("Cast", [g.nodes[-1].output[0]], "/lm_head/Cast", to=TensorProto.FLOAT)
        g.nodes[-1].output[0] = "logits"
