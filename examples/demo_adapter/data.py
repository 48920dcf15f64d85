"""Data of the demo adapter: the same input for every expert of a group, and no instruction.

Three groups (one word, one sentence, one date). A prompt is the input alone, so only the expert
decides what the answer is. Everything is drawn from one seed; words, sentences and dates are split
by family (see words.group_families), so that no content word of a test input, in any form, occurs
in training. Inflections come from lemminflect (MIT), needed to build the data but not to evaluate:
the test and calibration sets are files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sentences import ACTIONS, PEOPLE, SENTENCE_TASKS, THINGS, draw_clauses, write_sentence
from words import answer_word, choose_split, find_words, group_families, list_words

HERE = Path(__file__).resolve().parent
SEED = 17
MAX_ANSWER_TOKENS = 15  # with the end token, what 16 new tokens can hold
COUNTS = {"train": 4000, "valid": 50, "test": 150}

MONTHS = list_words("January February March April May June July August September October November December")
DATE_TASKS: dict[str, Callable[[datetime.date], str]] = {
    "month": lambda d: MONTHS[d.month - 1],
    "long_date": lambda d: f"{d.day} {MONTHS[d.month - 1]} {d.year}",
    "tomorrow": lambda d: (d + datetime.timedelta(days=1)).isoformat(),
}

# The experts of the joint adapter, by group; a held-out task is learned later, with the adapter frozen.
GROUPS: dict[str, tuple[str, ...]] = {
    "word": ("plural", "past", "gerund", "article", "infinitive", "capital", "initial"),
    "sentence": ("negate", "question", "past_sentence", "passive", "swap", "object"),
    "date": ("month", "long_date", "tomorrow"),
}
HELD_OUT: dict[str, tuple[str, ...]] = {"word": ("perfect",), "sentence": ("future", "who"), "date": ()}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


# Determiners, auxiliaries and tails that any sentence may hold: no content words.
FUNCTION_WORDS = frozenset(
    list_words(
        "a an the this that these those my our is are has do does not by will who to every day in morning "
        "at home on sundays"
    )
)


@dataclass(frozen=True)
class Item:
    """One input of a group, and the right answer of the group's tasks (held-out ones too).

    Test and validation items have an answer for every task, training items for some.
    """

    group: str
    input: str
    answers: dict[str, str]


def write_prompt(text: str, system: bool = False) -> str:
    """Write SmolLM2-Instruct's chat prompt around an input; system: with the template's system message."""
    return f"{SYSTEM if system else ''}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def name_task(task: str, text: str) -> str:
    """Put the task's name before an input: a routed checkpoint is not told which expert to use."""
    return f"{task}: {text}"


def find_group(task: str) -> str:
    """Find the group of a task, held-out tasks included."""
    for group, tasks in GROUPS.items():
        if task in tasks + HELD_OUT[group]:
            return group
    raise SystemExit(f"unknown task {task!r}; tasks: {', '.join(TASKS + sum(HELD_OUT.values(), ()))}")


def build_splits(tokenizer, seed: int = SEED) -> dict[str, list[Item]]:
    """Build train, valid and test.

    Args:
        tokenizer: of the backbone; its vocabulary says which words are common.
        seed: decides the splits and every draw.

    Returns:
        split -> items of all groups. Test and valid words are common and complete; training has others too.
    """
    words = find_words(tokenizer.get_vocab())
    families = group_families([w.lemma for w in words] + PEOPLE + THINGS + ACTIONS)
    splits: dict[str, list[Item]] = {}
    for split, count in COUNTS.items():
        chosen = [w for w in words if choose_split(families[w.lemma], seed) == split]
        if split != "train":
            chosen = _shuffle([w for w in chosen if w.common and w.complete], f"{seed}:{split}:words")[:count]
        clauses = draw_clauses(split, 2 * count, families, seed)
        items = [Item("word", w.lemma, answer_word(w)) for w in chosen]
        sentences = [Item("sentence", write_sentence(c), {t: f(c) for t, f in SENTENCE_TASKS.items()}) for c in clauses]
        items += [s for s in sentences if _fits(s, tokenizer)][:count]
        items += [
            Item("date", d.isoformat(), {t: f(d) for t, f in DATE_TASKS.items()}) for d in _draw_dates(split, seed)
        ]
        splits[split] = items
    check_leaks(splits)
    return splits


