"""How much longer a tokenizer's replacements can make a text: a chain of them is a small file that fills all memory."""

from __future__ import annotations

from typing import Any

import msgspec

MOST = 256.0  # times; tokenizers in use replace a character by one or a few


class _Steps(msgspec.Struct):
    """The parts of a tokenizer.json that rewrite text; the rest is skipped, not built."""

    normalizer: Any = None
    pre_tokenizer: Any = None
    decoder: Any = None


def find_growth(data: bytes) -> str:
    """Why a tokenizer.json may not be read, or empty. What is no JSON is left to the library to refuse."""
    try:
        steps = msgspec.json.decode(data, type=_Steps)
    except (ValueError, RecursionError):
        return ""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        try:
            factor = measure_growth(getattr(steps, name))
        except RecursionError:
            return f"{name}: nested too deeply"
        if factor > MOST:
            return f"{name}: its replacements make a text up to {factor:g} times as long, {MOST:g} at most"
    return ""


def measure_growth(step: Any) -> float:
    """The factor of one step: sequences multiply, a replacement counts what it puts for what it takes."""
    if isinstance(step, list):
        factor = 1.0
        for inner in step:
            factor *= measure_growth(inner)
        return factor
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") == "Replace":
        content, pattern = step.get("content"), step.get("pattern")
        taken = pattern.get("String") if isinstance(pattern, dict) else None
        grown = len(content) if isinstance(content, str) else 0
        return max(1.0, grown / len(taken)) if isinstance(taken, str) and taken else 1.0 + grown
    return measure_growth([value for value in step.values() if isinstance(value, (list, dict))])
