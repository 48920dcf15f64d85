"""Vision-language models: a Hugging Face directory read as a decoder of ours and a tower of transformers'."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lime_edge.compiler.formats.adapter_checks import refuse_checkpoint
from lime_edge.compiler.formats.architecture import HEAD, Decoder, read_decoder
from lime_edge.compiler.formats.backbone import Backbone, Layer, Source, quiet
from lime_edge.compiler.formats.configs import count_layers, plain_name, read_config
from lime_edge.compiler.formats.decoder import DecoderBackbone, check_tensors, flatten_norms, read_eos
from lime_edge.compiler.formats.encoder import EncoderBackbone, Input, make_sample, watch_layers
from lime_edge.compiler.formats.families import WRAPPED
from lime_edge.compiler.formats.files import AGAIN, read_json, read_weights, reading
from lime_edge.compiler.formats.prequantized import refuse_prequantized
from lime_edge.compiler.formats.vision_families import REFUSED, VISION_FAMILIES, VisionFamily
from lime_edge.errors import Faults, LimeEdgeError

TASK = "image-features"


@dataclass(frozen=True)
class VisionBackbone(Backbone):
    """A language model that reads text and pictures.

    language: our decoder. tower: vision tower and projector, a model of its own. newline: the row after a line of
    tiles, or None. config: transformers'. image_tokens: the ids whose rows are replaced.
    """

    language: DecoderBackbone
    tower: EncoderBackbone
    family: VisionFamily = field(repr=False)
    config: Any = field(repr=False)
    newline: Tensor | None = field(repr=False)
    image_tokens: tuple[int, ...] = ()

    @property
    def layers(self) -> dict[str, Layer]:
        """The tower's, then the decoder's."""
        seen = {name: replace(layer, source=move_source(layer.source)) for name, layer in self.tower.layers.items()}
        return seen | self.language.layers

    @property
    def sees(self) -> bool:
        """Text goes in, and pictures too."""
        return True

    @property
    def scales(self) -> Mapping[str, float]:
        """The decoder's."""
        return self.language.scales

    @property
    def traits(self) -> Mapping[str, str | int]:
        """The decoder's, and the tower's patches."""
        vision = self.config.vision_config
        return {**self.language.traits, "tower": vision.model_type, "patch": vision.patch_size}

    def spell(self, name: str) -> str:
        """A module's name as transformers 5 has it."""
        return self.family.spell(name)

    def read_state(self) -> Mapping[str, Tensor]:
        """All tensors under their names in transformers 5; a tied head is not among them."""
        rest = {} if self.newline is None else {str(self.family.newline): self.newline}
        return {**self.language.tensors, **self.tower.model.state_dict(), **rest}

    def split_state(self, sites: Container[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tower's layers, then the decoder's; the patches' convolution stays in the tower."""
        weights, vectors = self.tower.split_state(sites)
        language = self.language.split_state(sites)
        return weights | language[0], vectors | language[1]


def move_source(source: Source) -> Source:
    """An input of the tower among those of the whole model, where a decoder's layers count from -1."""
    return (-2 - source[0], source[1])


def is_vision_language(path: Path) -> bool:
    """Whether a directory's config.json describes a model of text and pictures. Reads nothing else."""
    file = path / "config.json"
    if not file.is_file():
        return False
    config = read_json(file)
    kind, names = config.get("model_type"), config.get("architectures")
    if isinstance(kind, str) and kind in {*VISION_FAMILIES, *REFUSED}:
        return True
    if kind in [*WRAPPED]:
        return False  # its text alone is read, as a decoder
    writes = isinstance(names, list) and any(str(name).endswith("ForConditionalGeneration") for name in names)
    return writes and "vision_config" in config


def find_family(config: Mapping[str, Any], where: str) -> VisionFamily:
    """The family of a config.json.

    Raises:
        LimeEdgeError: one that cannot be read here, with the reason.
    """
    kind = str(config.get("model_type"))
    if kind not in VISION_FAMILIES:
        why = REFUSED.get(kind, "this family of vision-language models is not known here")
        raise LimeEdgeError(
            f"{where}: config.json: model_type: {kind!r:.80} cannot be exported: {why}",
            f"supported vision-language families: {', '.join(VISION_FAMILIES)}",
        )
    return VISION_FAMILIES[kind]


def read_vision_backbone(path: Path) -> VisionBackbone:
    """Read a vision-language model.

    Raises:
        LimeEdgeError: quantized already, a family or an option that is not supported, tensors missing, extra,
            mis-shaped or not finite.
    """
    refuse_prequantized(path)
    file = path / "config.json"
    facts = read_config(file)
    family = find_family(facts, str(path))
    state = {family.spell(name): tensor for name, tensor in read_weights(path).items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(family.ignored or ("\0",))}
    refuse_checkpoint(state, str(path), "a backbone")
    layers = max(count_layers(facts.get(part) or {}) for part in ("text_config", "vision_config"))
    if layers > len(state):
        raise LimeEdgeError(f"{file}: num_hidden_layers: {layers}, but there are {len(state)} tensors", AGAIN)
    config = read_transformers_config(path)
    with Faults(str(path), "is this what save_pretrained writes?") as faults:
        family.check(config, faults)
    text = {name: t for name, t in state.items() if name.startswith((f"{family.stem}.", f"{HEAD}."))}
    language = read_language(path, config, family, text)
    rest = {name: tensor for name, tensor in state.items() if name not in text}
    newline = take_newline(rest, family, language.decoder.hidden, str(path))
    tower = read_tower(path, config, family, rest)
    tokens = tuple(int(getattr(config, name)) for name in family.image_tokens)
    if not all(0 <= token < language.decoder.vocab for token in tokens):
        raise LimeEdgeError(f"{file}: image tokens {tokens}: expected ids below {language.decoder.vocab}", AGAIN)
    name = plain_name(path.resolve().name)
    return VisionBackbone(str(path), name, language, tower, family, config, newline, tokens)


def read_transformers_config(path: Path) -> Any:
    """The config as transformers has it, attention computed plainly."""
    from transformers import AutoConfig

    with reading(f"{path / 'config.json'}: not a readable model config", "is this what save_pretrained writes?"):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        config.vision_config._attn_implementation = "eager"
    return config


def read_language(path: Path, config: Any, family: VisionFamily, tensors: dict[str, Tensor]) -> DecoderBackbone:
    """The language model as a decoder of ours. The head is tied where the config says so and the file has no other."""
    with reading(f"{path}: not a model that can be built", "is this what save_pretrained writes?"):
        decoder: Decoder = replace(read_decoder(config.text_config, str(path)), stem=family.stem)
    head, table = tensors.get(f"{HEAD}.weight"), tensors.get(f"{decoder.embedding}.weight")
    told = bool(getattr(config, "tie_word_embeddings", False) or config.text_config.tie_word_embeddings)
    same = head is not None and table is not None and head.shape == table.shape and torch.equal(head, table)
    decoder = replace(decoder, tied=told and (head is None or same))
    checked = check_tensors(decoder, flatten_norms(tensors), str(path))
    eos_of = config if getattr(config, "eos_token_id", None) is not None else config.text_config
    return DecoderBackbone(str(path), path.name, decoder, checked, read_eos(path, eos_of, decoder.vocab))


def take_newline(rest: dict[str, Tensor], family: VisionFamily, hidden: int, where: str) -> Tensor | None:
    """The row after a line of tiles (hidden,) float32, taken out of `rest`; None where the family has none."""
    if family.newline is None:
        return None
    newline = rest.pop(family.newline, None)
    if newline is None or tuple(newline.shape) != (hidden,) or not torch.isfinite(newline).all():
        found = None if newline is None else tuple(newline.shape)
        raise LimeEdgeError(
            f"{where}: tensor {family.newline}: expected ({hidden},) finite numbers, found {found}", AGAIN
        )
    return newline.float()


def read_tower(path: Path, config: Any, family: VisionFamily, tensors: Mapping[str, Tensor]) -> EncoderBackbone:
    """Vision tower and projector with these tensors, float32.

    Raises:
        LimeEdgeError: tensors missing, extra, mis-shaped or not finite.
    """
    where, vision = str(path), config.vision_config
    hint = "is this what save_pretrained writes?"
    with reading(f"{path}: not a tower that can be built", hint), quiet(), torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in family.tower(config).state_dict().items()}
    with Faults(where, "config.json and the weights must come from the same model") as faults:
        for name, shape in shapes.items():
            tensor = tensors.get(name)
            if tensor is None:
                faults.add(f"tensor {name} is missing", expected=shape)
            elif tuple(tensor.shape) != shape:
                faults.add(f"tensor {name}", shape, tuple(tensor.shape))
            elif not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                faults.add(f"tensor {name} holds no finite numbers")
        for name in tensors.keys() - shapes.keys():
            faults.add(f"tensor {name} is not part of a {config.model_type} model")
    with quiet():
        model: nn.Module = family.tower(config).float()
    model.load_state_dict({name: tensors[name].float() for name in shapes})
    model.eval().requires_grad_(False)
    inputs = (Input("pixel_values", "float32", ("batch", vision.num_channels, vision.image_size, vision.image_size)),)
    with reading(f"{path}: the vision tower does not run", "do its config.json and its weights belong together?"):
        called = watch_layers(model, make_sample(inputs))
    return EncoderBackbone(where, plain_name(path.resolve().name), TASK, model, inputs, None, called)
