"""Accuracy of an expert on prompts with answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lime_edge.bundle.documents import parse_json, read_lines
from lime_edge.bundle.staging import write_file
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions
from lime_edge.session.vision import VisionSession

NEW_TOKENS = 16


@dataclass(frozen=True)
class Example:
    """One line of an evaluation file: a complete prompt, the answer, labels where it is a choice, pictures it shows."""

    prompt: str
    answer: str
    labels: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Result:
    """What came out: one answer per example, in order."""

    answers: tuple[str, ...]
    correct: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return sum(self.correct) / len(self.correct)


HINT = 'one JSON object a line: {"prompt": ..., "answer": ..., "labels": [...]?, "image": FILE or [FILE, ...]?}'


def read_examples(path: Path) -> list[Example]:
    """Read a JSONL file of {"prompt", "answer", "labels"?, "image"?}; an image lies relative to the file.

    Raises:
        LimeEdgeError: every bad line at once.
    """
    examples = []
    with Faults(str(path), HINT) as faults:
        for number, line in read_lines(path, HINT):
            try:
                record = parse_json(line, f"line {number}", HINT)
            except LimeEdgeError as error:
                faults.add(error.problem)
                continue
            record = record if isinstance(record, dict) else {}
            prompt, answer, labels = record.get("prompt"), record.get("answer"), record.get("labels") or []
            shown = record.get("image") or []
            files = [shown] if isinstance(shown, str) else shown
            if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
                faults.add(f"line {number}: image must be a path, or a list of paths")
            elif not isinstance(prompt, str) or not isinstance(answer, str) or not isinstance(labels, list):
                faults.add(f"line {number}: prompt and answer must be strings, labels a list")
            elif not all(isinstance(label, str) and label for label in labels):
                faults.add(f"line {number}: labels must be texts")
            elif labels and answer not in labels:
                faults.add(f"line {number}: answer", f"one of {labels}", repr(answer))
            else:
                images = tuple(path.parent / file for file in files)
                examples.append(Example(prompt, answer, tuple(labels), images))
        if not examples and not faults:
            faults.add("no examples")
    return examples


def evaluate(session: Session, examples: list[Example], progress: Callable[[int], None] = lambda _: None) -> Result:
    """Answer every example with the session's current expert.

    A choice is scored on the first token of each label; anything else is generated greedily, 16
    tokens at most, and must match exactly after strip.

    Args:
        progress: called with the number of examples done.
    """
    answers = []
    for done, example in enumerate(examples, 1):
        answers.append(choose(session, example) if example.labels else write(session, example))
        progress(done)
    correct = tuple(a == e.answer.strip() for a, e in zip(answers, examples, strict=True))
    return Result(tuple(answers), correct)


def read_prompt(session: Session, example: Example) -> list[int]:
    """An example's token ids, its pictures seen by the expert in use.

    Raises:
        LimeEdgeError: pictures, and the model sees none; a file that is no picture; another number of placeholders.
    """
    if not example.images:
        return session.codec.encode(example.prompt)
    if not isinstance(session, VisionSession):
        raise LimeEdgeError(
            f"{session.bundle.path} sees no pictures, and {example.images[0]} is one", "take a vision-language bundle"
        )
    return session.read_prompt(example.prompt, example.images)


def choose(session: Session, example: Example) -> str:
    """The label whose first token is likeliest after the prompt.

    Raises:
        LimeEdgeError: two labels begin with the same token.
    """
    codec = session.codec
    first = [codec.encode(label)[0] for label in example.labels]
    if len(set(first)) != len(first):
        raise LimeEdgeError(
            f"labels {list(example.labels)} do not differ in their first token",
            "use labels that do, or leave them out and the answer is generated",
        )
    logits = session.logits(read_prompt(session, example), keep=1)[-1]
    return example.labels[int(logits[first].argmax())].strip()


def write(session: Session, example: Example) -> str:
    """The greedy answer."""
    options, prompt = GenerationOptions(max_new_tokens=NEW_TOKENS), example.prompt
    return "".join(session.generate(read_prompt(session, example) if example.images else prompt, options)).strip()


def report(results: list[Result], expert: str, data: str) -> dict[str, str | float | int]:
    """What `lime-edge eval` prints: accuracy and count; with a second result also the agreement."""
    first = results[0]
    facts: dict[str, str | float | int] = {
        "accuracy": first.accuracy,
        "count": len(first.answers),
        "expert": expert,
        "data": data,
    }
    if len(results) > 1:
        other = results[1]
        same = sum(a == b for a, b in zip(first.answers, other.answers, strict=True))
        facts |= {"other_accuracy": other.accuracy, "same_answers": same / len(first.answers)}
    return facts


def write_answers(path: Path, examples: list[Example], result: Result) -> None:
    """Write {"prompt", "answer", "given", "correct"} a line."""
    lines = [
        json.dumps({"prompt": e.prompt, "answer": e.answer, "given": given, "correct": correct}, ensure_ascii=False)
        for e, given, correct in zip(examples, result.answers, result.correct, strict=True)
    ]
    write_file(path, ("\n".join(lines) + "\n").encode())
