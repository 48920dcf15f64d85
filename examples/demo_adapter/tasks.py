"""Anybody's own tasks: a folder of TASK.jsonl, one {"prompt": ..., "answer": ...} a line, one expert for each file."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # what lime-edge takes as an expert's name
FEWEST = 10  # examples of a task below which nothing can be held out
SPLITS = (("test", 10), ("valid", 15))  # of 100: test below 10, valid below 15, the rest is for training


@dataclass(frozen=True)
class Row:
    """One example, its prompt complete: what the model reads, and what it is to write."""

    prompt: str
    answer: str


def read_tasks(folder: Path, tokenizer: Any, only: str | None = None) -> dict[str, dict[str, list[Row]]]:
    """Read a folder of tasks and split every task by its prompts.

    A prompt that holds no special token of the model is put into its chat template as the user's message; one that
    does is taken as complete. Equal prompts go to the same split in every task, so that no test prompt is trained on.

    Args:
        only: the one task that is wanted.

    Returns:
        split ("train", "valid", "test") -> task -> rows.
    """
    files = sorted(folder.glob("*.jsonl"))
    if only is not None:
        files = [file for file in files if file.stem == only]
    if not files:
        raise SystemExit(f"{folder}: no {only or 'TASK'}.jsonl in it; one file a task, one JSON object a line")
    faults, splits = [], {split: {} for split in ("train", "valid", "test")}
    for file in files:
        rows, found = _read_rows(file, tokenizer)
        faults += found
        if not NAME.fullmatch(file.stem) or file.stem in ("none", "routed"):
            faults.append(f"{file.name}: {file.stem!r} cannot be an expert's name (letters, digits, '.', '_', '-')")
        if not found and len(rows) < FEWEST:
            faults.append(f"{file.name}: {len(rows)} examples; {FEWEST} are the least, some hundreds are better")
        for split in splits:
            splits[split][file.stem] = [row for row in rows if choose_split(row.prompt) == split]
        for split in ("train", "test"):
            if not found and len(rows) >= FEWEST and not splits[split][file.stem]:
                faults.append(f"{file.name}: too few different prompts to hold some back for testing")
    if faults:
        raise SystemExit("\n".join([f"{folder}: {len(faults)} faults", *(f"  - {fault}" for fault in faults[:20])]))
    return splits


def _read_rows(file: Path, tokenizer: Any) -> tuple[list[Row], list[str]]:
    """The rows of a file, and what is wrong with it."""
    rows, faults = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row["prompt"], row["answer"]
        except (ValueError, KeyError, TypeError) as error:
            faults.append(f'{file.name}, line {number}: expected {{"prompt": ..., "answer": ...}}: {error!r}')
            continue
        if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt or not answer:
            faults.append(f"{file.name}, line {number}: prompt and answer must be texts, and not empty")
        else:
            rows.append(Row(complete(prompt, tokenizer), answer))
    return rows, faults


def complete(prompt: str, tokenizer: Any) -> str:
    """The prompt as the model reads it: as it is when it holds special tokens, else in the chat template."""
    special = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    if any(token in prompt for token in special) or not tokenizer.chat_template:
        return prompt
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def choose_split(prompt: str) -> str:
    """The split of a prompt: a hash decides, so that it never changes."""
    number = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 100
    return next((split for split, below in SPLITS if number < below), "train")


def save_tests(splits: dict[str, dict[str, list[Row]]], folder: Path) -> None:
    """Write what was held back, TASK.jsonl each, as `lime-edge eval --data` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in splits["test"].items():
        text = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
