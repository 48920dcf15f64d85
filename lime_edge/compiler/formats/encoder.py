"""Encoders and vision models: a transformers model and its LiME adapter, read and checked.

Task and model class come from optimum's TasksManager; what is a site comes from watching one call.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from lime_edge.compiler.formats.adapter_checks import refuse_checkpoint
from lime_edge.compiler.formats.backbone import Backbone, Layer, quiet
from lime_edge.compiler.formats.configs import count_layers, plain_name, read_config
from lime_edge.compiler.formats.families import FAMILIES
from lime_edge.compiler.formats.files import AGAIN, read_json, read_weights, reading
from lime_edge.compiler.formats.prequantized import refuse_prequantized
from lime_edge.errors import Faults, LimeEdgeError, need

# What an encoder's class may be called after its family, and the task that TasksManager knows it under.
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "Model": "feature-extraction",
}
POOLINGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
SAMPLE_BATCH, SAMPLE_LENGTH = 2, 7
UNTOLD_CONTEXT = 512  # tokens, where neither a table nor the config says


@dataclass(frozen=True)
class Input:
    """An input of the model: name, "int64" or "float32", shape (names are dynamic axes), and what a caller
    who leaves it out gets ("ones", "zeros"; "" when it must be given); limit: ids lie below it, 0 for none."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    default: str = ""
    limit: int = 0


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one sentence vector: "cls", "mean" or "max", then unit length or not."""

    mode: str
    normalize: bool


@dataclass(frozen=True)
class EncoderBackbone(Backbone):
    """A loaded encoder or vision model. called: its layers by module name, in the order of their first call."""

    task: str
    model: nn.Module = field(repr=False)
    inputs: tuple[Input, ...]
    pooling: Pooling | None
    called: dict[str, Layer] = field(repr=False)

    @property
    def layers(self) -> dict[str, Layer]:
        """The plain linear layers and embeddings that the model calls."""
        return self.called

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @property
    def reads_text(self) -> bool:
        """Whether token ids go in, and not pixels."""
        return self.inputs[0].name == "input_ids"

    @property
    def context(self) -> int:
        """Tokens of the longest text, as its own tables say; 0 for pixels."""
        return find_text_context(self.model) if self.reads_text else 0

    @property
    def traits(self) -> dict[str, str | int]:
        """Family and heads."""
        return {"family": self.config.model_type, "heads": getattr(self.config, "num_attention_heads", 0)}

    def read_state(self) -> Mapping[str, Tensor]:
        """What the directory's weight files hold, integer buffers left out.

        Names as in the file, which do not change with the version of transformers.
        """
        return {name: tensor for name, tensor in read_weights(Path(self.path)).items() if tensor.is_floating_point()}

    def split_state(self, sites: Container[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The layers' weights and their biases; all else stays in the model."""
        modules = {name: self.model.get_submodule(name) for name in self.called}
        weights = {f"{name}.weight": module.get_parameter("weight").detach() for name, module in modules.items()}
        biased = {name: module for name, module in modules.items() if self.called[name].bias}
        return weights, {f"{name}.bias": module.get_parameter("bias").detach() for name, module in biased.items()}


def is_encoder(model_dir: Path) -> bool:
    """Whether a directory's config.json describes an encoder or vision model. Reads nothing else."""
    file = model_dir / "config.json"
    if not file.is_file():
        return False
    config = read_json(file)
    kept_apart = config.get("is_encoder_decoder") or config.get("is_decoder") or config.get("model_type") in [*FAMILIES]
    return not kept_apart and find_architecture(config).endswith(tuple(TASKS))


def find_architecture(config: Mapping[str, Any]) -> str:
    """The first class that a config.json names, or empty."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def find_text_context(model: nn.Module) -> int:
    """Tokens of the longest text that a model takes.

    A position table with a padding row gives the first token the row after it, so that the rows up to it are never a
    token's. A model without a table of positions says what it was trained for.

    Source: transformers, RobertaEmbeddings.create_position_ids_from_input_ids.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    return int(getattr(model.config, "max_position_embeddings", 0)) or UNTOLD_CONTEXT


def read_encoder_backbone(path: Path) -> EncoderBackbone:
    """Load an encoder or vision model in float32.

    Raises:
        LimeEdgeError: quantized already, unknown task, weights missing, not finite, or a model that does not run.
    """
    refuse_prequantized(path, float8=False)
    architecture = find_architecture(read_config(path / "config.json"))
    task = infer_task(architecture, path)
    check_size(path, architecture)
    model = load_model(path, task, architecture)
    inputs = list_inputs(model, path)
    with reading(f"{path}: the model does not run", "do its config.json and its weights belong together?"):
        called = watch_layers(model, make_sample(inputs))
    name = plain_name(path.resolve().name)
    return EncoderBackbone(str(path), name, task, model, inputs, read_pooling(path), called)


