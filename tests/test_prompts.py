"""Tokenizer and chat template on the device equal `transformers` on the workstation."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# what a hostile model may bring


HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}x",
    "a tower of powers": "{{ 9**(9**9) }}",
    "a text that doubles": "{% set ns = namespace(t='ha') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}"
    "{% endfor %}",
    "a huge product": "{{ ('ha' * 9999999999) | length }}",
    "a wide field": "{{ '%2000000000d' | format(1) }}",
    "a long answer": "{{ 'ha' * 9999999 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a division by zero": "{{ 1 // 0 }}",
    "no such attribute": "{{ messages.nothing.at.all }}",
    "a type error": "{{ messages + 1 }}",
    "a value error": "{{ 'ab'.index('c') }}",
    "a key error": "{{ messages[0].content.join(3) }}",
    "lipsum": "{{ lipsum(n=999999) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_clear_error(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither hangs nor fills the memory of this process, and says one line."""
    monkeypatch.setattr("lime_edge.bundle.templates.START", 3.0)
    (folder / "chat_template.jinja").write_text(HOSTILE[name])
    before, begin = read_peak(), time.monotonic()
    with pytest.raises(LimeEdgeError, match="the chat template failed: .+") as error:
        TextCodec(folder).render_chat(TALK)
    assert time.monotonic() - begin < 10 and read_peak() - before < 50_000_000
    assert error.value.problem.count("\n") == 0 and "Traceback" not in capfd.readouterr().err


def read_peak() -> int:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_messages_that_are_none_are_refused(folder: Path) -> None:
    codec = TextCodec(folder)
    for messages in ([1], ["hi"], [None]):
        with pytest.raises(LimeEdgeError, match="messages: expected a list of"):
            codec.render_chat(messages)  # type: ignore[arg-type]
    with pytest.raises(LimeEdgeError, match="messages are no plain data"):
        codec.render_chat([{"role": "user", "content": object()}])


def test_one_of_several_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextCodec(folder).render_chat(TALK) == "yes"


def edit_tokenizer(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def replacing(text: str, by: str) -> dict:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


@pytest.mark.parametrize("place", ["normalizer", "decoder"])
def test_a_chain_of_replacements_is_refused(folder: Path, place: str) -> None:
    key = {"normalizer": "normalizers", "decoder": "decoders"}[place]
    edit_tokenizer(folder, **{place: {"type": "Sequence", key: [replacing("a", "a" * 9)] * 12}})
    with pytest.raises(LimeEdgeError, match=f"{place}: its replacements make a text up to 2.8.*e.11 times as long"):
        TextCodec(folder)
    deep: dict = replacing("a", "aa")
    for _ in range(90):
        deep = {"type": "Sequence", key: [deep, replacing("a", "aa")]}
    edit_tokenizer(folder, **{place: deep})
    with pytest.raises(LimeEdgeError, match="times as long|nested too deeply"):
        TextCodec(folder)


def test_replacements_that_models_use_are_taken(folder: Path) -> None:
    text = TextCodec(folder).encode("hello there")
    edit_tokenizer(folder, normalizer={"type": "Sequence", "normalizers": [replacing(" ", "\u2581")] * 3})
    assert TextCodec(folder).encode("hello there") != text


def test_padding_and_truncation_of_a_file_do_nothing(folder: Path) -> None:
    expected = TextCodec(folder).encode("hello there")
    padding: dict[str, Any] = {"strategy": {"Fixed": 10_000_000_000}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    edit_tokenizer(folder, padding=padding, truncation=truncation)
    assert TextCodec(folder).encode("hello there") == expected


PANICS = {
    "unigram without its unknown": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]], "byte_fallback": False},
    "merges of nothing": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]},
    "no model": 3,
    "ids beyond": {"type": "WordLevel", "vocab": {"a": 2**70}, "unk_token": "a"},
}


@pytest.mark.parametrize("name", PANICS)
def test_damaged_models_are_one_clear_error(folder: Path, name: str) -> None:
    edit_tokenizer(folder, model=PANICS[name])
    with pytest.raises(LimeEdgeError, match="not a readable tokenizer"):
        TextCodec(folder)


def test_a_panic_of_the_library_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyo3's panics are no Exception."""

    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, *_: object, **__: object) -> None:
            raise PanicException("called `Option::unwrap()` on a `None` value")

    codec = TextCodec(folder)
    monkeypatch.setattr(codec, "_tokenizer", Panicking())
    with pytest.raises(LimeEdgeError, match="the tokenizer cannot encode this text: called"):
        codec.encode("x")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b'{"a": ' * 100_000, b"", b"[1, 2]", b'{"eos_token_id": "x"}'])
def test_files_that_are_not_what_they_should_be(folder: Path, name: str, data: bytes) -> None:
    """One clear error, or, where that is what a file may say, none."""
    (folder / name).write_bytes(data)
    try:
        codec = TextCodec(folder)
        codec.encode("hello")
        codec.render_chat(TALK)
    except LimeEdgeError as error:
        assert name.partition(".")[0] in error.problem or "chat template" in error.problem
    else:
        assert data == b'{"eos_token_id": "x"}' and name == "tokenizer_config.json" or name == "chat_template.jinja"


def test_texts_that_are_none(folder: Path) -> None:
    codec = TextCodec(folder)
    with pytest.raises(LimeEdgeError, match="character 2 is half a surrogate pair"):
        codec.encode("ab\ud800c")
    with pytest.raises(LimeEdgeError, match="expected a string, found int"):
        codec.encode(3)  # type: ignore[arg-type]
    for ids in ([-1], [2**40], ["x"]):
        with pytest.raises(LimeEdgeError, match="the tokenizer cannot decode these ids"):
            codec.decode(ids)  # type: ignore[arg-type]
