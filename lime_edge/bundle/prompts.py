"""Text to tokens and back on a device: tokenizer.json, chat template, special tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from lime_edge.errors import LimeEdgeError


class TextCodec:
    """The bundle's tokenizer and chat template.

    Args:
        directory: holds tokenizer.json and, where the model has them, tokenizer_config.json,
            chat_template.jinja and generation_config.json.
    Raises:
        LimeEdgeError: no tokenizer, or a damaged one.
    """

    def __init__(self, directory: Path):
        file = directory / "tokenizer.json"
        if not file.is_file():
            hint = "export with a model directory that holds tokenizer.json, or pass token ids"
            raise LimeEdgeError(f"{file}: the tokenizer is missing", hint)
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise LimeEdgeError(f"{file}: not a readable tokenizer: {error}", "copy the bundle again") from None
        self._config = _read_json(directory / "tokenizer_config.json")
        generation = _read_json(directory / "generation_config.json")
        template = directory / "chat_template.jinja"
        text = template.read_text(encoding="utf-8") if template.is_file() else self._config.get("chat_template")
        self._template = _compile_template(text) if isinstance(text, str) else None
        self.eos = self._eos_ids(generation)

    def _eos_ids(self, generation: dict[str, Any]) -> tuple[int, ...]:
        ids = generation.get("eos_token_id")
        if ids is None:
            token = self._special("eos_token")
            ids = self._tokenizer.token_to_id(token) if token else None
        if ids is None:
            return ()
        return tuple(ids) if isinstance(ids, list) else (int(ids),)

    def _special(self, key: str) -> str | None:
        token = self._config.get(key)
        return token.get("content") if isinstance(token, dict) else token

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; a complete prompt needs no special tokens added."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """Every token's own spelling and its id."""
        return self._tokenizer.get_vocab()

    def render_chat(self, messages: Sequence[dict[str, str]], open_turn: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: {"role": ..., "content": ...} each. open_turn: begin the assistant's turn.
        Raises:
            LimeEdgeError: the model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise LimeEdgeError("this model has no chat template", "pass a complete prompt (--raw)")
        names = {key: self._special(key) or "" for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=open_turn, **names)
        except jinja2.TemplateError as error:
            raise LimeEdgeError(
                f"the chat template failed: {error}", "pass a complete prompt instead (--raw)"
            ) from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LimeEdgeError(f"{file}: not JSON: {error}", "copy the bundle again") from None


def _compile_template(text: str) -> jinja2.Template:
    """Compile as `transformers` does, so that templates written for it mean the same here."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise LimeEdgeError(
            f"the chat template cannot be compiled: {error}", "pass complete prompts instead (--raw)"
        ) from None
