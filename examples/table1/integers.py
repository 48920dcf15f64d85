"""The backbone as the compiler stores it, int4 and int8, in place of the float32 one; and what that takes in bytes.

Weights only: activations stay float32, and codes are chosen by the scale search that needs no calibration, the same for
every method. What the default export adds (gptq) only LiME's bundle has.
"""

from __future__ import annotations

import torch
from lime_layers import LimeLinear
from stacks import StackedLinear, StackedLora, StackedTable, replace_modules
from torch import Tensor, nn

from lime_edge.compiler.maths.quantize import INT4_GROUP, quantize

PLACE = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}


@torch.no_grad()
def merge_loras(model: nn.Module) -> None:
    """Every LoRA into weights of its own: what is left is a whole model per task."""
    replace_modules(model, StackedLora, lambda _, site: StackedLinear(site.merge(), site.choice))


@torch.no_grad()
def fold_vectors(model: nn.Module) -> None:
    """LiME's mean expert into the weights, as the compiler folds it; the vectors become residuals."""
    for site in model.modules():
        if isinstance(site, LimeLinear):
            mean = site.LiMEs.mean(0)
            site.linear.weight += mean[:, None] * site.scale * (site.B @ site.A)
            site.LiMEs -= mean


@torch.no_grad()
def round_backbone(model: nn.Module, kept: tuple[str, ...], device: str) -> int:
    """Round every matrix in place; returns the packed bytes of the integers and their scales.

    Args:
        kept: places at int8, the others at int4.
        device: where rounding is done, matrix by matrix.
    """
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, StackedLinear)) and name != "lm_head":
            place = PLACE[name.removesuffix(".linear").rsplit(".", 1)[-1]]
            total += _round(module.weight, 8 if place in kept else 4, device)
        elif isinstance(module, (nn.Embedding, StackedTable)):
            total += _round(module.weight, 8 if "head" in kept else 4, device)
    return total


def _round(weight: Tensor, bits: int, device: str) -> int:
    total = 0
    for one in weight.data if weight.dim() == 3 else weight.data[None]:
        stored = quantize(one.to(device), bits, INT4_GROUP if bits == 4 else one.shape[1])
        one.copy_(stored.dequantize())
        total += stored.nbytes()
    return total
