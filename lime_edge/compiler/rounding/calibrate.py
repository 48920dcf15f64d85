"""Calibration: text that shows a folded model's layers their inputs; `grams` keeps what is seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lime_edge.bundle.documents import parse_json, read_lines
from lime_edge.errors import Faults, LimeEdgeError

Encode = Callable[[str], list[int]]
Render = Callable[[str, str], str]
LONGEST = 512  # tokens of a sequence that are read

INSTRUCTIONS = (
    "",
    "Rewrite: ",
    "Explain: ",
    "Change the word: ",
    "Choose one (first, second, third): ",
    "Give a short answer.\n",
    "Is this correct?\n",
    "Complete the sentence.\n",
    "List: ",
)
# What small task models are asked: written for this file, many kinds of request, answers short.
PAIRS = (
    ("What is the capital of Portugal?", "The capital of Portugal is Lisbon."),
    ("Translate to French: The library opens at nine.", "La bibliothèque ouvre à neuf heures."),
    ("Rewrite in the past tense: The dogs run across the field.", "The dogs ran across the field."),
    ("Set an alarm for 6:45 tomorrow morning.", "alarm"),
    ("Is this sentence true or false? Water boils at 100 degrees Celsius at sea level.", "true"),
    ("Classify the mood of this message (happy, sad, angry).\nI waited two hours and nobody even said sorry!", "angry"),
    ("A clumsy plot and flat acting, but the music almost saves the evening.", "negative"),
    ("One of the warmest and funniest books I have read in years.", "positive"),
    ("plural: child", "children"),
    ("Correct the spelling: I definately recieved your mesage.", "I definitely received your message."),
    ("Who wrote Pride and Prejudice?", "Jane Austen"),
    ("List three primary colors.", "red, yellow, blue"),
    (
        "Summarize: The council voted on Tuesday to close the old bridge for repairs. Use the ring road.",
        "The old bridge is closed for repairs.",
    ),
    ("def area(width, height):\n    return", "    return width * height"),
    ("What is 17 + 25?", "42"),
    ("Turn this into a question: She has finished the report.", "Has she finished the report?"),
    ("Book a table for four at an Italian restaurant near the station on Friday.", "restaurant"),
    ("What's the weather like in Oslo this weekend?", "weather"),
    ("Play some quiet piano music from the nineties.", "music"),
    ('Remove "Blue Monday" from my workout list.', "playlist"),
    ('Give the opposite of "ancient".', "modern"),
    ("Extract the date: The invoice was issued on 14 March 2019 and paid a week later.", "14 March 2019"),
    ("Write a short poem about rain.", "Soft the silver rain comes down,\nwashing all the dusty town."),
    ("Name the largest planet in the solar system.", "Jupiter"),
    ("Subject: You have won!!!\nClick here to claim your $1000 gift card now.", "spam"),
    ("Subject: Minutes of Monday's meeting\nHi all, please find the notes attached. Best, Petra", "not spam"),
    ('past tense of "to teach"', "taught"),
    ("he carries the boxes upstairs", "he does not carry the boxes upstairs"),
    ("Make it formal: Hey, can you send me that file?", "Could you please send me the file?"),
    ("What does HTTP stand for?", "Hypertext Transfer Protocol"),
    ("Sort alphabetically: pear, apple, mango, cherry", "apple, cherry, mango, pear"),
    ("Who is mentioned here? Yesterday Maria Lopez met the mayor of Ghent, Thomas Claes.", "Maria Lopez, Thomas Claes"),
    (
        "Explain photosynthesis in one sentence.",
        "Plants use sunlight to turn water and carbon dioxide into sugar and oxygen.",
    ),
    ("Rate this recipe four out of five stars.", "rating"),
    ("tooth", "teeth"),
    ("quickly", "adverb"),
    ("The committee has rejected both proposals.", "Has the committee rejected both proposals?"),
    ("Find a showing of the new science fiction film tonight at the Grand.", "cinema"),
    ("The battery died after a week and the seller never answered my e-mails.", "1 star"),
    ("Fast delivery, solid build, exactly as described. Would buy again.", "5 stars"),
    ("Convert 3 kilometers to meters.", "3000 meters"),
    ("Which language is this? Ich habe heute keine Zeit.", "German"),
    ('Spell "necessary" letter by letter.', "n e c e s s a r y"),
    ("2024-07-04", "Thursday, July 4, 2024"),
    ("Count the words: the cat sat on the mat", "6"),
    ("Continue the sequence: 2, 4, 8, 16,", "32"),
    ("Is a tomato a fruit or a vegetable?", "Botanically, a tomato is a fruit."),
    ("Give me a title for a story about a lighthouse keeper and a lost whale.", "The Keeper and the Whale"),
)


@dataclass(frozen=True)
class Sample:
    """One token sequence and the expert it is read with (None: the calibration takes turns)."""

    tokens: tuple[int, ...]
    expert: str | None = None


@dataclass(frozen=True)
class Calibration:
    """What to show the model. source: "built-in" or the file's name, for the manifest."""

    samples: tuple[Sample, ...]
    source: str

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(len(sample.tokens) for sample in self.samples)


