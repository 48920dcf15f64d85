"""ExecuTorch: one .pte for prompt and decode, XNNPACK with the compiler's integers, the expert as one input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lime_edge.bundle.prompts import TextCodec
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.errors import need
from lime_edge.targets.entries import ExecutorchOptions

try:
    from lime_edge.exporters.executorch.lower import Delegation, Method, check_backend, lower
    from lime_edge.exporters.executorch.program import DecoderProgram, SeeingProgram, Sizes
    from lime_edge.exporters.executorch.stock import StockExpert, StockProgram
except ImportError as error:  # pragma: no cover - exercised in a bare environment
    raise need((error.name or "executorch").split(".")[0], "executorch") from error

FILE, STOCK_FILE = "model.pte", "stock.pte"
PROMPT = 512  # most tokens of one pinned call: bounds the memory that is planned
ROWS = 32  # most positions with logits in one call: (32, vocab) floats are planned for
Progress = Callable[[str, int, int], None]


def write_decoder(
    model: CompiledModel, directory: Path, options: ExecutorchOptions, progress: Progress
) -> dict[str, Any]:
    """Write model.pte: `forward`, and `routed` for a checkpoint that routes, on the same weights and cache.

    Args:
        model: compiled; its integers are only re-packed. directory: exists, empty; the tokenizer lies beside it.
        options: what to write. progress: called with (step, done, total).
    Returns:
        The target's manifest entry.
    Raises:
        LimeEdgeError: a backend that is not offered, or a model that cannot be lowered.
    """
    provider = check_backend(options.backend, model.quant)
    sizes = choose_sizes(model, options.max_seq_len)
    constants = describe_constants(model, sizes, directory.parent / "tokenizer")
    routes = model.routing is not None and model.swaps
    methods = {"forward": make_method(model, sizes, routed=False)}
    if routes:
        methods["routed"] = make_method(model, sizes, routed=True)
    counts = lower(methods, options.backend, constants, directory / FILE, progress)
    facts: dict[str, Any] = {
        "file": f"executorch/{FILE}",
        "executorch": version("executorch"),
        "providers": [provider],
        "backend": options.backend,
        "expert_input": model.swaps,
        "max_length": sizes.cache - count_virtual(model),
        "prompt_length": sizes.prompt,
        "rows": sizes.rows,
        "virtual_tokens": count_virtual(model),
        "layers": len(model.decoder.layers),
        "weight_hash": model.weight_hash(),
        "compute": "float32" if model.quant == "none" else "int8-per-token",
        "delegation": {name: asdict(count) for name, count in counts.items()},
    }
    if routes:
        facts["routed"] = "routed"
    if options.stock_runner:
        facts |= {"stock": f"executorch/{STOCK_FILE}"}
        facts["delegation"]["stock"] = asdict(
            write_stock(model, sizes, options.backend, constants, directory / STOCK_FILE, progress)
        )
    return facts


def count_virtual(model: CompiledModel) -> int:
    """Virtual tokens that come before a prompt."""
    return 0 if model.virtual is None else len(model.virtual.base)


def choose_sizes(model: CompiledModel, wanted: int) -> Sizes:
    """The static cache, and what one call takes; a routed prompt is one call."""
    virtual = count_virtual(model)
    cache = min(wanted + virtual, model.decoder.context)
    prompt = cache if model.routing is not None and model.swaps else min(cache, PROMPT + virtual)
    return Sizes(cache, prompt, min(ROWS, cache))


def make_method(model: CompiledModel, sizes: Sizes, routed: bool) -> Method:
    """`forward` or `routed` with dynamic prompt length and number of rows."""
    module = (SeeingProgram if model.image_tokens else DecoderProgram)(model, sizes, routed)
    length = torch.export.Dim("length", min=1, max=sizes.prompt)
    rows = torch.export.Dim("rows", min=1, max=sizes.rows)
    example = min(3, sizes.prompt)
    inputs = [
        torch.zeros(1, example, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(min(2, sizes.rows), dtype=torch.int64),
    ]
    shapes: list[Any] = [{1: length}, None, {0: rows}]
    if model.image_tokens:
        inputs.append(torch.zeros(1, example, model.decoder.hidden))
        shapes.append({1: length})
    if module.takes_expert:
        inputs.append(torch.zeros(model.sites.total))
        shapes.append(None)
    return Method(module, tuple(inputs), tuple(shapes))


def describe_constants(model: CompiledModel, sizes: Sizes, tokenizer: Path) -> dict[str, Any]:
    """The constant methods that ExecuTorch's language model runners read.

    Source: executorch 1.5.1, extension/llm/runner/constants.h and llm_runner_helper.cpp.
    """
    constants: dict[str, Any] = {
        "get_vocab_size": model.decoder.vocab,
        "get_max_seq_len": sizes.prompt,
        "get_max_context_len": sizes.cache,
        "get_n_layers": len(model.decoder.layers),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    if (tokenizer / "tokenizer.json").is_file():
        constants |= read_special_ids(tokenizer)
    return constants


def read_special_ids(tokenizer: Path) -> dict[str, Any]:
    """get_bos_id and get_eos_ids from the bundle's tokenizer, where it has them."""
    codec, file = TextCodec(tokenizer), tokenizer / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    token = config.get("bos_token")
    bos = codec.vocabulary().get(str(token.get("content") if isinstance(token, dict) else token))
    found: dict[str, Any] = {} if bos is None else {"get_bos_id": bos}
    return found | ({"get_eos_ids": list(codec.eos)} if codec.eos else {})


def write_stock(
    model: CompiledModel, sizes: Sizes, backend: str, constants: dict[str, Any], file: Path, progress: Progress
) -> Delegation:
    """Write stock.pte: `forward(tokens, pos)` as the stock text runner calls it, and `set_expert(d)`."""
    neutral = torch.full((model.sites.total,), model.variant.neutral)
    length = torch.export.Dim("length", min=1, max=sizes.prompt)
    program = StockProgram(DecoderProgram(model, sizes), neutral)
    inputs = (torch.zeros(1, min(3, sizes.prompt), dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    methods = {"forward": Method(program, inputs, ({1: length}, None))}
    if model.swaps:
        methods["set_expert"] = Method(StockExpert(neutral), (neutral.clone(),), (None,))
    return lower(methods, backend, constants, file, progress, ("expert",))["forward"]
