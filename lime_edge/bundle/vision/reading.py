"""processor.json: which family's processor a bundle has, read and written."""

from __future__ import annotations

from pathlib import Path

import msgspec

from lime_edge.bundle.vision.llava import LlavaProcessor
from lime_edge.bundle.vision.smolvlm import SmolProcessor
from lime_edge.errors import LimeEdgeError

FILE = "preprocessor/processor.json"
LARGEST = 8 << 20  # bytes
AnyProcessor = LlavaProcessor | SmolProcessor


def decode_processor(data: bytes, where: str) -> AnyProcessor:
    """A processor from its file's bytes.

    Raises:
        LimeEdgeError: not JSON, a family that is not known, or a setting that is missing, unknown or out of range.
    """
    try:
        if len(data) > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MB")
        found: AnyProcessor = msgspec.json.decode(data, type=AnyProcessor)
        check_processor(found)
    except (ValueError, RecursionError) as error:
        raise LimeEdgeError(f"{where}: {error}", "the bundle is damaged, or of a newer lime-edge") from None
    return found


def check_processor(processor: AnyProcessor) -> None:
    """Raise ValueError where settings contradict each other, or ask for more than a device can hold."""
    if any(not 1e-6 < std < 1e6 for std in processor.std) or any(abs(mean) > 1e6 for mean in processor.mean):
        raise ValueError("mean or std: no numbers to normalise with")
    if isinstance(processor, LlavaProcessor):
        for height, width in processor.grids:
            if min(height, width) < 1 or height % processor.tile or width % processor.tile:
                raise ValueError(f"grids: expected multiples of {processor.tile}, found {height} x {width}")
            if height * width > 1 << 26:
                raise ValueError(f"grids: {height} x {width} is too large")
        if len(processor.newline) % 4 or processor.line_end.size < 1:
            raise ValueError("newline: no row of numbers")
    elif not 1 <= processor.edge <= 1 << 14:
        raise ValueError(f"edge: {processor.edge} pixels")


def write_processor(processor: AnyProcessor, stage: Path) -> None:
    """Put processor.json into a staged bundle, where its folder may exist already."""
    (stage / FILE).parent.mkdir(exist_ok=True)
    (stage / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(processor), indent=1) + b"\n")
