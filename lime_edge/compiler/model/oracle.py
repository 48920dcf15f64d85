"""The oracle asked at export: golden outputs of every expert, a blend, no adapter, routed (lime_edge.bundle.golden)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from lime_edge.bundle.experts import NONE, ROUTED, describe_selection, parse_selection
from lime_edge.bundle.golden import PIXEL, Golden, Output, Rows, choose_columns, condense, stack_rows
from lime_edge.compiler.formats.encoder import Input
from lime_edge.compiler.model.compiled import Compiled, CompiledModel
from lime_edge.compiler.model.decoder import Cache, DecoderModule
from lime_edge.compiler.model.encoder import CompiledEncoder, feed_text
from lime_edge.compiler.options import Progress

PROMPTS, LENGTH, STEPS = 2, 12, 4  # prompts, tokens each, greedy steps from there
IMAGES = 4
ENCODER_ROWS = 8  # of an output with a row per token
BLEND = (0.75, 0.25)
TEXTS = (
    "In the spring of that year the old bridge was closed, and people walked to the market along the river instead.",
    "She wrote 17 letters before she found the right words; the last one said only that the work was done.",
)
Encode = Callable[[str], list[int]]  # text to token ids as the model reads them, special tokens added


def list_selections(model: Compiled) -> tuple[str, ...]:
    """What is checked: every expert, a blend of two, no adapter where that exists, routed where there is routing."""
    experts = tuple(model.experts)
    if model.single is not None:
        return experts
    blend = [describe_selection(dict(zip(experts, BLEND, strict=False)))] if len(experts) > 1 else []
    off = [NONE] if model.variant.switches_off else []
    return (*experts, *blend, *off, *([] if model.routing is None else [ROUTED]))


def choose_prompts(encode: Encode | None, vocab: int, length: int) -> np.ndarray:
    """Token ids (PROMPTS, length) int64: the built-in texts, or seeded ids where nothing can read them.

    Args:
        encode: text to ids, None without a tokenizer. length: at most that many, at least 1.
    """
    found = [encode(text)[:length] if encode else [] for text in TEXTS]
    shortest = min(map(len, found))
    if shortest >= min(2, length):
        return np.array([ids[:shortest] for ids in found], np.int64)
    return np.random.default_rng(0).integers(0, vocab, (PROMPTS, length))


def mix_experts(experts: Mapping[str, Tensor], label: str) -> Tensor:
    """The full vector p (sum_H,) float32 of a selection that is not routed."""
    selection = parse_selection(label)
    weights = {selection: 1.0} if isinstance(selection, str) else dict(selection or {})
    mixed = torch.zeros(len(next(iter(experts.values()))), dtype=torch.float64)
    for name, weight in weights.items():
        mixed += weight * experts[name].double()
    return mixed.float()


def ask_decoder(model: CompiledModel, encode: Encode | None, progress: Progress = lambda *_: None) -> Golden:
    """Golden logits and greedy tokens of a language model.

    Args:
        encode: text to token ids, None without a tokenizer. progress: called with ("golden", done, total).
    """
    virtual = 0 if model.virtual is None else len(model.virtual.base)
    room = model.decoder.context - virtual - STEPS
    length = max(LENGTH, 2 * model.header)  # so that something lies before the header
    prompts = choose_prompts(encode, model.decoder.vocab, max(1, min(length, room)))
    labels, module, off = list_selections(model), DecoderModule(model), -model.reference

    def answer(label: str) -> dict[str, np.ndarray]:
        if label == ROUTED:  # its scale runs over the whole call: one prompt at a time
            rows = [run_steps(module, prompt[None], None, off, model.header) for prompt in prompts]
            return {"logits": np.concatenate(rows)}
        residual = mix_experts(model.experts, label) - model.reference
        return {"logits": run_steps(module, prompts, residual, off, model.header)}

    columns = {"logits": choose_columns(model.decoder.vocab, len(labels) * len(prompts) * STEPS)}
    steps = {"logits": np.arange(STEPS)}
    outputs = ask_all(labels, answer, steps, columns, True, progress)
    return Golden(labels, {"input_ids": prompts[:, None]}, STEPS, outputs)


def run_steps(
    module: DecoderModule,
    prompts: np.ndarray,
    expert: Tensor | None,
    off: Tensor | None = None,
    header: int = 0,
    features: Tensor | None = None,
) -> np.ndarray:
    """Greedy logits (P, STEPS, V) float32: after the prompts (P, L), then after each token, with the cache.

    Args:
        expert: see DecoderModule.forward. off: d of the original model, which reads all of a prompt but its last
            `header` tokens, where that is not 0. features: (N, hidden), rows for the prompts' image tokens; those come
            before the header.
    """
    cache, ids, rows = Cache(), torch.from_numpy(prompts), []
    if header and ids.shape[1] > header:
        module(ids[:, :-header], off, cache, features)
        ids, features = ids[:, -header:], None
    for _ in range(STEPS):
        rows.append(module(ids, expert, cache, features)[:, -1])
        features = None
        ids = rows[-1].argmax(-1, keepdim=True)
    return torch.stack(rows, 1).numpy()


def ask_encoder(model: CompiledEncoder, encode: Encode | None, progress: Progress = lambda *_: None) -> Golden:
    """Golden outputs of an encoder or a vision model.

    Args:
        encode: text to token ids, None without a tokenizer.
    """
    entry = model.module.inputs[0]
    calls = {entry.name: draw_pixels(entry)}
    if entry.name == "input_ids":
        calls = {entry.name: choose_prompts(encode, entry.limit, min(LENGTH, model.context))[:, None]}
    labels = list_selections(model)

    def answer(label: str) -> dict[str, np.ndarray]:
        vector = None if label == ROUTED else mix_experts(model.experts, label)
        found = [model.run(inputs, vector) for inputs in _list_calls(model, calls[entry.name])]
        return {name: np.stack([as_rows(call[name].numpy()) for call in found]) for name in model.module.outputs}

    shapes = {name: array.shape for name, array in answer(labels[0]).items()}
    rows = {name: np.unique(np.linspace(0, shape[1] - 1, ENCODER_ROWS).astype(int)) for name, shape in shapes.items()}
    total = len(labels) * len(calls[entry.name])
    columns = {name: choose_columns(shape[2], total * len(rows[name]) * len(shapes)) for name, shape in shapes.items()}
    return Golden(labels, calls, 0, ask_all(labels, answer, rows, columns, False, progress))


def _list_calls(model: CompiledEncoder, calls: np.ndarray) -> Iterator[dict[str, Tensor]]:
    for array in calls:
        if array.dtype.kind == "f":
            yield {model.module.inputs[0].name: torch.from_numpy(array)}
        else:
            yield feed_text(model.module.inputs, torch.from_numpy(array))


def draw_pixels(entry: Input) -> np.ndarray:
    """Seeded images (IMAGES, 1, C, H, W) float32 within +-2, in whole steps of PIXEL."""
    shape = (IMAGES, *(1 if isinstance(size, str) else size for size in entry.shape))
    return np.random.default_rng(0).integers(-64, 65, shape).astype(np.float32) * np.float32(PIXEL)


def as_rows(output: np.ndarray) -> np.ndarray:
    """An output of one call (1, ..., V) as rows (R, V)."""
    return output.reshape(-1, output.shape[-1])


def ask_all(
    labels: Iterable[str],
    answer: Callable[[str], dict[str, np.ndarray]],
    rows: Mapping[str, np.ndarray],
    columns: Mapping[str, np.ndarray],
    centre: bool,
    progress: Progress,
) -> dict[str, Output]:
    """Every selection in turn, condensed at once: full rows are large."""
    kept: dict[str, list[Rows]] = {name: [] for name in rows}
    labels = tuple(labels)
    for index, label in enumerate(labels):
        progress("golden", index, len(labels))
        for name, array in answer(label).items():
            kept[name].append(condense(array[:, rows[name]], columns[name], centre))
    progress("golden", len(labels), len(labels))
    return {name: Output(rows[name], columns[name], stack_rows(parts)) for name, parts in kept.items()}
