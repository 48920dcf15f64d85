"""lime.json, field by field (schema 2): types, ranges and meanings. docs/bundle.schema.json is made from this file.

Everything is frozen, a field that is not here is refused, and what is in range by itself is checked against the rest
of the manifest in `lime_edge.bundle.manifest`. Engines see only numbers that passed both.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, Union

from msgspec import Meta, field

from lime_edge.bundle.sites import SiteTable
from lime_edge.targets.entries import TARGETS
from lime_edge.targets.facts import TargetFacts
from lime_edge.targets.values import (
    Count,
    ExpertName,
    FilePath,
    Layers,
    Ratio,
    Sha256,
    Strict,
    Text,
    Turn,
    Width,
)

FORMAT, SCHEMA = "lime-edge-bundle", 2
FactsT = TypeVar("FactsT", bound=TargetFacts)
if TYPE_CHECKING:
    AnyFacts = TargetFacts
else:
    AnyFacts = Union[tuple(target.facts for target in TARGETS.values())]  # noqa: UP007 - as many as there are


class FileEntry(Strict, frozen=True, kw_only=True):
    """A file of the bundle."""

    size: Annotated[int, Meta(ge=0, le=1 << 50, description="bytes")]
    sha256: Annotated[Sha256, Meta(description="of its bytes, lower-case hex")]


class SiteEntry(Strict, frozen=True, kw_only=True):
    """An adapted layer and where it lies in the flat expert vector."""

    name: Annotated[Text, Meta(description="module name in the transformers model")]
    width: Annotated[Width, Meta(description="H, numbers in an expert vector")]
    offset: Annotated[Count, Meta(description="of its first number: the widths before it, added up")]


class ExpertEntry(Strict, frozen=True, kw_only=True):
    """An expert. Readers take its file from here and never make a file name of a name."""

    name: Annotated[ExpertName, Meta(description="also unique where letter case does not count; not none, not routed")]
    file: Annotated[FilePath, Meta(description="a safetensors file below `experts/`, listed in `files`")]
    added: Annotated[bool, Meta(description="came or changed after the export: PyTorch never ran it")] = False


class Always(Strict, frozen=True, tag_field="kind", tag="always", kw_only=True):
    """The expert acts on every token."""


class FromGenerationPrompt(Strict, frozen=True, tag_field="kind", tag="generation_prompt", kw_only=True):
    """The expert acts from where the assistant's turn opens; before it the original model reads (d = -p_ref)."""

    tokens: Annotated[
        int, Meta(ge=1, le=4096, description="how many tokens the opening of the turn has: the prompt's last ones")
    ]
    text: Annotated[Turn | None, Meta(description="the opening itself, equal to `prompts.opening`")] = None


class Fit(Strict, frozen=True, kw_only=True):
    """How the adapter was judged to belong to the backbone, at export (docs/adapter-format.md)."""

    verdict: Annotated[
        Literal["identical", "within tolerance", "any backbone", "not recorded"],
        Meta(
            description="identical: same values; any backbone: a misfit was overridden; not recorded: the adapter does "
            "not say what it was trained on"
        ),
    ]
    vectors: Annotated[Ratio | None, Meta(description="relative distance of norm weights and biases")] = None
    matrices: Annotated[Ratio | None, Meta(description="relative distance of matrices")] = None
    misfits: Annotated[tuple[Text, ...], Meta(description="what was overridden")] = ()


class Sketch(Strict, frozen=True, kw_only=True):
    """A few of the backbone's own values, by which another copy of it is recognised (docs/adapter-format.md)."""

    names: Annotated[Sha256, Meta(description="over names and shapes of all tensors, family and heads")]
    vocabulary: Annotated[Sha256 | None, Meta(description="over the tokenizer's tokens and ids; null without one")] = (
        None
    )
    vectors: Annotated[str, Meta(max_length=1 << 17, description="base64 of float32: values of 1-D tensors")]
    matrices: Annotated[str, Meta(max_length=1 << 17, description="base64 of float32: values of the others")]


