"""ExecuTorch for vision-language models: the decoder's program, and vision.pte beside it, from tiles to features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.activations import GELUTanh

from lime_edge.compiler.model.vision import CompiledVision
from lime_edge.exporters.executorch.decoder import write_decoder
from lime_edge.exporters.executorch.encoder import BATCH, make_method, pack_product
from lime_edge.exporters.executorch.lower import Progress, lower
from lime_edge.exporters.executorch.program import activate
from lime_edge.targets.entries import ExecutorchOptions

FILE, METHOD, ROUTED_METHOD = "vision.pte", "vision_encoder", "vision_encoder_routed"


def write_vision(
    model: CompiledVision, directory: Path, options: ExecutorchOptions, progress: Progress
) -> dict[str, Any]:
    """Write model.pte as for a language model, with rows of pictures as one more input, and vision.pte.

    vision.pte has the method `vision_encoder`, as ExecuTorch's runners call it, and `vision_encoder_routed` where the
    checkpoint weighs experts in the tower.

    Args:
        model: compiled; its integers are only re-packed. directory: exists, empty. options: as for a language model.
        progress: called with (step, done, total).
    Returns:
        The target's manifest entry.
    Raises:
        LimeEdgeError: a backend that is not offered, or a model that cannot be lowered.
    """
    facts = write_decoder(model.language, directory, options, progress)
    limits, module = {"batch": BATCH}, model.tower.module
    takes_expert = model.swaps and model.adapts_tower
    routed = model.routing is not None and takes_expert
    with module.replace_products(pack_product), write_out_activations(module):
        methods = {METHOD: make_method(module, limits, takes_expert, routed=False)}
        if routed:
            methods[ROUTED_METHOD] = make_method(module, limits, False, routed=True)
        lower(methods, options.backend, {}, directory / FILE, progress)
    facts |= {"vision": f"executorch/{FILE}", "limits": limits}
    return facts | ({"vision_routed": "routed"} if routed else {})


@contextmanager
def write_out_activations(module: nn.Module) -> Iterator[None]:
    """The tower's gelu with tanh as its formula: XNNPACK would compute it with erf, 5e-4 off (see `activate`)."""
    found = [part for part in module.modules() if isinstance(part, GELUTanh)]
    kept = [part.act for part in found]
    for part in found:
        part.act = partial(activate, "gelu_pytorch_tanh")
    try:
        yield
    finally:
        for part, act in zip(found, kept, strict=True):
            part.act = act
