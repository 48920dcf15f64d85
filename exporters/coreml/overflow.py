"""Does anything come near float16's limit? Looked at in the oracle, on prompts, before a device finds out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lime_edge.bundle.prompts import TextCodec
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.model.decoder import Block, DecoderModule, Projection
from lime_edge.compiler.rounding.calibrate import PAIRS

PROMPTS, TOKENS = 8, 32
LIMIT = 65504.0  # the largest float16
LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Peak:
    """The largest magnitude seen, and at which module's input or output."""

    value: float
    site: str


def find_peak(model: CompiledModel, tokenizer: Path) -> Peak:
    """Run the oracle over built-in prompts, the experts taking turns.

    Args:
        model: its tensors as they are stored. tokenizer: its directory; seeded ids where there is none.
    """
    module, worst = DecoderModule(model), Peak(0.0, "nothing")

    def note(site: str, tensor: torch.Tensor) -> None:
        nonlocal worst
        value = float(tensor.abs().max())
        if not value <= worst.value:
            worst = Peak(value if value < LARGEST else LARGEST, site)  # NaN too

    def hook(site: str) -> Any:
        def look(_: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            note(f"{site} input", inputs[0])
            note(f"{site} output", output)

        return look

    for name, part in module.named_modules():
        if isinstance(part, Projection | Block):
            part.register_forward_hook(hook(name.replace("blocks.", "layers.")))
    vectors = list(model.experts.values())
    for turn, ids in enumerate(choose_prompts(model.decoder.vocab, tokenizer)):
        module(torch.tensor([ids]), vectors[turn % len(vectors)].float() - model.reference)
    return worst


def choose_prompts(vocab: int, tokenizer: Path) -> Iterator[list[int]]:
    """Token ids of the compiler's built-in exchanges, or seeded ones where nothing can read them."""
    if tokenizer.is_dir():
        codec = TextCodec(tokenizer)
        for question, answer in PAIRS[:PROMPTS]:
            yield codec.encode(f"{question}\n{answer}")[:TOKENS]
        return
    random = torch.Generator().manual_seed(0)
    for _ in range(PROMPTS):
        yield torch.randint(0, vocab, (TOKENS,), generator=random).tolist()