def built_in_calibration(encode: Encode, render: Render, words: list[str], count: int = 128) -> Calibration:
    """Short written exchanges, and `count` exchanges about random words of the model's own vocabulary.

    Always the same for the same tokenizer. The words are what spreads: written text alone leaves most
    of the vocabulary, and so most directions of a layer's input, unseen.

    Args:
        encode: text -> token ids, no special tokens added. render: (user, assistant) -> chat text.
        words: see `vocabulary_words`; may be empty.
        count: exchanges made of words.
    """
    pairs = [*PAIRS, *(_word_pairs(words, count) if words else ())]
    return Calibration(tuple(_sample(encode, render(*pair)) for pair in pairs), "built-in")


def read_calibration(path: Path, encode: Encode, experts: Iterable[str]) -> Calibration:
    """Calibration of the user's: JSON lines with `prompt` (complete) and, if wanted, `answer`, `expert`.

    Args:
        path: a .jsonl file, the form of the evaluation files.
        encode: text -> token ids, no special tokens added.
        experts: the adapter's expert names.
    Raises:
        LimeEdgeError: unreadable, empty, not JSON, fields missing or mistyped, unknown experts: all at once.
    """
    known, samples = set(experts), []
    with Faults(str(path), 'expected one {"prompt": ..., "answer": ..., "expert": ...} a line') as faults:
        for number, line in read_lines(path, faults.hint):
            try:
                row = parse_json(line, f"line {number}", faults.hint)
            except LimeEdgeError as error:
                faults.add(error.problem)
                continue
            row = row if isinstance(row, dict) else {}
            prompt, answer, expert = row.get("prompt"), row.get("answer", ""), row.get("expert")
            if not isinstance(prompt, str) or not prompt or not isinstance(answer, str):
                faults.add(f"line {number}: prompt and answer", "text", f"{prompt!r} and {answer!r}")
            elif expert is not None and expert not in known:
                faults.add(f"line {number}: expert", f"one of {', '.join(sorted(known))}", expert)
            else:
                samples.append(_sample(encode, prompt + answer, expert))
        if not samples and not faults:
            faults.add("samples", "at least one line", "none")
    return Calibration(tuple(samples), path.name)


def render_exchange(apply_template: Callable[[list[dict[str, str]]], str] | None) -> Render:
    """How the built-in calibration writes an exchange: the model's chat template, no system prompt.

    A default system prompt would be most of every sample, always the same, and teach nothing new.

    Args:
        apply_template: messages (role, content) -> text; None: the model has no chat template.
    """
    if apply_template is None:
        return lambda user, assistant: f"{user}\n{assistant}"
    marker = [{"role": "system", "content": "-"}]
    try:
        system = apply_template(marker)
    except Exception:  # noqa: BLE001 - a template's own refusal: it knows no system prompt, or not alone
        marker, system = [], ""

    def render(user: str, assistant: str) -> str:
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return apply_template(marker + turns).removeprefix(system)

    return render


def vocabulary_words(vocabulary: Mapping[str, int]) -> list[str]:
    """Whole words of a tokenizer in id order: pieces that begin a word, 4 or more letters a-z.

    WordPiece marks a word's later pieces instead: where no piece is marked as a beginning, the unmarked ones are words.
    """
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    begun = [piece[1:] for piece in pieces if piece[:1] in ("\u0120", "\u2581", " ")]
    for words in (begun, pieces):
        found = [word for word in words if len(word) > 3 and word.isascii() and word.isalpha() and word.islower()]
        if found:
            return found
    return []


def _sample(encode: Encode, text: str, expert: str | None = None) -> Sample:
    return Sample(tuple(encode(text)[:LONGEST]), expert)


def _word_pairs(words: list[str], count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(user, assistant): an instruction and some words; the answer repeats them, in order or shuffled."""
    draw = random.Random(seed)
    for _ in range(count):
        chosen = [draw.choice(words) for _ in range(draw.choice((1, 1, 2, 3, 6, 10)))]
        text, answer = " ".join(chosen), " ".join(draw.sample(chosen, len(chosen)))
        form = draw.choice(("{}", "{}", '"{}"', "{}."))
        yield draw.choice(INSTRUCTIONS) + form.format(text), answer
