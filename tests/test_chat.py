"""Chat templates reduced to text around turns: equal to `transformers`, or absent with a reason."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chat_templates import IRREDUCIBLE, REDUCIBLE
from transformers import AutoTokenizer

from lime_edge.bundle.fields import Prompts
from lime_edge.bundle.prompts import TextCodec
from lime_edge.bundle.turns import write_turns
from lime_edge.compiler.formats import chat
from lime_edge.compiler.formats.chat import draw_conversation, list_pieces, reduce_template

Make = Callable[..., Path]
VECTORS = json.loads((Path(__file__).parent / "vectors" / "prompts.json").read_text())


@pytest.fixture
def put_template(tiny_model: Make, tmp_path: Path) -> Callable[[str], Path]:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "tokenizer"))

    def put(template: str) -> Path:
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return put


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, contents, strict=False)]


@pytest.mark.parametrize("name", REDUCIBLE)
def test_reduced_templates_equal_transformers(put_template: Callable[[str], Path], name: str) -> None:
    """On 200 conversations that the export did not try, with both ends; and the codec writes the same without it."""
    folder = put_template(REDUCIBLE[name])
    prompts, theirs = reduce_template(TextCodec(folder)), AutoTokenizer.from_pretrained(folder)
    assert prompts is not None and prompts.roles, prompts
    codec, draw = TextCodec(folder, prompts), random.Random(7)
    pieces = list_pieces(REDUCIBLE[name], theirs.special_tokens_map.values())
    for number in range(200):
        one = draw_conversation(draw, prompts, pieces, prompts.order == "any")
        expected = theirs.apply_chat_template(one.messages, tokenize=False, add_generation_prompt=one.open)
        assert write_turns(prompts, one.messages, one.open) == expected, f"conversation {number}: {one}"
        assert codec.render_chat(one.messages, one.open) == expected


@pytest.mark.parametrize("name", IRREDUCIBLE)
def test_what_cannot_be_reduced_has_a_reason(put_template: Callable[[str], Path], name: str) -> None:
    template, why = IRREDUCIBLE[name]
    prompts = reduce_template(TextCodec(put_template(template)))
    assert prompts is not None and not prompts.roles
    assert why in (prompts.reason or ""), prompts.reason


def test_the_parts_are_those_that_a_reader_would_write(put_template: Callable[[str], Path]) -> None:
    prompts = reduce_template(TextCodec(put_template(REDUCIBLE["chatml with a default system turn"])))
    assert prompts is not None and prompts.begin == "" and prompts.default_system == "Be kind."
    assert prompts.roles["user"].prefix == "<|im_start|>user\n" and prompts.roles["user"].suffix == "<|im_end|>\n"
    assert prompts.opening == "<|im_start|>assistant\n" and prompts.order == "any" and not prompts.strip
    prompts = reduce_template(TextCodec(put_template(REDUCIBLE["closing"])))
    assert prompts is not None and prompts.closing == "<|im_end|>" and prompts.roles["user"].suffix == "<|end|>\n"
    prompts = reduce_template(TextCodec(put_template(REDUCIBLE["system inside the first user turn"])))
    assert prompts is not None and prompts.system_opens_user and prompts.roles["system"].suffix == "<</SYS>>\n\n"
    prompts = reduce_template(TextCodec(put_template(REDUCIBLE["no system turn"])))
    assert prompts is not None and set(prompts.roles) == {"user", "assistant"} and prompts.order == "alternating"
    assert prompts.strip == ("user", "assistant")


def test_a_wrong_reduction_is_found_by_the_proof(
    put_template: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof is independent of how the parts were found."""
    find = chat.find_turns

    def spoil(*arguments: object) -> Prompts:
        found = find(*arguments)  # type: ignore[arg-type]
        fields = {name: getattr(found, name) for name in found.__struct_fields__}
        return Prompts(**fields | {"strip": ("user",)})

    monkeypatch.setattr(chat, "find_turns", spoil)
    prompts = reduce_template(TextCodec(put_template(REDUCIBLE["chatml"])))
    assert prompts is not None and "more than whose turn it is" in (prompts.reason or "")


def test_other_turns_are_left_to_the_template(put_template: Callable[[str], Path]) -> None:
    """What the reduced form was not proven for: Python asks the template, which knows."""
    folder = put_template(REDUCIBLE["no system turn"])
    prompts = reduce_template(TextCodec(folder))
    assert prompts is not None
    assert write_turns(prompts, [*turns("a"), *turns("b")], True) is None
    assert write_turns(prompts, [{"role": "tool", "content": "x"}], True) is None
    assert write_turns(prompts, [], True) is None
    codec = TextCodec(folder, prompts)
    with pytest.raises(Exception, match="must alternate"):
        codec.render_chat([*turns("a"), *turns("b")])
    named = [{"role": "user", "content": "a", "name": "me"}]
    assert write_turns(prompts, named, True) is None and codec.render_chat(named) == codec.render_chat(turns("a"))


def test_no_template_no_prompts(put_template: Callable[[str], Path]) -> None:
    folder = put_template("x")
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert reduce_template(TextCodec(folder)) is None


@pytest.mark.parametrize("entry", VECTORS, ids=lambda entry: entry["name"])
def test_vectors_are_met(entry: dict[str, Any]) -> None:
    prompts = msgspec.convert(entry["prompts"], Prompts)
    for case in entry["cases"]:
        messages = [{"role": role, "content": content} for role, content in case["turns"]]
        assert write_turns(prompts, messages, case["open"]) == case["text"]


def test_the_vectors_are_what_their_tool_writes() -> None:
    tool = Path(__file__).parent.parent / "tools" / "prompt_vectors.py"
    assert subprocess.run([sys.executable, str(tool), "--check"], check=False).returncode == 0, f"run python {tool}"
