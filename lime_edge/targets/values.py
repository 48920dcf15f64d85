"""What the parts of lime.json are made of: strings and numbers, with what each may be."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

EXPERT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(?![\s\S])"  # the last part: nothing follows, no newline either
FILE_PATH = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}){0,7}(?![\s\S])"
PLAIN_TEXT = r"^(?![\s\S]*[\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069])"  # no control, no text direction
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?![\s\S])")]
FilePath = Annotated[str, Meta(pattern=FILE_PATH, max_length=512)]
ExpertName = Annotated[str, Meta(pattern=EXPERT_NAME)]
Text = Annotated[str, Meta(pattern=PLAIN_TEXT, max_length=512)]
Turn = Annotated[str, Meta(max_length=1 << 16)]  # a piece of a prompt: any characters
Count = Annotated[int, Meta(ge=0, le=1 << 31)]
Tokens = Annotated[int, Meta(ge=1, le=1 << 24)]
Layers = Annotated[int, Meta(ge=1, le=4096)]
Width = Annotated[int, Meta(ge=1, le=1 << 24)]
Threads = Annotated[int, Meta(ge=1, le=1024)]
Virtual = Annotated[int, Meta(ge=0, le=65536)]
Ratio = Annotated[float, Meta(ge=0, le=1e6)]
Facts = Annotated[dict[str, Any], Meta(description="for people: nothing reads it to run the model")]


class Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """What every part of the manifest is."""
