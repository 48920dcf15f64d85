"""The kinds of model: what a workstation must know of each. A model's kind is found here, once, when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from lime_edge.bundle.golden import Golden
from lime_edge.bundle.prompts import TextCodec
from lime_edge.compiler.formats.activation import count_header
from lime_edge.compiler.formats.adapter import read_adapter
from lime_edge.compiler.formats.adapter_checks import PROMPT
from lime_edge.compiler.formats.backbone import Backbone
from lime_edge.compiler.formats.checkpoint import Checkpoint, pair
from lime_edge.compiler.formats.decoder import DecoderBackbone, read_decoder_backbone
from lime_edge.compiler.formats.encoder import EncoderBackbone, is_encoder, read_encoder_backbone
from lime_edge.compiler.formats.vision import VisionBackbone, is_vision_language, read_vision_backbone
from lime_edge.compiler.maths.prompt_tuning import fold_prompt
from lime_edge.compiler.model.compiled import Compiled, CompiledModel
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.model.encoder import CompiledEncoder, EncoderModule
from lime_edge.compiler.model.oracle import Encode, ask_decoder, ask_encoder
from lime_edge.compiler.model.vision import CompiledVision, VisionReader
from lime_edge.compiler.model.vision_oracle import ask_vision
from lime_edge.compiler.options import Progress
from lime_edge.compiler.rounding.calibrate import Render, render_exchange
from lime_edge.compiler.rounding.grams import Reader
from lime_edge.errors import LimeEdgeError

B = TypeVar("B", bound=Backbone)
C = TypeVar("C", bound=Compiled)


@dataclass(frozen=True)
class Padding:
    """Who leaves a padding id of an adapted embedding alone: the folded table, or the layer at run time."""

    folded: int | None = None
    skipped: int | None = None


@dataclass(frozen=True)
class ModelKind(Generic[B, C]):
    """What differs between kinds of model from the checkpoint to the bundle.

    Attributes:
        name: in the manifest, and of the file in every exporter's folder that writes it.
        backbone: what `read` gives. recognise: whether a path holds this kind.
        place_padding: of a checkpoint; True for a single expert.
        assemble: the compiled model from what all kinds have. run: what runs it over text.
        ask: the oracle's golden outputs. speak: how calibration text is read and how an exchange is written.
        describe: the manifest's facts of the model. holds_cache: it keeps what it has read.
    """

    name: str
    backbone: type[B]
    recognise: Callable[[Path], bool]
    read: Callable[[Path], B]
    place_padding: Callable[[Checkpoint[B], bool], Padding]
    assemble: Callable[[Checkpoint[B], Compiled], C]
    run: Callable[[C], Reader]
    ask: Callable[[C, Encode | None, Progress], Golden]
    speak: Callable[[B, TextCodec], tuple[Encode, Render]]
    describe: Callable[[B, C], dict[str, Any]]
    holds_cache: bool


def find_kind(model: Path) -> ModelKind[Any, Any]:
    """The kind of a model that is not read yet; what nobody knows is read, and refused, as a decoder."""
    return next(kind for kind in KINDS if kind.recognise(model))


def kind_of(backbone: B) -> ModelKind[B, Any]:
    """The kind of a model that is read."""
    return next(kind for kind in KINDS if isinstance(backbone, kind.backbone))


def read_checkpoint(model: Path, adapter: Path, any_backbone: bool = False) -> Checkpoint[Any]:
    """Read both halves and check that they belong together.

    Args:
        model: Hugging Face directory or GGUF file. adapter: LiME adapter directory. any_backbone: see `pair`.
    Raises:
        LimeEdgeError: faults of either half, or of the pair, all at once.
    """
    read = read_adapter(adapter)
    return pair(find_kind(model).read(model), read, any_backbone)


def pad_decoder(checkpoint: Checkpoint[DecoderBackbone], single: bool) -> Padding:
    """The table leaves the id alone; a residual that comes from outside is then harmless there.

    Raises:
        LimeEdgeError: what the table cannot do alone: a multiplied row, or a scale that reads the row's branch.
    """
    adapter = checkpoint.adapter
    if adapter.pad_token_id is None or not any(site.embedding for site in adapter.sites.values()):
        return Padding()
    if not adapter.variant.folds or adapter.routing != "pinned":
        raise LimeEdgeError(
            f"{adapter.path}: an embedding site that leaves pad_token_id alone cannot be exported "
            "with SliceFine or with routing",
            "remove pad_token_id from the adapter",
        )
    return Padding(folded=adapter.pad_token_id)


def pad_encoder(checkpoint: Checkpoint[EncoderBackbone], single: bool) -> Padding:
    """A single expert's table leaves the id alone; otherwise the layer gives that row back by d = -p_ref.

    Its branch is whole then, since routing's scale reads it.
    """
    pad = checkpoint.adapter.pad_token_id
    return Padding(folded=pad) if single else Padding(skipped=pad)


def assemble_decoder(checkpoint: Checkpoint[DecoderBackbone], common: Compiled) -> CompiledModel:
    """A language model, prompt tuning's tokens folded."""
    adapter, virtual = checkpoint.adapter, None
    if PROMPT in adapter.sites and not adapter.variant.adapts_layers:
        site = adapter.sites[PROMPT]
        assert site.prompt_base is not None and site.prompt_delta is not None
        virtual = fold_prompt(
            site.prompt_base, site.prompt_delta, common.reference, adapter.conditioning, site.input_proj
        )
    decoder, header = checkpoint.backbone.decoder, count_header(adapter)
    return CompiledModel(**common.common(), decoder=decoder, virtual=virtual, header=header)


