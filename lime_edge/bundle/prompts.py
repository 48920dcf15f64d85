"""Text to tokens and back on a device: tokenizer.json, chat template, special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from lime_edge.bundle.fields import Prompts
from lime_edge.bundle.growth import find_growth
from lime_edge.bundle.inside import is_plain
from lime_edge.bundle.templates import Conversation, render_all
from lime_edge.bundle.turns import write_turns
from lime_edge.errors import LimeEdgeError

DAMAGED = "the bundle is damaged: copy or export it again"
LARGEST = 1 << 27  # bytes of a tokenizer.json; the largest in use have 35 MB
RAW = "pass a complete prompt instead (`raw`)"
T = TypeVar("T")


class TextCodec:
    """The bundle's tokenizer and chat template.

    Args:
        directory: holds tokenizer.json and, where the model has them, tokenizer_config.json,
            chat_template.jinja and generation_config.json.
        prompts: the chat template as the export reduced it; None: the template itself is run for every conversation.
    Raises:
        LimeEdgeError: no tokenizer, or a damaged one.
    """

    def __init__(self, directory: Path, prompts: Prompts | None = None):
        self._tokenizer = read_tokenizer(directory / "tokenizer.json")
        self._config = _read_json(directory / "tokenizer_config.json")
        generation = _read_json(directory / "generation_config.json")
        self._template = self._find_template(directory)
        self._prompts = prompts if prompts is not None and prompts.roles else None
        self.eos = self._eos_ids(generation, directory / "generation_config.json")

    def _find_template(self, directory: Path) -> str | None:
        """The template's text: a file, or in the configuration, there maybe one of several by name."""
        file = directory / "chat_template.jinja"
        if is_plain(file):
            return _read_text(file)
        found = self._config.get("chat_template")
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

    def _eos_ids(self, generation: dict[str, Any], file: Path) -> tuple[int, ...]:
        ids = generation.get("eos_token_id")
        if ids is None:
            token = self._special("eos_token")
            ids = self._tokenizer.token_to_id(token) if token else None
        found = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in found):
            raise LimeEdgeError(f"{file}: eos_token_id: expected token ids, found {ids!r}", DAMAGED)
        return tuple(found)

    def _special(self, key: str) -> str | None:
        token = self._config.get(key)
        found = token.get("content") if isinstance(token, dict) else token
        return found if isinstance(found, str) else None

    @property
    def can_chat(self) -> bool:
        """Whether conversations can be written: by the template, or as it was reduced."""
        return self._template is not None or self._prompts is not None

    @property
    def template(self) -> str | None:
        """The chat template's text."""
        return self._template

    @property
    def special_names(self) -> dict[str, str]:
        """Special tokens by the names that templates call them; empty where the model has none."""
        return {key: self._special(key) or "" for key in ("bos_token", "eos_token", "pad_token", "unk_token")}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; a complete prompt needs no special tokens added.

        Raises:
            LimeEdgeError: no text, half a surrogate pair, or a tokenizer that fails.
        """
        if not isinstance(text, str):
            raise LimeEdgeError(f"text: expected a string, found {type(text).__name__}", "give text, or token ids")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LimeEdgeError(f"text: character {error.start} is half a surrogate pair", "give whole text") from None

        def encode() -> list[int]:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

        return _ask("the tokenizer cannot encode this text", encode)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return _ask(
            "the tokenizer cannot decode these ids", lambda: self._tokenizer.decode(list(ids), skip_special_tokens=True)
        )

    def vocabulary(self) -> dict[str, int]:
        """Every token's own spelling and its id."""
        return self._tokenizer.get_vocab()

    def name_token(self, token: int) -> str | None:
        """A token's own spelling, None where there is no such id."""
        return self._tokenizer.id_to_token(token)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], open_turn: bool = True) -> str:
        """The text of a conversation: as the template was reduced where that holds, else by the template itself.

        Args:
            messages: {"role": ..., "content": ...} each. open_turn: begin the assistant's turn.
        Raises:
            LimeEdgeError: the model has no chat template, or the template refuses the messages, fails or hangs.
        """
        if not self.can_chat:
            raise LimeEdgeError("this model has no chat template", "pass a complete prompt (`raw`)")
        messages = list(messages)
        if not all(isinstance(message, Mapping) for message in messages):
            raise LimeEdgeError("messages: expected a list of {role, content}", RAW)
        if self._prompts is not None:
            text = write_turns(self._prompts, messages, open_turn)
            if text is not None:
                return text
        if self._template is None:
            raise LimeEdgeError("these turns are none that the model's chat template was reduced for", RAW)
        (found,) = render_all(self._template, self.special_names, [Conversation(messages, open_turn)])
        if found.error:
            raise LimeEdgeError(f"the chat template failed: {found.error}", RAW)
        return found.text


def read_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer that neither pads nor cuts, whatever its file asks for: prompts are as long as they are.

    Raises:
        LimeEdgeError: missing, damaged, or made to blow texts up.
    """
    if not is_plain(file):
        hint = "export with a model directory that holds tokenizer.json, or pass token ids"
        raise LimeEdgeError(f"{file}: the tokenizer is missing", hint)
    try:
        data = file.read_bytes() if file.stat().st_size <= LARGEST else None
    except OSError as error:
        raise LimeEdgeError(f"{file}: not readable: {error.strerror}", DAMAGED) from None
    if data is None:
        raise LimeEdgeError(f"{file}: larger than {LARGEST >> 20} MB: not a tokenizer", DAMAGED)
    if fault := find_growth(data):
        raise LimeEdgeError(f"{file}: {fault}", "no tokenizer needs that: where does it come from?")
    tokenizer = _ask(f"{file}: not a readable tokenizer", lambda: Tokenizer.from_buffer(data))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _ask(problem: str, work: Callable[[], T]) -> T:
    """What the tokenizer library gives; its bare exceptions and its panics (no Exception) are one clear error."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise LimeEdgeError(f"{problem}: {first}", DAMAGED) from None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LimeEdgeError(f"{file}: not readable text: {error}", DAMAGED) from None


def _read_json(file: Path) -> dict[str, Any]:
    if not is_plain(file):
        return {}
    try:
        found = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise LimeEdgeError(f"{file}: not JSON: {error}", DAMAGED) from None
    if not isinstance(found, dict):
        raise LimeEdgeError(f"{file}: expected a JSON object, found {type(found).__name__}", DAMAGED)
    return found
