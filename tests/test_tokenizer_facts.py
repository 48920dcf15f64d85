"""What the bundle says of a tokenizer: its kind, its cut, and the character classes as the library sees them."""

from __future__ import annotations

import json
import random
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from lime_edge.compiler.formats.tokenizer import (
    POINTS,
    SPLITS,
    describe_tokenizer,
    find_ranges,
    find_special,
    name_split,
)

Make = Callable[..., Path]


def spread(ranges: list[int]) -> set[int]:
    return {point for first, last in zip(ranges[::2], ranges[1::2], strict=True) for point in range(first, last + 1)}


@pytest.mark.parametrize("name", ["letters", "numbers", "spaces", "digits"])
def test_ranges_are_rising_and_apart(name: str) -> None:
    ranges = find_ranges(name)
    firsts, lasts = ranges[::2], ranges[1::2]
    assert all(first <= last for first, last in zip(firsts, lasts, strict=True))
    assert all(last + 1 < first for last, first in zip(lasts, firsts[1:], strict=False))


@pytest.mark.parametrize(("name", "category"), [("letters", "L"), ("numbers", "N")])
def test_ranges_are_unicodes_as_far_as_python_knows_it(name: str, category: str) -> None:
    """Python's own table is of another version: what it knows as something else is nowhere in ours."""
    found = spread(find_ranges(name))
    mine = {point for point in POINTS if unicodedata.category(chr(point)).startswith(category)}
    known = {point for point in POINTS if unicodedata.category(chr(point)) != "Cn"}
    assert not (found ^ mine) & known
    assert len(found - mine) < 10_000  # code points that were given away after Python's version


def test_spaces_are_those_of_the_regular_expression() -> None:
    assert spread(find_ranges("spaces")) == {p for p in POINTS if re.match(r"\s", chr(p))} - set(range(0x1C, 0x20))


CUTS = {"letters": r"\p{L}", "numbers": r"\p{N}", "spaces": r"\s"}


@pytest.mark.parametrize("name", CUTS)
def test_ranges_cut_random_texts_as_the_library_does(name: str) -> None:
    """Another way to ask: whole runs, in random order, in texts of all planes."""
    inside, draw = spread(find_ranges(name)), random.Random(name)
    split = pre_tokenizers.Split(Regex(f"{CUTS[name]}+"), "isolated")
    pool = [*draw.sample(POINTS, 3000), *draw.sample(sorted(inside), min(len(inside), 3000))]
    for _ in range(50):
        text = "".join(map(chr, draw.choices(pool, k=200)))
        pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
        expected, start = [], 0
        for at in range(1, len(text) + 1):
            if at == len(text) or (ord(text[at]) in inside) != (ord(text[at - 1]) in inside):
                expected.append(text[start:at])
                start = at
        assert pieces == expected


def test_digits_are_the_splitters_own() -> None:
    inside, draw = spread(find_ranges("digits")), random.Random(0)
    assert spread(find_ranges("numbers")) < inside
    split = pre_tokenizers.Digits(individual_digits=True)
    for _ in range(50):
        text = "".join(f"xy{chr(point)}" for point in draw.choices([*inside, *draw.sample(POINTS, 3000)], k=200))
        singles = {piece for piece, _ in split.pre_tokenize_str(text + "xy") if len(piece) == 1}
        assert singles == {letter for letter in text if ord(letter) in inside}


@pytest.mark.parametrize("name", SPLITS)
def test_cuts_are_known_by_what_they_do(name: str) -> None:
    """As the library itself writes them; a cut that differs in one letter has no name."""
    tokenizer = Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm2" else []
    if name in ("gpt2", "smollm2"):
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        pattern = SPLITS[name]["pretokenizers"][0]["pattern"]["Regex"]
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    written = json.loads(tokenizer.to_str())["pre_tokenizer"]
    assert name_split(written) == name
    assert name_split(json.loads(json.dumps(written).replace("false", "true"))) is None
    assert name_split(None) is None


def test_a_bundles_tokenizer_is_described(tiny_model: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "tokenizer"))
    facts = describe_tokenizer(folder)
    assert (facts.file, facts.kind) == ("tokenizer/tokenizer.json", "byte-bpe")
    assert facts.split in SPLITS and facts.classes == "tokenizer/classes.json"
    classes = json.loads((folder / "classes.json").read_text())
    assert classes["format"] == "lime-edge-classes" and classes["schema"] == 1
    assert classes["letters"] == find_ranges("letters") and ("digits" in classes) == (facts.split == "smollm2")


def test_special_tokens_around_a_text() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="a"))
    assert find_special(tokenizer) == ((), ())
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    assert find_special(tokenizer) == ((1,), (2,))


def test_other_kinds_have_a_name_and_no_classes(tmp_path: Path) -> None:
    Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    facts = describe_tokenizer(tmp_path)
    assert (facts.kind, facts.split, facts.classes) == ("wordpiece", None, None)
    assert not (tmp_path / "classes.json").exists()