class Backbone(Strict, frozen=True, kw_only=True):
    """The frozen base model."""

    name: Annotated[Text, Meta(description="as the export was given it")]
    family: Annotated[Text, Meta(description="llama, qwen2, bert, ...: model_type")]
    fingerprint: Annotated[Sha256, Meta(description="over names, shapes and float32 values of its tensors")]
    context: Annotated[int, Meta(ge=0, le=1 << 24, description="most tokens of a sequence; 0 where pixels come in")]
    vocab: Annotated[int, Meta(ge=0, le=1 << 24, description="token ids are below it; 0 where pixels come in")]
    hidden: Width
    layers: Layers
    sketch: Sketch | None = None
    fit: Fit = Fit(verdict="not recorded")


class DecoderFacts(Strict, frozen=True, kw_only=True):
    """What a language model's readers need besides."""

    heads: Annotated[int, Meta(ge=1, le=65536, description="of queries")]
    kv_heads: Annotated[int, Meta(ge=1, le=65536, description="of keys and values: the cache's")]
    head_dim: Annotated[int, Meta(ge=1, le=65536)]
    eos: Annotated[tuple[Count, ...], Meta(max_length=64, description="token ids that end an answer")] = ()


class EncoderFacts(Strict, frozen=True, kw_only=True):
    """What readers of an encoder or vision model need besides."""

    task: Text
    architecture: Annotated[Text, Meta(description="class in transformers")]
    labels: Annotated[tuple[Text, ...], Meta(max_length=1 << 17, description="by column of logits")] = ()
    inputs: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=64)]
    outputs: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=64)]


class VisionFacts(Strict, frozen=True, kw_only=True):
    """What readers of a vision-language model need besides the language model's facts (docs/vision.md)."""

    tile: Annotated[int, Meta(ge=1, le=4096, description="height and width of what the tower sees, in pixels")]
    patch: Annotated[int, Meta(ge=1, le=4096, description="of the tower, in pixels")]
    tower_layers: Layers
    tower_hidden: Width
    image_tokens: Annotated[
        tuple[Count, ...],
        Meta(min_length=1, max_length=8, description="ids whose rows are replaced by features: images', then videos'"),
    ]
    adapts_tower: Annotated[bool, Meta(description="an expert changes what is seen; else features serve all experts")]
    processor: Annotated[FilePath | None, Meta(description="how pictures become tiles; null: pixel_values only")] = None


class AdapterFacts(Strict, frozen=True, kw_only=True):
    """The LiME adapter."""

    variant: Literal["lora", "lora_fa", "dora", "slicefine", "prompt_tuning"]
    rank: Annotated[int, Meta(ge=1, le=1 << 20)]
    alpha: Annotated[float, Meta(ge=-1e9, le=1e9, description="the scale is alpha / rank")]
    fold: Annotated[Text, Meta(description="what went into the weights: shared, none or an expert's name")]
    single: Annotated[ExpertName | None, Meta(description="the bundle holds this expert alone and takes no other")] = (
        None
    )
    expert_dtype: Annotated[Literal["float16", "float32"], Meta(description="of expert files")]
    base: Annotated[Text | None, Meta(description="the base model's name in the adapter's configuration")] = None
    routing: Annotated[Text, Meta(description="how its experts were trained")] = "pinned"
    sha256: Annotated[Sha256 | None, Meta(description="of its adapter_model.safetensors")] = None
    shared_id: Annotated[
        Sha256 | None, Meta(description="over its shared vector and gamma, like adapter_id; null where it has none")
    ] = None
    license: Text | None = None


class KindSurvival(Strict, frozen=True, kw_only=True):
    """A kind of layer: medians and worst over its sites and the experts (docs/folding.md)."""

    sites: Count
    bits: Annotated[tuple[Count, ...], Meta(max_length=16)]
    error: Annotated[float, Meta(ge=0, description="0 exact, 1 as loud as the expert")]
    worst_error: Annotated[float, Meta(ge=0)]
    worst_site: Text
    kept: Annotated[float, Meta(description="share of the effect that is still there")]
    worst_kept: float


class SiteSurvival(Strict, frozen=True, kw_only=True):
    """One site: the worst over its experts."""

    error: Annotated[float, Meta(ge=0)]
    expert: Text
    kept: float


class Survival(Strict, frozen=True, kw_only=True):
    """What the rounded weights hold of the experts' effect, for people (docs/folding.md)."""

    inputs: Annotated[Text | None, Meta(description="which text was shown; null: all inputs counted alike")] = None
    kinds: Annotated[dict[Text, KindSurvival], Meta(max_length=4096)]
    sites: Annotated[dict[Text, SiteSurvival], Meta(max_length=65536)]