def assemble_encoder(checkpoint: Checkpoint[EncoderBackbone], common: Compiled) -> CompiledEncoder:
    """An encoder or vision model."""
    return CompiledEncoder(**common.common(), backbone=checkpoint.backbone)


def pad_vision(checkpoint: Checkpoint[VisionBackbone], single: bool) -> Padding:
    """As a language model: the table is its."""
    return pad_decoder(checkpoint, single)  # type: ignore[arg-type]


def assemble_vision(checkpoint: Checkpoint[VisionBackbone], common: Compiled) -> CompiledVision:
    """A vision-language model."""
    header = count_header(checkpoint.adapter)
    return CompiledVision(**common.common(), backbone=checkpoint.backbone, header=header)


def speak_decoder(backbone: DecoderBackbone, codec: TextCodec) -> tuple[Encode, Render]:
    """No special tokens but those of the model's chat template."""
    template = partial(codec.render_chat, open_turn=False) if codec.can_chat else None
    return codec.encode, render_exchange(template)


def speak_vision(backbone: VisionBackbone, codec: TextCodec) -> tuple[Encode, Render]:
    """As its language model."""
    return speak_decoder(backbone.language, codec)


def speak_encoder(backbone: EncoderBackbone, codec: TextCodec) -> tuple[Encode, Render]:
    """Special tokens added, as long as the model's tables."""

    def encode(text: str) -> list[int]:
        return codec.encode(text, add_special_tokens=True)[: backbone.context or None]

    return encode, render_exchange(None)


def describe_decoder(backbone: DecoderBackbone, compiled: CompiledModel) -> dict[str, Any]:
    """Sizes, context and end-of-text ids."""
    decoder = compiled.decoder
    return {
        "name": backbone.name,
        "family": decoder.family,
        "context": decoder.context,
        "vocab": decoder.vocab,
        "hidden": decoder.hidden,
        "layers": len(decoder.layers),
        "heads": decoder.heads,
        "kv_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "eos": list(backbone.eos),
    }


def describe_encoder(backbone: EncoderBackbone, compiled: CompiledEncoder) -> dict[str, Any]:
    """Task, sizes, labels, inputs and outputs."""
    config = backbone.config
    labels = config.id2label if backbone.task.endswith("classification") else {}
    return {
        "name": backbone.name,
        "task": backbone.task,
        "family": config.model_type,
        "architecture": type(backbone.model).__name__,
        "context": backbone.context,
        "vocab": getattr(config, "vocab_size", 0),
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "labels": [labels[index] for index in sorted(labels)],
        "inputs": [entry.name for entry in backbone.inputs],
        "outputs": list(compiled.module.outputs),
    }


def describe_vision(backbone: VisionBackbone, compiled: CompiledVision) -> dict[str, Any]:
    """What its language model says, under its own family, and its tower's shape."""
    vision, features = backbone.config.vision_config, compiled.backbone.tower
    pixels = features.inputs[0].shape
    return describe_decoder(backbone.language, compiled.language) | {
        "name": backbone.name,
        "family": backbone.config.model_type,
        "tile": pixels[2],
        "patch": vision.patch_size,
        "tower_layers": vision.num_hidden_layers,
        "tower_hidden": vision.hidden_size,
        "image_tokens": list(backbone.image_tokens),
        "adapts_tower": compiled.adapts_tower,
    }


DECODER = ModelKind(
    name="decoder",
    backbone=DecoderBackbone,
    recognise=lambda _: True,
    read=read_decoder_backbone,
    place_padding=pad_decoder,
    assemble=assemble_decoder,
    run=DecoderModule,
    ask=ask_decoder,
    speak=speak_decoder,
    describe=describe_decoder,
    holds_cache=True,
)
ENCODER = ModelKind(
    name="encoder",
    backbone=EncoderBackbone,
    recognise=is_encoder,
    read=read_encoder_backbone,
    place_padding=pad_encoder,
    assemble=assemble_encoder,
    run=EncoderModule,
    ask=ask_encoder,
    speak=speak_encoder,
    describe=describe_encoder,
    holds_cache=False,
)
VISION = ModelKind(
    name="vision-language",
    backbone=VisionBackbone,
    recognise=is_vision_language,
    read=read_vision_backbone,
    place_padding=pad_vision,
    assemble=assemble_vision,
    run=VisionReader,
    ask=ask_vision,
    speak=speak_vision,
    describe=describe_vision,
    holds_cache=True,
)
KINDS: tuple[ModelKind[Any, Any], ...] = (VISION, ENCODER, DECODER)  # the first that recognises a model has it
