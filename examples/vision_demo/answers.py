"""Prompts and answers of the vision demo as tokens.

The prompt is the picture alone (or with a few words that ask for nothing in particular): only the expert decides
what is answered. Words, numbers and times are written one character a token. A word that was never seen in training
is then read letter by letter; written in the tokenizer's own pieces it would be a token that was never an answer.
"""

from __future__ import annotations

from scenes import ARROWS, COLOURS, NUMBERS, PLACES, SHAPES, TASKS, Scene

IMAGE = "<image>"
RESERVED = "<empty_output>"  # a token of SmolLM2 that is never used; it becomes IMAGE, so the vocabulary keeps its size
END = "<|im_end|>"
LONGEST = 6  # tokens of the longest answer (12:45 or five letters), with END
BESIDE = ("", "What do you see?", "Look at this.", "Answer.")  # words beside the picture: none of them names a task
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_prompt(beside: str = "") -> str:
    """Write the prompt of one picture; IMAGE stands for all of its rows."""
    return f"<|im_start|>user\n{IMAGE}{beside}<|im_end|>\n<|im_start|>assistant\n"


class Speller:
    """Turns prompts and answers into token ids."""

    def __init__(self, tokenizer) -> None:
        closed = (*COLOURS, *SHAPES, *NUMBERS, *PLACES, *ARROWS)
        self._table = {text: tokenizer.encode(text, add_special_tokens=False) for text in closed}
        characters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:"
        self._table |= {c: tokenizer.encode(c, add_special_tokens=False) for c in characters}
        if any(len(self._table[c]) != 1 for c in characters):
            raise SystemExit("the tokenizer has no token for each of A-Z, 0-9 and ':'")
        self.end = tokenizer.convert_tokens_to_ids(END)
        self._tokenizer = tokenizer

    def spell_answer(self, text: str) -> list[int]:
        """The tokens of an answer, END included."""
        pieces = [self._table[text]] if text in self._table else [self._table[c] for c in text]
        return [*(token for piece in pieces for token in piece), self.end]

    def spell_prompt(self, beside: str = "") -> tuple[list[int], list[int]]:
        """The tokens before and after the picture's rows."""
        before, after = write_prompt(beside).split(IMAGE)
        return tuple(self._tokenizer.encode(part, add_special_tokens=False) for part in (before, after))

    def encode_scene(self, scene: Scene) -> list[int]:
        """The answers of all tasks, LONGEST tokens each, filled up with -100."""
        answers = scene.answer()
        tokens = [self.spell_answer(answers[task]) for task in TASKS]
        return [token for row in tokens for token in row + [-100] * (LONGEST - len(row))]