def check_size(path: Path, architecture: str) -> None:
    """Refuse a config.json that describes a far larger model than the weights beside it: it would be built first.

    Raises:
        LimeEdgeError: more numbers than the files hold.
    """
    import transformers

    held = read_weights(path)
    layers = count_layers(read_config(path / "config.json"))
    with reading(f"{path / 'config.json'}: not a readable model config", "is this what save_pretrained writes?"):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model = getattr(transformers, architecture)(config) if layers <= len(held) else None
    wanted = sum(one.numel() for one in model.parameters()) if model is not None else math.inf
    if wanted > 2 * sum(tensor.numel() for tensor in held.values()) + (1 << 24):
        raise LimeEdgeError(f"{path}: config.json describes a far larger model than its weights are", AGAIN)


def infer_task(architecture: str, path: Path) -> str:
    """The task of a model class, from optimum's TasksManager; by its name where that has no entry.

    Raises:
        LimeEdgeError: no such class in transformers, or a task that is not an encoder's.
    """
    import transformers

    tasks = _tasks_manager()
    known = getattr(transformers, architecture, None) if architecture.isidentifier() else None
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        raise LimeEdgeError(
            f"{path / 'config.json'}: architectures: {architecture!r} is no class of transformers",
            "upgrade transformers, or mend architectures in config.json",
        )
    try:
        task = tasks.infer_task_from_model(known)
    except ValueError:  # classes that share a family's entry with others (DeiT's two heads)
        task = next((task for suffix, task in TASKS.items() if architecture.endswith(suffix)), "unknown")
    if task not in TASKS.values():
        raise LimeEdgeError(
            f"{path}: {architecture} does {task}, which cannot be exported as an encoder",
            f"these can: {', '.join(dict.fromkeys(TASKS.values()))}",
        )
    return task


def load_model(path: Path, task: str, architecture: str) -> nn.Module:
    """The model through TasksManager, float32, eval mode, eager attention (the plain operators).

    Raises:
        LimeEdgeError: unreadable, another class than the config names, or weights missing.
    """
    tasks = _tasks_manager()
    with reading(f"{path}: not a readable model"), quiet():
        model, info = tasks.get_model_from_task(
            task,
            path,
            framework="pt",
            library_name="transformers",
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    if type(model).__name__ != architecture:
        raise LimeEdgeError(
            f"{path}: task {task}: expected {architecture}, loaded {type(model).__name__}",
            "name the loaded class in config.json, or save the model with its own class",
        )
    keys = ("missing_keys", "unexpected_keys")
    missing, extra = (info[key] if isinstance(info, dict) else getattr(info, key) for key in keys)
    refuse_checkpoint(extra, str(path), "a model")
    hint = "save the whole model with its own class: what is missing would be random"
    with Faults(str(path), hint) as faults:
        for name in sorted(missing):
            faults.add(f"tensor {name} is missing")
        for name, tensor in model.named_parameters():
            if not torch.isfinite(tensor).all():
                faults.add(f"tensor {name} holds NaN or infinite values")
    return model.float().eval().requires_grad_(False)


def list_inputs(model: nn.Module, path: Path) -> tuple[Input, ...]:
    """The inputs that the model's forward takes, of those this exporter knows how to feed.

    Raises:
        LimeEdgeError: neither token ids nor pixels go in.
    """
    config: Any = model.config
    taken = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "")
    if main == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return (Input("pixel_values", "float32", ("batch", config.num_channels, height, width)),)
    if main != "input_ids":
        raise LimeEdgeError(
            f"{path}: the model reads {main or 'nothing known'}",
            "models that read input_ids or pixel_values can be exported",
        )
    text = ("batch", "sequence")
    inputs = [Input("input_ids", "int64", text, "", config.vocab_size)]
    inputs.append(Input("attention_mask", "int64", text, "ones", 2))
    types = getattr(config, "type_vocab_size", 0)
    if types > 1 and "token_type_ids" in taken:
        inputs.append(Input("token_type_ids", "int64", text, "zeros", types))
    return tuple(inputs)


