"""The models that are compared, made once under build/peers: all of them from one GGUF file and one LiME adapter."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lime_edge.errors import LimeEdgeError

ADAPTER = Path("examples/demo_adapter/routed")
EXPERT = "expert_0"
QUANTS: dict[str, tuple[str, ...] | None] = {"int4": (), "default": None}  # what stays at int8 (None: its choice)
Steps = dict[str, Callable[[], None]]
BUILDER = ("prune_lm_head=true", "shared_embeddings=true")  # logits of the last token only, one table: as ours


@dataclass(frozen=True)
class Models:
    """Where everything is, under one folder."""

    folder: Path

    def path(self, name: str) -> Path:
        """A model's file or directory."""
        return self.folder / name

    def bundle(self, quant: str, single: bool, target: str = "onnx") -> Path:
        """Our bundle: with branches (and a routed graph in ONNX), or the expert merged into the weights."""
        folder = self.folder if target == "onnx" else self.folder / target
        return folder / f"{quant}{'-single' if single else ''}.lime"


def prepare_smollm2(
    folder: Path, gguf: Path, quants: list[str], engines: list[str], told: Callable[[str], None]
) -> dict[str, str]:
    """Make what is not there yet.

    Args:
        gguf: the backbone. quants: keys of QUANTS. engines: some of ours, executorch, genai, llama, torch.
        told: called with one line of progress.
    Returns:
        What could not be made -> why.
    """
    models = Models(folder)
    steps: Steps = {"hf": partial(write_hf, gguf, models.path("hf"))}
    for quant in quants:
        for single in (True, False):  # one call makes both
            steps[models.bundle(quant, single).name] = partial(write_bundles, models, quant)
    if "executorch" in engines:
        steps |= {
            f"executorch/{models.bundle('int4', single).name}": partial(write_bundles, models, "int4", "executorch")
            for single in (True, False)
        }
    steps |= {"peft": partial(write_lora, models, "peft"), "lora.gguf": partial(write_lora, models, "lora.gguf")}
    if "genai" in engines:
        steps |= genai_steps(models)
    if "llama" in engines:
        steps |= {
            name: partial(requantize, gguf, models.path(name), head_too=name == "q4_0.gguf")
            for name in ("q4_0.gguf", "q4_0-default.gguf")
        }
    return make_all(models, steps, told)


def prepare_random(folder: Path, shape: str, engines: list[str], told: Callable[[str], None]) -> dict[str, str]:
    """A random model's files, where they are not there yet."""
    models = Models(folder)
    bundles = partial(write_random, models, shape)
    steps: Steps = {models.bundle("int4", single).name: bundles for single in (True, False)}
    if "executorch" in engines:
        lowered = partial(write_random, models, shape, "executorch")
        steps |= {f"executorch/{models.bundle('int4', single).name}": lowered for single in (True, False)}
    foreign = partial(write_foreign, models, shape)
    if {"genai", "llama"} & set(engines):
        steps |= {name: foreign for name in ("hf", "q4_0.gguf", "peft", "lora.gguf")}
    if "genai" in engines:
        steps |= genai_steps(models)
    return make_all(models, steps, told)


def genai_steps(models: Models) -> Steps:
    """The builder's two models."""
    return {"genai": partial(build_genai, models, "genai", ()), "genai-lora": partial(build_genai_lora, models)}


def make_all(models: Models, steps: Steps, told: Callable[[str], None]) -> dict[str, str]:
    """Make what is not there: what could not be made -> why."""
    missing = {}
    models.folder.mkdir(parents=True, exist_ok=True)
    for name, make in steps.items():
        if models.path(name).exists():
            continue
        told(f"making {name}")
        try:
            make()
        except (ImportError, OSError, RuntimeError, LimeEdgeError) as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return missing


