"""ExecuTorch for encoders and vision models: the compiled module traced, the compiler's integers as they are."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lime_edge.compiler.formats.encoder import make_sample
from lime_edge.compiler.model.encoder import CompiledEncoder, EncoderModule
from lime_edge.compiler.model.encoder_layers import StoredProduct as CompiledProduct
from lime_edge.compiler.model.encoder_layers import StoredTable as CompiledTable
from lime_edge.errors import need
from lime_edge.targets.entries import ExecutorchOptions

try:
    from lime_edge.exporters.executorch.lower import Method, Progress, check_backend, lower
    from lime_edge.exporters.executorch.weights import PackedTable, Product
except ImportError as error:  # pragma: no cover - exercised in a bare environment
    raise need((error.name or "executorch").split(".")[0], "executorch") from error

FILE = "model.pte"
BATCH = 8  # most inputs of one call: memory is planned for it
LONGEST = 512  # tokens; a longer context is cut here, for the same reason


def write_encoder(
    compiled: CompiledEncoder, directory: Path, options: ExecutorchOptions, progress: Progress
) -> dict[str, Any]:
    """Write model.pte: `forward`, and `routed` where the checkpoint routes, on the same weights.

    Args:
        compiled: its integers are only re-packed. directory: exists, empty. options: its backend.
        progress: called with (step, done, total).
    Returns:
        The target's manifest entry.
    Raises:
        LimeEdgeError: a backend or group size that is not offered, or a model that cannot be lowered.
    """
    provider = check_backend(options.backend, compiled.quant)
    limits = choose_limits(compiled)
    takes_expert, routed = compiled.single is None, compiled.routing is not None
    with compiled.module.replace_products(pack_product):
        methods = {"forward": make_method(compiled.module, limits, takes_expert, routed=False)}
        if routed:
            methods["routed"] = make_method(compiled.module, limits, False, routed=True)
        counts = lower(methods, options.backend, {}, directory / FILE, progress)
    facts = {
        "file": f"executorch/{FILE}",
        "executorch": version("executorch"),
        "providers": [provider],
        "backend": options.backend,
        "expert_input": takes_expert,
        "limits": limits,
        "inputs": [asdict(entry) | {"shape": list(entry.shape)} for entry in compiled.module.inputs],
        "outputs": list(compiled.module.outputs),
        "weight_hash": compiled.weight_hash(),
        "compute": "float32" if compiled.quant == "none" else "int8-per-token",
        "delegation": {name: asdict(count) for name, count in counts.items()},
    }
    return facts | ({"routed": "routed"} if routed else {})


def choose_limits(compiled: CompiledEncoder) -> dict[str, int]:
    """The most inputs of one call and, of a text, tokens."""
    context = compiled.backbone.context
    return {"batch": BATCH} | ({"sequence": min(context, LONGEST)} if context else {})


def pack_product(product: CompiledProduct | CompiledTable) -> nn.Module:
    """A layer's product as this target computes it."""
    return (
        Product([product.stored], product.bias) if isinstance(product, CompiledProduct) else PackedTable(product.stored)
    )


def make_method(module: EncoderModule, limits: dict[str, int], takes_expert: bool, routed: bool) -> Method:
    """`forward` or `routed` with dynamic batch and, for text, dynamic length."""
    axes = {name: torch.export.Dim(name, min=1, max=limit) for name, limit in limits.items()}
    inputs = list(make_sample(module.inputs).values())
    shapes: list[Any] = [
        {index: axes[size] for index, size in enumerate(entry.shape) if isinstance(size, str)}
        for entry in module.inputs
    ]
    if takes_expert:
        inputs, shapes = [*inputs, torch.zeros(module.sites.total)], [*shapes, None]
    return Method(EncoderMethod(module, takes_expert, routed), tuple(inputs), (tuple(shapes),))


class EncoderMethod(nn.Module):
    """The module as a function of exactly a method's inputs."""

    def __init__(self, module: EncoderModule, takes_expert: bool, routed: bool):
        super().__init__()
        self.module, self.takes_expert, self.routed = module, takes_expert, routed

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The module's outputs; a method without an expert gets zeros, which nothing reads."""
        self.module.use_routing(self.routed)
        try:
            residual = () if self.takes_expert else (torch.zeros(self.module.sites.total),)
            return self.module(*tensors, *residual)
        finally:
            self.module.use_routing(False)
