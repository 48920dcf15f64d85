"""Tokenizers of every split a phone knows, and the library's own ids for every code point and for odd strings."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from lime_edge.bundle.fields import TokenizerFacts
from lime_edge.compiler.formats.tokenizer import SPLITS, describe_tokenizer

REPOSITORY = Path(__file__).parents[2]
BLOCK, TEXT = 4096, 32  # code points in one hash, and in one text: the library is quadratic in long ones
STRINGS = 2000
VOCAB = 1200
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<think>", " two words", "éé")  # found in a text too, but not special
SPACES = (" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000")
ODD = ("\u200b", "\ufeff", "\x00", "\x7f", "\u0345", "👍🏽", "🏳️\u200d🌈", "e\u0301", "'\u017f", "a" * 300)
SENTENCE = (
    "'s 'S 'll 'VE don't I'M 1 12345 ٣ ½ Ⅷ 一二 hello World straße ﬁ Ωμέγα привет 日本語 한국어 ไทย हिन्दी é ! ... ?! "
    "$ _ http://a.b/c?d=e <b> #"
)
PIECES = (*SPECIAL, *ADDED, *SPACES, *ODD, *SENTENCE.split(" "))


def write_tokenizers(folder: Path) -> list[str]:
    """Write folder/NAME/{tokenizer.json, classes.json, facts.json, cases.json} for every split; returns the names."""
    for name, step in SPLITS.items():
        directory = folder / name
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = train(step, whole=name == "llama3", composes=name == "qwen2")
        tokenizer.save(str(directory / "tokenizer.json"))
        facts = describe_tokenizer(directory)
        (directory / "facts.json").write_text(json.dumps(_write_facts(facts)), encoding="utf-8")
        (directory / "cases.json").write_text(json.dumps(record(tokenizer)), encoding="utf-8")
    return list(SPLITS)


def train(step: dict[str, Any], whole: bool, composes: bool) -> Tokenizer:
    """A byte-level BPE learned from this repository's own pages.

    Args:
        step: its pre-tokenizer. whole: a word that is a token is one, whatever the merges say (Llama 3). composes: NFC
            first (Qwen).
    """
    tokenizer = Tokenizer(BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = build_step(step)
    tokenizer.decoder = decoders.ByteLevel()
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    trainer = BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    pages = sorted((REPOSITORY / "docs").glob("*.md"))
    odd = [" ".join(PIECES)] * 20
    tokenizer.train_from_iterator([page.read_text(encoding="utf-8") for page in pages] + odd, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=place % 2 == 1) for place, text in enumerate(ADDED)])
    return tokenizer


def build_step(step: dict[str, Any]) -> Any:
    """A pre-tokenizer from its description in tokenizer.json."""
    kind = step["type"]
    if kind == "Sequence":
        return pre_tokenizers.Sequence([build_step(one) for one in step["pretokenizers"]])
    if kind == "Split":
        return pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated", step["invert"])
    if kind == "Digits":
        return pre_tokenizers.Digits(step["individual_digits"])
    return pre_tokenizers.ByteLevel(add_prefix_space=step["add_prefix_space"], use_regex=step["use_regex"])


def record(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of random strings, and of every code point between others (as a hash for each block of them)."""
    draw = random.Random(1)
    strings = ["".join(draw.choices(PIECES, k=draw.randrange(1, 12))) for _ in range(STRINGS)]
    points = [point for point in range(0x110000) if not 0xD800 <= point <= 0xDFFF]
    blocks = [points[start : start + BLOCK] for start in range(0, len(points), BLOCK)]
    answers = tokenizer.encode_batch(strings, add_special_tokens=False)
    wild = [[draw.randrange(tokenizer.get_vocab_size()) for _ in range(draw.randrange(1, 20))] for _ in range(STRINGS)]
    return {
        "strings": [[text, answer.ids] for text, answer in zip(strings, answers, strict=True)],
        "decoded": [[ids, tokenizer.decode(ids, skip_special_tokens=True)] for ids in wild],
        "block": BLOCK,
        "text": TEXT,
        "hashes": [hash_ids(encode_block(tokenizer, block)) for block in blocks],
    }


def encode_block(tokenizer: Tokenizer, points: list[int]) -> list[int]:
    """Ids of the texts of a block, one after another."""
    texts = [spread(points[start : start + TEXT]) for start in range(0, len(points), TEXT)]
    return [token for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False) for token in one.ids]


def spread(points: list[int]) -> str:
    """Every code point after and before a letter, a space, a digit, itself and an apostrophe."""
    return "".join(f"a{c}b {c}{c} 1{c}'{c}\n" for c in map(chr, points))


def hash_ids(ids: list[int]) -> str:
    """sha256 over 32-bit little-endian ids, its first 16 digits."""
    return hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()[:16]


def _write_facts(facts: TokenizerFacts) -> dict[str, Any]:
    return {"kind": facts.kind, "split": facts.split}