def write_hf(gguf: Path, directory: Path) -> None:
    """The dequantized backbone as a Hugging Face directory, float32: what the builder and PyTorch read."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from lime_edge.compiler.formats.backbone import quiet

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    stage = directory.with_suffix(".partial")
    stage.mkdir(exist_ok=True)
    facts = model.config.to_dict()
    facts.pop("quantization_config", None)
    config = LlamaConfig(**facts)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(stage)
    tokenizer.save_pretrained(stage)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, stage / "model.safetensors", metadata={"format": "pt"})
    stage.rename(directory)


def write_bundles(models: Models, quant: str, target: str = "onnx") -> None:
    """Our own export: with branches, and with the expert merged."""
    from bundles import export_real

    outputs = {single: models.bundle(quant, single, target) for single in (False, True)}
    export_real(models.path("hf"), ADAPTER, EXPERT, QUANTS[quant], outputs, target)


def write_random(models: Models, shape: str, target: str = "onnx") -> None:
    """A random model's two bundles."""
    from bundles import make_random

    make_random(shape, EXPERT, {single: models.bundle("int4", single, target) for single in (False, True)}, target)


def write_foreign(models: Models, shape: str) -> None:
    """The same random model for GenAI's builder and for llama.cpp, and its first expert as LoRA."""
    from bundles import draw_model, make_config
    from foreign import write_folder, write_gguf, write_loras

    from lime_edge.compiler.formats.architecture import read_decoder

    config = make_config(shape)
    model = draw_model(read_decoder(config, shape))
    write_loras(model, EXPERT, models.path("peft"), models.path("lora.gguf"))
    write_gguf(model, models.path("q4_0.gguf"))
    write_folder(model, config, models.path("hf"))


def write_lora(models: Models, name: str) -> None:
    """The same expert as a plain LoRA: B' = diag(p) B."""
    from lime_edge.compiler.formats.interchange import export_expert

    form = "gguf" if name.endswith(".gguf") else "peft"
    export_expert(ADAPTER, EXPERT, form, models.path(name), models.path("hf"))


def build_genai(models: Models, name: str, options: tuple[str, ...]) -> None:
    """ONNX Runtime GenAI's own builder: int4, groups of 32, int8 activations (its defaults)."""
    stage = models.path(f"{name}.partial")
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(models.path("hf")),
        "-o",
        str(stage),
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        str(models.path("cache")),
        "--extra_options",
        *BUILDER,
        *options,
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the builder failed"])[-1])
    stage.rename(models.path(name))


def build_genai_lora(models: Models) -> None:
    """The builder's model with the expert as LoRA, its weights made inputs so that the `Adapters` API sets them.

    The builder writes A and B as constants of the graph (and would round them to int4: here it may not).
    """
    import onnx
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    layers = read_layers(models.path("hf"))
    nodes = [
        f"/model/layers.{layer}/attn/{kind}_proj/lora_{part}/MatMul"
        for layer in range(layers)
        for kind in "qkvo"
        for part in "AB"
    ]
    options = (f"adapter_path={models.path('peft')}", f"nodes_to_exclude={','.join(nodes)}")
    build_genai(models, "genai-lora.built", options)
    folder = models.path("genai-lora.built")
    model = onnx.load(folder / "model.onnx")  # with its weights: they are read from the data file
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    values = {}
    for node in model.graph.node:
        if node.name in nodes:
            tensor = tensors[node.input[1]]
            values[tensor.name] = np_copy(numpy_helper.to_array(tensor))
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    if len(values) != len(nodes):
        raise RuntimeError(f"expected {len(nodes)} LoRA matrices in the builder's graph, found {len(values)}")
    (folder / "model.onnx.data").unlink()
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=65536
    )
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    adapter.export_adapter(str(folder / f"{EXPERT}.onnx_adapter"))
    folder.rename(models.path("genai-lora"))


def np_copy(array: object) -> object:
    """An array of its own memory, float32."""
    import numpy as np

    return np.array(array, np.float32)


def read_layers(model: Path) -> int:
    """How many layers a Hugging Face directory says it has."""
    import json

    return int(json.loads((model / "config.json").read_text())["num_hidden_layers"])


def requantize(source: Path, output: Path, head_too: bool) -> None:
    """llama.cpp's Q4_0 from the shipped Q4_1. head_too: the tied table as well, else llama.cpp's own choice."""
    import llama_cpp
    from engines import load_llama_backends, silence_llama

    silence_llama()
    load_llama_backends()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    if head_too:
        options.token_embedding_type = options.output_tensor_type = llama_cpp.GGML_TYPE_Q4_0
    stage = output.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(stage).encode(), ctypes.byref(options)):
        raise RuntimeError("llama.cpp refused to requantize")
    stage.rename(output)