class CurvePoint(Strict, frozen=True, kw_only=True):
    """A size that could have been had, and how near its answers come to float32's on calibration text."""

    bytes: Annotated[int, Meta(ge=0, le=1 << 50, description="of the bundle, estimated")]
    same: Annotated[float, Meta(ge=0, le=1, description="share of tokens with float32's likeliest successor")]
    loss: Annotated[float, Meta(description="mean divergence of the next token's distribution from float32's, in nats")]


class Spending(Strict, frozen=True, kw_only=True):
    """Which matrices int8 was spent on, where a size was asked for."""

    chosen: Annotated[int, Meta(ge=0, le=1 << 50, description="bytes of the bundle, estimated before it was written")]
    bits: Annotated[float, Meta(ge=0, description="mean bits of a stored weight, scales included")]
    tokens: Annotated[Count, Meta(description="of calibration text that was listened to")]
    int8: Annotated[tuple[Text, ...], Meta(description="tensors at int8, the rest being int4")]
    curve: tuple[CurvePoint, ...]
    losses: Annotated[dict[Text, float], Meta(description="by first tensor of a unit: what int4 there alone costs")]


class Quantization(Strict, frozen=True, kw_only=True):
    """The integers, equal in all targets."""

    quant: Literal["int4", "int8", "none"]
    group: Annotated[int, Meta(ge=1, le=1 << 20, description="weights per int4 scale")]
    scheme: Literal["symmetric", "asymmetric"]
    rounding: Text
    calibration: Text | None = None
    matrices: Annotated[dict[Text, Count], Meta(description="how many of each width, int4 and int8")]
    weight_bytes: Annotated[int, Meta(ge=0, le=1 << 50)]
    fallback_int8: Annotated[tuple[Text, ...], Meta(description="what the group does not divide")] = ()
    weight_hash: Annotated[Sha256, Meta(description="over canonical integers and scales")]
    survival: Survival | None = None
    spending: Spending | None = None


class Speaker(Strict, frozen=True, kw_only=True):
    """What stands around one role's text."""

    prefix: Turn
    suffix: Turn


class Prompts(Strict, frozen=True, kw_only=True):
    """The chat template as text around each turn: `begin`, prefix, text and suffix of each, `opening`.

    Equal to the template on every conversation that was tried at export; a template that cannot be written so has a
    `reason` and no roles: phones then take complete prompts, Python renders the template itself (docs/prompts.md).
    """

    begin: Annotated[Turn, Meta(description="before everything, the first token's text included")] = ""
    roles: Annotated[dict[Text, Speaker], Meta(max_length=16, description="system, user, assistant")] = {}
    opening: Annotated[Turn, Meta(description="at the end: opens the assistant's turn that is to be written")] = ""
    closing: Annotated[Turn, Meta(description="at the end where no turn is to be written")] = ""
    default_system: Annotated[
        Turn | None, Meta(description="text of a system turn that goes first where the conversation has none")
    ] = None
    system_opens_user: Annotated[
        bool, Meta(description="the system turn stands inside the user's: the turn after it has no prefix")
    ] = False
    strip: Annotated[
        tuple[Text, ...], Meta(max_length=16, description="roles whose text loses white space at both ends")
    ] = ()
    order: Annotated[
        Literal["any", "alternating"],
        Meta(description="alternating: a system turn or none, then user and assistant in turn; others are refused"),
    ] = "any"
    reason: Annotated[Text | None, Meta(description="why there are no roles")] = None


class TokenizerFacts(Strict, frozen=True, kw_only=True):
    """How text becomes ids, for readers that bring no tokenizer library."""

    file: Annotated[FilePath, Meta(description="tokenizer.json, in the Hugging Face tokenizers format")]
    kind: Annotated[Text, Meta(description="byte-bpe, bpe, wordpiece, unigram, or another model type as it is named")]
    split: Annotated[
        Text | None,
        Meta(description="name of the way text is cut before merging (docs/bundle-format.md), null: none of them"),
    ] = None
    classes: Annotated[FilePath | None, Meta(description="ranges of letters, numbers and spaces that the cut uses")] = (
        None
    )
    begin: Annotated[
        tuple[Count, ...], Meta(max_length=64, description="ids before a text where special tokens are asked for")
    ] = ()
    end: Annotated[tuple[Count, ...], Meta(max_length=64, description="ids after it")] = ()


