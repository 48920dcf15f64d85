"""The other ways to hold many skills, on our own graph: a LoRA with A and B as inputs, and virtual tokens as an input.

Both are cut out of a branchless bundle's graph and read its weight file; experts are random: no time depends on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

RANK, TOKENS = 64, 20  # of the LoRA; virtual tokens of a prompt
LORA_FILE, PROMPT_FILE = "onnx/lora.onnx", "onnx/prompt.onnx"
Shapes = dict[str, tuple[int, ...]]


def write_lora_graph(bundle: Path) -> None:
    """onnx/lora.onnx: y + x A B at q, k, v and o of every layer, A and B inputs; q, k, v share one product with A."""
    import onnx
    from onnx import TensorProto, helper

    proto = onnx.load(bundle / "onnx/model.onnx", load_external_data=False)
    graph, nodes, shapes = proto.graph, [], Shapes()
    widths = read_widths(bundle)
    split = helper.make_tensor("lora/split", TensorProto.INT64, [3], [RANK] * 3)
    graph.initializer.append(split)
    for node in graph.node:
        nodes.append(node)
        kind = next((kind for kind in ("qkv", "o") if f"/attn/{kind}_proj/MatMul" in node.name), None)
        if kind is None:
            continue
        path, y = node.name.rsplit("/", 1)[0] + "/lora", node.output[0]
        depth = widths["hidden"] if kind == "qkv" else widths["q"]
        parts = "qkv" if kind == "qkv" else "o"
        shapes[f"{path}/A"] = (depth, RANK * len(parts))
        shapes |= {f"{path}/B_{part}": (RANK, widths[part]) for part in parts}
        node.output[0] = f"{path}/y"
        nodes.append(helper.make_node("MatMul", [node.input[0], f"{path}/A"], [f"{path}/z"]))
        inner = [f"{path}/z_{part}" for part in parts] if len(parts) > 1 else [f"{path}/z"]
        if len(parts) > 1:
            nodes.append(helper.make_node("Split", [f"{path}/z", "lora/split"], inner, axis=-1))
        outer = [f"{path}/d_{part}" for part in parts]
        for part, z, d in zip(parts, inner, outer, strict=True):
            nodes.append(helper.make_node("MatMul", [z, f"{path}/B_{part}"], [d]))
        if len(parts) > 1:
            nodes.append(helper.make_node("Concat", outer, [f"{path}/d"], axis=-1))
        nodes.append(helper.make_node("Add", [f"{path}/y", f"{path}/d" if len(parts) > 1 else outer[0]], [y]))
    if len(shapes) != widths["layers"] * 6:
        raise RuntimeError(f"expected {widths['layers'] * 6} LoRA inputs, found {len(shapes)}: has the export changed?")
    save_graph(proto, nodes, shapes, bundle / LORA_FILE)


def write_prompt_graph(bundle: Path) -> None:
    """onnx/prompt.onnx: the input `virtual` (1, P, H) goes before the token embeddings; P is 0 after the first call."""
    import onnx
    from onnx import helper

    proto = onnx.load(bundle / "onnx/model.onnx", load_external_data=False)
    first = next(node for node in proto.graph.node if node.op_type == "SimplifiedLayerNormalization")
    embedded = first.input[0]
    nodes = []
    for node in proto.graph.node:
        nodes.append(node)
        for index, name in enumerate(node.input):
            if name == embedded:
                node.input[index] = "prompt/stream"
        if embedded in node.output:
            nodes.append(helper.make_node("Concat", ["virtual", embedded], ["prompt/stream"], axis=1))
    save_graph(proto, nodes, {"virtual": (1, -1, read_widths(bundle)["hidden"])}, bundle / PROMPT_FILE)


def save_graph(proto: Any, nodes: list[Any], inputs: Shapes, file: Path) -> None:
    """Write a changed graph beside the one it came from."""
    from onnx import TensorProto, helper

    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    for name, shape in inputs.items():
        dims = [f"{name}_length" if size < 0 else size for size in shape]
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    file.write_bytes(proto.SerializeToString())


def read_widths(bundle: Path) -> dict[str, int]:
    """Output widths of the attention's linears, the model's width and its layers."""
    from lime_edge.bundle.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    decoder, hidden, layers = manifest.decoder, manifest.backbone.hidden, manifest.backbone.layers
    assert decoder is not None
    q, k = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    return {"q": q, "k": k, "v": k, "o": hidden, "hidden": hidden, "layers": layers}


def draw_experts(bundle: Path, method: str, folder: Path, count: int) -> list[Path]:
    """Files 000.safetensors .. of random experts in float16, those that are not there yet."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    shapes = read_inputs(bundle / (LORA_FILE if method == "lora" else PROMPT_FILE), method)
    files = [folder / f"{index:03d}.safetensors" for index in range(count)]
    for index, file in enumerate(files):
        if not file.exists():
            random = np.random.default_rng(index)
            drawn = {name: 0.01 * random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
            save_file({name: tensor.astype(np.float16) for name, tensor in drawn.items()}, file)
    return files


def read_inputs(file: Path, method: str) -> Shapes:
    """The expert's tensors in one of our two graphs: name -> shape."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    own = "/lora/" if method == "lora" else "virtual"
    inputs = {value.name: value.type.tensor_type.shape.dim for value in graph.input if own in value.name}
    return {name: tuple(size.dim_value or TOKENS for size in dims) for name, dims in inputs.items()}


class Graph:
    """One graph of a bundle with bound buffers, as our runtime binds them. spec: path, files, threads, capacity."""

    file = ""
    virtual = 0

    def __init__(self, spec: dict[str, Any]):
        from safetensors.numpy import load_file

        from lime_edge.bundle.bundle import Bundle
        from lime_edge.runtimes.onnx.caches import Caches
        from lime_edge.runtimes.onnx.loading import load_graph
        from lime_edge.runtimes.onnx.places import Host
        from lime_edge.session.engines import SessionOptions

        bundle = Bundle.open(spec["path"])
        self.session = load_graph(bundle, self.file, SessionOptions(spec["threads"]))
        self.binding = self.session.io_binding()
        capacity = spec["capacity"] + self.virtual
        self.caches = Caches(bundle.manifest, 1, capacity, Host()).buffers
        for name, buffer in self.caches.items():
            buffer.bind_input(self.binding, f"past_key_values.{name}")
            buffer.bind_output(self.binding, f"present.{name}")
        self.mask, self.row = (
            np.ones((1, capacity), np.int64),
            np.empty((1, 1, bundle.manifest.backbone.vocab), np.float32),
        )
        self.keep = np.ones(1, np.int64)
        self.binding.bind_ortvalue_input("logits_to_keep", wrap(self.keep))
        self.binding.bind_ortvalue_output("logits", wrap(self.row))
        # as float32 in memory: what the graph takes, ready to be bound
        self.tensors = [{n: np.asarray(t, np.float32) for n, t in load_file(file).items()} for file in spec["files"]]
        self.bound = [{name: wrap(array) for name, array in tensors.items()} for tensors in self.tensors]
        self.experts, self.length, self.active = len(self.bound), 0, 0
        self.switch(0)

    def feed(self, ids: list[int]) -> None:
        """Run tokens after those in the cache."""
        self.ids = np.array([ids], np.int64)
        self.length += len(ids)
        self.binding.bind_ortvalue_input("input_ids", wrap(self.ids))
        self.binding.bind_ortvalue_input("attention_mask", wrap(self.mask[:, : self.length]))
        self.session.run_with_iobinding(self.binding)

    def start(self, ids: list[int]) -> None:
        self.length = 0
        self.feed(ids)

    def step(self) -> int:
        token = int(self.row[0, 0].argmax())
        self.feed([token])
        return token

    def switch(self, index: int) -> None:
        for name, value in self.bound[index].items():
            self.binding.bind_ortvalue_input(name, value)

    def peek(self) -> np.ndarray:
        return np.array(self.row[0, 0])


class LoraGraph(Graph):
    """A and B of every site are inputs; switching rebinds them."""

    file = LORA_FILE


class PromptGraph(Graph):
    """The expert's virtual tokens go before the prompt's, in the first call."""

    file, virtual = PROMPT_FILE, TOKENS

    def start(self, ids: list[int]) -> None:
        self.length = TOKENS
        self.binding.bind_ortvalue_input("virtual", self.bound[self.active]["virtual"])
        self.feed(ids)
        self.none = np.empty((1, 0, self.tensors[0]["virtual"].shape[2]), np.float32)
        self.binding.bind_ortvalue_input("virtual", wrap(self.none))

    def switch(self, index: int) -> None:
        self.active = index  # read when a sequence starts


def wrap(array: np.ndarray) -> Any:
    """An OrtValue over the array's own memory."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)
