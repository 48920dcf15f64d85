"""ONNX for vision-language models: the decoder's graphs as ever, and vision.onnx, from tiles to features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lime_edge.compiler.model.vision import CompiledVision
from lime_edge.exporters.onnx.decoder import write_decoder
from lime_edge.exporters.onnx.encoder import pack_product, write_traced
from lime_edge.exporters.onnx.external import WeightFile
from lime_edge.targets.entries import OnnxOptions

FILE, ROUTED_FILE = "vision.onnx", "vision_routed.onnx"
Progress = Callable[[str, int, int], None]


def write_vision(model: CompiledVision, directory: Path, options: OnnxOptions, progress: Progress) -> dict[str, Any]:
    """Write the decoder's files, vision.onnx, and vision_routed.onnx where experts are weighed in the tower.

    All of them take the same expert vector; each reads its own sites. The vision program computes in float32 on every
    device: pictures are read once, tokens are decoded one by one.

    Args:
        model: compiled; its integers are only re-packed. directory: exists, empty.
        options: the type of the decoder's activations. progress: called with (step, done, total).
    Returns:
        The target's manifest entry.
    Raises:
        LimeEdgeError: torch's exporter does not take the tower.
    """
    facts = write_decoder(model.language, directory, options, progress)
    module = model.tower.module
    metadata = {"fingerprint": model.fingerprint, "fold": model.fold, "quant": model.quant}
    weights = WeightFile(directory / f"{FILE}.data")
    routed = model.routing is not None and model.swaps and model.adapts_tower
    progress("write vision", 0, 1 + routed)
    with module.replace_products(pack_product):
        takes_expert = model.swaps and model.adapts_tower
        facts["vision_nodes"] = write_traced(module, directory / FILE, weights, takes_expert, metadata)
        facts["vision"] = f"onnx/{FILE}"
        progress("write vision", 1, 1 + routed)
        if routed:
            module.use_routing(True)
            try:
                write_traced(module, directory / ROUTED_FILE, weights, False, metadata)
            finally:
                module.use_routing(False)
            facts["vision_routed"] = f"onnx/{ROUTED_FILE}"
            progress("write vision", 2, 2)
    return facts