def make_sample(inputs: tuple[Input, ...]) -> dict[str, Tensor]:
    """Inputs of no meaning but the right shapes: (2, 7) token ids, or two images."""
    axes = {"batch": SAMPLE_BATCH, "sequence": SAMPLE_LENGTH}
    sample: dict[str, Tensor] = {}
    for entry in inputs:
        shape = [axes[size] if isinstance(size, str) else size for size in entry.shape]
        if entry.dtype == "float32":
            sample[entry.name] = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
        else:
            ids = torch.arange(torch.Size(shape).numel()).view(shape) % max(entry.limit, 1)
            sample[entry.name] = torch.ones_like(ids) if entry.default == "ones" else ids
            if entry.default == "zeros":
                sample[entry.name] = torch.zeros_like(ids)
    return sample


def read_pooling(path: Path) -> Pooling | None:
    """What sentence-transformers does after the model, from modules.json; None without that file.

    Raises:
        LimeEdgeError: a module or a mode that is not known here.
    """
    if not (path / "modules.json").is_file():
        return None
    hint = "remove modules.json to export token vectors alone"
    try:
        modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        steps = [(str(module["type"]).rsplit(".", 1)[-1], str(module["path"])) for module in modules]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise LimeEdgeError(f"{path / 'modules.json'}: not readable: {error!r}", hint) from None
    if [kind for kind, _ in steps] not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        found = ", ".join(kind for kind, _ in steps)
        raise LimeEdgeError(f"{path / 'modules.json'}: expected Transformer, Pooling, Normalize, found {found}", hint)
    if PurePath(steps[1][1]).name != steps[1][1]:
        raise LimeEdgeError(f"{path / 'modules.json'}: {steps[1][1]!r:.80} is no folder beside it", hint)
    file = path / steps[1][1] / "config.json"
    config = read_json(file)
    chosen = [mode for mode, key in POOLINGS.items() if config.get(key) or config.get("pooling_mode") == mode]
    others = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or set(others) - set(POOLINGS.values()):
        raise LimeEdgeError(
            f"{file}: expected one pooling mode of {', '.join(POOLINGS)}, found "
            f"{', '.join([*chosen, *others]) or config.get('pooling_mode')}",
            hint,
        )
    return Pooling(chosen[0], len(steps) == 3)


@torch.no_grad()
def watch_layers(model: nn.Module, sample: dict[str, Tensor]) -> dict[str, Layer]:
    """Run the model once and list the plain linear layers and embeddings that were called, in order."""
    found: dict[str, tuple[nn.Module, int]] = {}
    inputs: list[Tensor] = []  # held, so that an address means one tensor
    hooks = []

    def note(name: str, module: nn.Module, x: Tensor) -> None:
        number = next((i for i, seen in enumerate(inputs) if seen is x), len(inputs))
        inputs.append(x)
        found.setdefault(name, (module, number))

    for name, module in model.named_modules():
        if _is_plain(module):
            hooks.append(module.register_forward_pre_hook(lambda m, x, n=name: note(n, m, x[0])))
    try:
        model(**sample)
    finally:
        for hook in hooks:
            hook.remove()
    readers = [number for _, number in found.values()]
    return {name: describe_layer(name, module, n, readers.count(n)) for name, (module, n) in found.items()}


def describe_layer(name: str, module: nn.Module, number: int, readers: int) -> Layer:
    """The facts of a linear layer or embedding.

    Args:
        name: module name; one without a number lies outside the repeated blocks.
        number: of the tensor that it reads. readers: layers that read it, this one included.
    """
    rows, columns = module.get_parameter("weight").shape
    embedding, bias = isinstance(module, nn.Embedding), getattr(module, "bias", None) is not None
    return Layer((rows, columns), embedding, bias, (number, name_place(name, (rows, columns), embedding, readers)))


def name_place(name: str, shape: tuple[int, int], embedding: bool, readers: int) -> str:
    """Which of `options.PLACES` a layer has, by its name and shape. Args: see `describe_layer`."""
    if embedding or not any(part.isdigit() for part in name.split(".")):
        return "head"
    if readers > 1 or "qkv" in name.lower():
        return "qkv"
    rows, columns = shape
    return "o" if rows == columns else "gate_up" if rows > columns else "down"


def _is_plain(module: nn.Module) -> bool:
    """Subclasses with a forward of their own (a scaled embedding, say) are not what we compile."""
    kind = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    return isinstance(module, kind) and type(module).forward is kind.forward


def _tasks_manager() -> Any:
    try:
        from optimum.exporters.tasks import TasksManager  # type: ignore[import-untyped]
    except ImportError as error:
        raise need("optimum", "export") from error
    return TasksManager