def _shuffle(items: list, key: str) -> list:
    random.Random(key).shuffle(items)
    return items


def _fits(item: Item, tokenizer) -> bool:
    return all(
        len(tokenizer(a, add_special_tokens=False)["input_ids"]) <= MAX_ANSWER_TOKENS for a in item.answers.values()
    )


def _draw_dates(split: str, seed: int) -> list[datetime.date]:
    start = datetime.date(1970, 1, 1)
    days = (start + datetime.timedelta(days=n) for n in range(36525))
    return _shuffle([d for d in days if choose_split(d.isoformat(), seed) == split], f"{seed}:{split}:dates")[
        : COUNTS[split]
    ]


def check_leaks(splits: dict[str, list[Item]]) -> None:
    """Refuse a test input that occurs in training, and a test word that occurs in training in any form."""
    texts = {split: _collect_words(items) for split, items in splits.items()}
    train_inputs = {item.input for item in splits["train"]}
    shared = [item.input for item in splits["test"] if item.input in train_inputs]
    shared += sorted((texts["test"] & texts["train"]) - FUNCTION_WORDS)
    if shared:
        raise SystemExit(f"test material occurs in training: {shared[:10]}")


def _collect_words(items: Iterable[Item]) -> set[str]:
    """Collect the words of all inputs and of the answers that inflect them (not their initials)."""
    found: set[str] = set()
    for item in items:
        if item.group == "date":
            continue
        for text in [item.input, *(a for task, a in item.answers.items() if task != "initial")]:
            found.update(text.lower().strip(".?").split())
    return found


def save_items(items: Iterable[Item], path: Path) -> None:
    """Save items as one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(vars(item)) + "\n" for item in items))


def load_splits(folder: Path) -> dict[str, list[Item]]:
    """Load train and valid items written by this file's command."""
    return {
        split: [Item(**json.loads(line)) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "valid")
    }


def save_evaluation(test: list[Item], train: list[Item], folder: Path, seed: int = SEED) -> None:
    """Save calibration.jsonl and TASK.jsonl in eval/, new_expert/eval/ (held-out) and routed/eval/."""
    for group, tasks in GROUPS.items():
        items = [item for item in test if item.group == group]
        for task in tasks + HELD_OUT[group]:
            place = "eval" if task in tasks else "new_expert/eval"
            _save_rows(
                [{"prompt": write_prompt(i.input), "answer": i.answers[task]} for i in items],
                folder / place / f"{task}.jsonl",
            )
    draw = random.Random(f"{seed}:calibration")
    rows = []
    for task in TASKS:
        items = [item for item in train if task in item.answers]
        for item in draw.sample(items, 128 // len(TASKS)):
            rows.append({"prompt": write_prompt(item.input), "answer": item.answers[task], "expert": task})
    _save_rows(rows, folder / "calibration.jsonl")
    for task in TASKS:
        items = [item for item in test if item.group == find_group(task)]
        rows = [{"prompt": write_prompt(name_task(task, i.input)), "answer": i.answers[task]} for i in items]
        _save_rows(rows, folder / "routed" / "eval" / f"{task}.jsonl")


def _save_rows(rows: list[dict[str, str]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write the training items to --out and, with --evaluation, the committed test and calibration files."""
    from lime_layers import find_backbone, load_tokenizer

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--base", type=Path, default=None, help="backbone: folder or .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and valid.jsonl")
    parser.add_argument(
        "--evaluation", action="store_true", help="rewrite eval/, new_expert/eval/ and calibration.jsonl"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    splits = build_splits(load_tokenizer(args.base or find_backbone()), args.seed)
    for split in ("train", "valid"):
        save_items(splits[split], args.out / f"{split}.jsonl")
    if args.evaluation:
        save_evaluation(splits["test"], splits["train"], HERE, args.seed)
    for split, items in splits.items():
        print(split, {group: sum(i.group == group for i in items) for group in GROUPS})


if __name__ == "__main__":
    main()
