"""Tokenizer and chat template on the device equal `transformers` on the workstation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lime_edge.bundle.prompts import TextCodec
from lime_edge.errors import LimeEdgeError

Make = Callable[..., Path]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi <b>\n there"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "why?"},
]


@pytest.fixture
def folder(tiny_model: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model(), tmp_path / "tokenizer"))


def test_text_and_chat_equal_transformers(folder: Path) -> None:
    ours, theirs = TextCodec(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("hello there", "<|im_start|>user\nx<|im_end|>", "", "zażółć 文"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.can_chat
    assert ours.render_chat(TALK) == theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    ids = theirs.encode("a <|im_end|> b")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


RICH = """{%- for message in messages %}
  {%- if loop.first %}{{ bos_token }}{% endif %}
  {%- if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
  {{ message.content | trim }} {{ {'a': "é"} | tojson }}
  {%- if loop.last %}{% break %}{% endif %}
{% endfor %}"""


def test_template_features_equal_transformers(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(RICH)
    ours, theirs = TextCodec(folder), AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(TALK) == expected
    with pytest.raises(LimeEdgeError, match="no tools"):
        ours.render_chat([{"role": "tool", "content": ""}])


def test_template_may_not_leave_its_sandbox(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(LimeEdgeError, match="chat template failed"):
        TextCodec(folder).render_chat(TALK)


def test_missing_and_damaged_tokenizers_are_refused(folder: Path) -> None:
    with pytest.raises(LimeEdgeError, match="tokenizer is missing"):
        TextCodec(folder / "nothing")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(LimeEdgeError, match="not a readable tokenizer"):
        TextCodec(folder)


def test_no_template_is_said(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    codec = TextCodec(folder)
    assert not codec.can_chat
    with pytest.raises(LimeEdgeError, match="no chat template"):
        codec.render_chat(TALK)