class Companion(Strict, frozen=True, kw_only=True):
    """Files for another engine on the same artifact; every one of them is in `files`."""

    target: Annotated[Text, Meta(description="whose artifact it goes with")]
    folder: Annotated[FilePath, Meta(description="where it lies")]
    form: Annotated[
        Literal["onnx_adapter"] | None, Meta(description="of its expert files, and how they end; null: it has none")
    ] = None
    experts: Annotated[
        dict[ExpertName, FilePath], Meta(description="a file per expert, kept in step with `experts`")
    ] = {}


class ExportFacts(Strict, frozen=True, kw_only=True):
    """What the export took."""

    seconds: Annotated[float, Meta(ge=0, le=1e9)]
    peak_memory: Annotated[int, Meta(ge=0, le=1 << 50, description="bytes, resident, of the process")]


class Manifest(Strict, frozen=True, dict=True, kw_only=True):
    """What lime.json says."""

    manifest_sha256: Annotated[
        Sha256, Meta(description="of lime.json itself, read with 64 zeros in place of these 64 digits")
    ] = "0" * 64
    format: Literal["lime-edge-bundle"] = "lime-edge-bundle"
    schema: Annotated[Literal[2], Meta(description="readers refuse any other")] = 2
    kind: Literal["decoder", "encoder", "vision-language"]
    adapter_id: Annotated[Sha256, Meta(description="what an expert fits, see Identity")]
    device: Annotated[Text, Meta(description="the `device` of the export")] = "cpu"
    backbone: Backbone
    decoder: DecoderFacts | None = None
    encoder: EncoderFacts | None = None
    vision: Annotated[VisionFacts | None, Meta(description="of a vision-language model, beside `decoder`")] = None
    adapter: AdapterFacts
    quantization: Quantization
    default: Annotated[Text, Meta(description="what a bundle opens with: an expert's name, none or routed")]
    activation: Annotated[Always | FromGenerationPrompt, Meta(description="on which tokens the expert acts")] = Always()
    prompts: Annotated[Prompts | None, Meta(description="null for a model that holds no conversations")] = None
    tokenizer: TokenizerFacts | None = None
    expert_list: Annotated[tuple[ExpertEntry, ...], Meta(max_length=65536, description="in order")] = field(
        name="experts", default=()
    )
    target_list: Annotated[
        tuple[AnyFacts, ...], Meta(min_length=1, max_length=8, description="the first is what open takes by itself")
    ] = field(name="targets")
    companions: Annotated[
        dict[Text, Companion], Meta(max_length=16, description="by name, written when asked for")
    ] = {}
    versions: Annotated[dict[Text, Text], Meta(max_length=64, description="of the packages that made it")] = {}
    export: ExportFacts | None = None
    site_list: Annotated[
        tuple[SiteEntry, ...], Meta(min_length=1, max_length=65536, description="in the order of the expert vector")
    ] = field(name="sites")
    files: Annotated[
        dict[FilePath, FileEntry],
        Meta(max_length=1 << 18, description="every other file of the bundle, lime.json left out"),
    ] = {}

    @cached_property
    def sites(self) -> SiteTable:
        """The adapted layers, in order."""
        return SiteTable.from_widths((site.name, site.width) for site in self.site_list)

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(entry.name for entry in self.expert_list)

    def find_expert(self, name: str) -> FileEntry:
        """Size and sha256 of an expert's file."""
        return self.files[self.expert_files[name]]

    @cached_property
    def expert_files(self) -> dict[str, str]:
        """Where each expert is, by name."""
        return {entry.name: entry.file for entry in self.expert_list}

    @cached_property
    def added(self) -> tuple[str, ...]:
        """Experts that came or changed after the export."""
        return tuple(entry.name for entry in self.expert_list if entry.added)

    @cached_property
    def targets(self) -> dict[str, TargetFacts]:
        """By name (onnx, executorch, coreml), in order."""
        return {facts.target: facts for facts in self.target_list}

    def facts_of(self, kind: type[FactsT]) -> FactsT:
        """What it says of one target, by that target's class; the bundle was exported for it."""
        return next(facts for facts in self.target_list if isinstance(facts, kind))
