"""What every export of a language model writes down for readers that guess nothing: prompts, tokenizer, default."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import Make
from test_cli import Cli
from transformers import AutoTokenizer

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.fields import Always
from lime_edge.bundle.turns import write_turns
from lime_edge.compiler.formats.chat import draw_conversation, list_pieces

ROUTING = {"top_k": 2, "soft_topk": True}
IRREDUCIBLE = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.mark.parametrize("targets", [("onnx",), pytest.param(("executorch",), marks=pytest.mark.check)])
def test_prompts_equal_the_template_and_the_tokenizer_is_named(targets: tuple[str, ...], tiny_bundle: Make) -> None:
    """200 random conversations, against transformers' own rendering."""
    bundle = Bundle.open(tiny_bundle(targets=targets))
    prompts, facts = bundle.manifest.prompts, bundle.manifest.tokenizer
    assert prompts is not None and prompts.reason is None and {"user", "assistant"} <= prompts.roles.keys()
    theirs, draw = AutoTokenizer.from_pretrained(bundle.path / "tokenizer"), random.Random(7)
    pieces = list_pieces(theirs.chat_template, theirs.all_special_tokens)
    for _ in range(200):
        one = draw_conversation(draw, prompts, pieces, prompts.order == "any")
        wanted = theirs.apply_chat_template(list(one.messages), tokenize=False, add_generation_prompt=one.open)
        assert write_turns(prompts, one.messages, one.open) == wanted, one
    assert facts is not None and (facts.kind, facts.split) == ("byte-bpe", "gpt2")
    assert facts.classes is not None and facts.classes in bundle.manifest.files
    classes = json.loads((bundle.path / facts.classes).read_text())
    assert classes["letters"][:4] == [65, 90, 97, 122] and classes["numbers"][:2] == [48, 57]
    assert bundle.manifest.activation == Always()


def test_what_cannot_be_reduced_has_a_reason(tiny_model: Make, tiny_bundle: Make, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    (model / "chat_template.jinja").write_text(IRREDUCIBLE)
    prompts = Bundle.open(tiny_bundle(model)).manifest.prompts
    assert (
        prompts is not None and not prompts.roles and prompts.reason and "where in the conversation" in prompts.reason
    )
    session = lime_edge.open_decoder(tiny_bundle(model), threads=1)
    assert session.codec.render_chat([{"role": "user", "content": "hi"}]) == "1: hi\n"


def test_a_session_opens_with_the_default(lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    """An expert, the original model or routing: the session begins with it, and so does `run` without --expert."""
    model, out = tiny_model(), tmp_path / "x.lime"
    adapter = tiny_adapter(model, routing=ROUTING)
    words = ("export", model, "--adapter", adapter, "-o", out, "--quant", "none", "--force")
    answers = {}
    for default, selection in ((None, "expert0"), ("expert2", "expert2"), ("none", None), ("routed", "routed")):
        assert lime(*words, *(("--default", default) if default else ())).code == 0
        assert Bundle.open(out).manifest.default == default or default is None
        assert lime_edge.open_decoder(out, threads=1).selection == selection
        shown = [
            lime("run", out, "the nights", "--max-new-tokens", 12, *more).out
            for more in ((), ("--expert", default or "expert0"))
        ]
        assert shown[0] == shown[1], default
        answers[default] = shown[0]
    assert len(set(answers.values())) > 2, answers
    plain = tiny_adapter(model)
    fixed = ("export", model, "--adapter", plain, "-o", tmp_path / "y.lime", "--quant", "none")
    assert "--default: routed, but no graph will route" in lime.refuse(*fixed, "--default", "routed")
    dora = ("export", model, "--adapter", tiny_adapter(model, variant="dora"), *fixed[4:])
    assert "cannot be switched off" in lime.refuse(*dora, "--default", "none")
    assert "--default: none" in lime.refuse(*fixed, "--default", "none", "--fold", "expert1", "--single")
    assert not (tmp_path / "y.lime").exists()
