"""The oracle of a vision-language model asked at export: a tile and a text after it, every selection."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lime_edge.bundle.experts import ROUTED
from lime_edge.bundle.golden import Golden, choose_columns
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.model.oracle import (
    LENGTH,
    PROMPTS,
    STEPS,
    Encode,
    ask_all,
    choose_prompts,
    draw_pixels,
    list_selections,
    mix_experts,
    run_steps,
)
from lime_edge.compiler.model.vision import CompiledVision
from lime_edge.compiler.options import Progress
from lime_edge.errors import LimeEdgeError

PIXELS = "pixel_values"


def ask_vision(model: CompiledVision, encode: Encode | None, progress: Progress = lambda *_: None) -> Golden:
    """Golden logits and greedy tokens after a tile's features and a text.

    The features take the place of image tokens as they come from the tower, a row each: packing is the device's, and
    has tests of its own.

    Args:
        encode: text to token ids, None without a tokenizer.
    Raises:
        LimeEdgeError: a context that does not hold one tile.
    """
    language, entry = model.language, model.tower.module.inputs[0]
    pixels = draw_pixels(entry)[:PROMPTS]
    rows = model.see(torch.from_numpy(pixels[0]), mix_experts(model.experts, next(iter(model.experts)))).shape[1]
    room, length = model.context - rows - STEPS, max(LENGTH, 2 * language.header)
    if room < 2:
        raise LimeEdgeError(f"a context of {model.context} tokens does not hold a picture of {rows} rows and a text")
    texts = choose_prompts(encode, language.decoder.vocab, max(1, min(length, room)))
    texts = np.where(np.isin(texts, language.image_tokens), 0, texts)
    prompts = np.concatenate([np.full((PROMPTS, rows), language.image_tokens[0]), texts], axis=1)
    labels, module, off = list_selections(model), DecoderModule(language), -model.reference

    def see(vector: Tensor | None) -> list[Tensor]:
        silent = model.reference + off if language.header else vector
        return [model.see(torch.from_numpy(tile), silent)[0] for tile in pixels]

    def answer(label: str) -> dict[str, np.ndarray]:
        if label == ROUTED:  # its scales run over the whole call: one prompt at a time
            pairs = zip(prompts, see(None), strict=True)
            rows = [run_steps(module, prompt[None], None, off, language.header, seen) for prompt, seen in pairs]
            return {"logits": np.concatenate(rows)}
        vector = mix_experts(model.experts, label)
        seen = torch.cat(see(vector))
        return {"logits": run_steps(module, prompts, vector - model.reference, off, language.header, seen)}

    columns = {"logits": choose_columns(language.decoder.vocab, len(labels) * PROMPTS * STEPS)}
    outputs = ask_all(labels, answer, {"logits": np.arange(STEPS)}, columns, True, progress)
    return Golden(labels, {"input_ids": prompts[:, None], PIXELS: pixels}, STEPS, outputs)
