"""What a device without the tokenizer library must know of a tokenizer: its kind, how it cuts, and what a letter is.

Languages disagree about letters, numbers and spaces in thousands of places, with each other and over the years.
So the bundle holds the ranges that the library itself uses, asked of it code point by code point.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from lime_edge.bundle.fields import TokenizerFacts
from lime_edge.bundle.prompts import read_tokenizer
from lime_edge.compiler.formats.files import read_json, reading

FOLDER, FILE, CLASSES = "tokenizer", "tokenizer.json", "classes.json"
FORMAT, SCHEMA = "lime-edge-classes", 1
PATTERNS = {"letters": r"\p{L}", "numbers": r"\p{N}", "spaces": r"\s"}
POINTS = [point for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF]
PIECE = 4096  # code points asked for at once: the library is quadratic in what it rewrites
KINDS = {"BPE": "bpe", "WordPiece": "wordpiece", "Unigram": "unigram", "WordLevel": "wordlevel"}

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_AFTER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BEFORE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"


def _cut_by(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTES]}


SPLITS: dict[str, Any] = {  # docs/prompts.md names each
    "gpt2": _WORDS,
    "smollm2": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _WORDS]},
    "llama3": _cut_by(_BEFORE + r"\p{N}{1,3}|" + _AFTER),
    "qwen2": _cut_by(_BEFORE + r"\p{N}|" + _AFTER),
}


def describe_tokenizer(directory: Path) -> TokenizerFacts:
    """A bundle's tokenizer for the manifest; writes the ranges beside it where its cut is one that has a name.

    Args:
        directory: holds tokenizer.json; in the bundle it is called tokenizer/.
    Raises:
        LimeEdgeError: a damaged tokenizer.
    """
    tokenizer = read_tokenizer(directory / FILE)
    document = read_json(directory / FILE)
    kind = document["model"].get("type") or "bpe"
    levels = (document.get("decoder") or {}).get("type") == "ByteLevel"
    kind = "byte-bpe" if kind == "BPE" and levels else KINDS.get(kind, kind.lower())
    split = name_split(document.get("pre_tokenizer")) if kind == "byte-bpe" else None
    if split is not None:
        write_classes(directory / CLASSES, with_digits=split == "smollm2")
    with reading(f"{directory / FILE}: the tokenizer does not run"):
        begin, end = find_special(tokenizer)
    classes = f"{FOLDER}/{CLASSES}" if split is not None else None
    return TokenizerFacts(file=f"{FOLDER}/{FILE}", kind=kind, split=split, classes=classes, begin=begin, end=end)


def name_split(step: dict[str, Any] | None) -> str | None:
    """The name of a pre-tokenizer, or None where it is none that has one. What only moves offsets does not matter."""

    def strip(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: strip(value) for key, value in node.items() if key != "trim_offsets"}
        return [strip(value) for value in node] if isinstance(node, list) else node

    return next((name for name, known in SPLITS.items() if strip(step) == known), None)


def find_special(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that go before and after a text where special tokens are asked for."""
    plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    return (), ()


def write_classes(file: Path, with_digits: bool) -> None:
    """Write the ranges: [first, last, first, last, ...] by class, ends included.

    Args:
        with_digits: what the library's digit splitter takes for a digit too; not quite the numbers.
    """
    names = [*PATTERNS, "digits"] if with_digits else list(PATTERNS)
    body = {"format": FORMAT, "schema": SCHEMA, "library": f"tokenizers {tokenizers.__version__}"}
    file.write_text(json.dumps(body | {name: find_ranges(name) for name in names}) + "\n", encoding="utf-8")


@cache
def find_ranges(name: str) -> list[int]:
    """All code points of a class as the installed library sees them: [first, last, ...] rising, ends included."""
    within = _match_digits() if name == "digits" else _match(PATTERNS[name])
    found: list[int] = []
    for start in range(0, len(POINTS), PIECE):
        for point in sorted(within(POINTS[start : start + PIECE])):
            if found and found[-1] == point - 1:
                found[-1] = point
            else:
                found += [point, point]
    return found


def _match(pattern: str) -> Callable[[list[int]], Iterable[int]]:
    """Of some code points, those that a regular expression matches: they are gone when it is replaced by nothing."""
    remove = normalizers.Replace(Regex(pattern), "")
    return lambda points: set(points) - set(map(ord, remove.normalize_str("".join(map(chr, points)))))


def _match_digits() -> Callable[[list[int]], Iterable[int]]:
    """Of some code points, those that the digit splitter cuts out from between letters."""
    cut = pre_tokenizers.Digits(individual_digits=True)

    def within(points: list[int]) -> Iterable[int]:
        text = "".join(f"ab{chr(point)}" for point in points) + "ab"
        return {ord(piece) for piece, _ in cut.pre_tokenize_str(text) if len(piece) == 1}

    return within
