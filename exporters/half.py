"""float16, for targets that compute in it: what it holds, and whether activations come near its limit on prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lime_edge.bundle.prompts import TextCodec
from lime_edge.compiler.maths.prompt_tuning import VirtualTokens
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import Branch, CompiledModel
from lime_edge.compiler.model.decoder import Block, DecoderModule, Projection
from lime_edge.compiler.rounding.calibrate import PAIRS
from lime_edge.errors import Faults

PROMPTS, TOKENS = 8, 32
LIMIT = 65504.0  # the largest float16
LARGEST = float(torch.finfo(torch.float32).max)


def store_as_half(model: CompiledModel, title: str) -> CompiledModel:
    """The model as an artifact of float16 holds it: every float rounded (kept as float32), integers as they are.

    Args:
        title: of the target, for the message.
    Raises:
        LimeEdgeError: a value beyond float16.
    """
    with Faults(f"{title} export", "float16 holds values up to 65504") as faults:

        def half(name: str, tensor: torch.Tensor) -> torch.Tensor:
            rounded = tensor.half().float()
            if not torch.isfinite(rounded).all():
                faults.add(name, "at most 65504", f"{tensor.abs().max():.6g}")
            return rounded

        weights = {name: t if isinstance(t, QuantizedTensor) else half(name, t) for name, t in model.weights.items()}
        vectors = {name: half(name, tensor) for name, tensor in model.vectors.items()}
        branches = {
            name: Branch(
                None if b.a is None else half(f"{name}.A", b.a), None if b.b is None else half(f"{name}.B", b.b), b.rows
            )
            for name, b in model.branches.items()
        }
        for name, vector in model.experts.items():  # its residual is what the program is given
            half(f"expert {name}", vector.float() - model.reference)
        virtual = model.virtual
        if virtual is not None:
            projection = None if virtual.input_proj is None else half("input_proj", virtual.input_proj)
            virtual = VirtualTokens(
                half("prompt base", virtual.base),
                half("prompt delta", virtual.delta),
                half("prompt", virtual.original),
                virtual.conditioning,
                projection,
            )
    return replace(model, weights=weights, vectors=vectors, branches=branches, virtual=virtual)


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


def weigh_matrix(rows: int, columns: int, bits: int, group: int, table: bool) -> int:
    """Bytes of a quantized matrix as it is stored, float16 scales. table: not read."""
    return rows * columns * bits // 8 + 2 * (rows * columns // group)
