"""What a target says of its artifact in lime.json: the part that all targets have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from lime_edge.targets.values import Count, Facts, FilePath, Sha256, Strict, Text, Threads, Tokens, Virtual, Width

ROUTED = "routed"  # in the place of a file: the method or function of the artifact that routes


class Input(Strict, frozen=True, kw_only=True):
    """An input of an encoder's graph."""

    name: Text
    dtype: Literal["int64", "float32"]
    shape: Annotated[
        tuple[Width | Literal["batch", "sequence"], ...],
        Meta(min_length=1, max_length=8, description="axes by name vary"),
    ]
    limit: Annotated[Count, Meta(description="values are below it; 0: any")] = 0
    default: Annotated[
        Literal["", "ones", "zeros"], Meta(description="what a caller may leave out; empty: must be given")
    ] = ""


class Limits(Strict, frozen=True, kw_only=True):
    """The largest call of a static encoder."""

    batch: Annotated[int, Meta(ge=1, le=65536)]
    sequence: Annotated[Tokens | None, Meta(description="null where pixels come in")] = None


class TargetFacts(Strict, frozen=True, kw_only=True):
    """What every target says of its artifact; a target's own class adds to it and has its name as tag."""

    # kind of model -> fields that its artifact may not leave out
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {"decoder": ("layers",), "encoder": ("inputs", "outputs")}

    file: Annotated[FilePath, Meta(description="the artifact; Core ML, Core AI: a folder of files")]
    routed: Annotated[FilePath | None, Meta(description="the routed graph")] = None
    providers: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=16, description="in order of preference")]
    threads: Annotated[Threads | None, Meta(description="null: the engine chooses")] = None
    expert_input: Annotated[bool, Meta(description="false: one expert, in the weights")]
    compute: Annotated[
        Literal["float32", "float16", "int8-dynamic", "int8-per-token"],
        Meta(description="in what activations are computed: what verify allows for"),
    ]
    weight_hash: Sha256
    layers: Annotated[int, Meta(ge=0, le=4096, description="with a cache; 0: an encoder")] = 0
    virtual_tokens: Annotated[Virtual, Meta(description="prompt tuning: they come before a prompt")] = 0
    inputs: Annotated[tuple[Input, ...], Meta(max_length=64, description="of an encoder")] = ()
    outputs: Annotated[tuple[Text, ...], Meta(max_length=64, description="of an encoder")] = ()
    vision: Annotated[FilePath | None, Meta(description="the program that sees, of a vision-language model")] = None
    vision_routed: Annotated[FilePath | None, Meta(description="the same, routed; null where no site is in it")] = None
    report: Facts = {}

    @property
    def target(self) -> str:
        """The target's name: also its folder in the bundle."""
        return str(self.__struct_config__.tag)

    def list_paths(self) -> list[str]:
        """The files, or folders of files, that it speaks of."""
        paths = (self.file, self.routed, self.vision, self.vision_routed)
        return [path for path in paths if path is not None and path != ROUTED]
