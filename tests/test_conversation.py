"""The chat: what it forgets, keeps and says; every expectation is computed without the chat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import Cli

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.cli.conversation import Conversation, fit
from lime_edge.errors import LimeEdgeError
from lime_edge.session.generate import GenerationOptions

Make = Callable[..., Path]


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


@pytest.fixture
def bundle(tiny_bundle: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle(quant="int4"), tmp_path / "tiny.lime"))


def answer(bundle: Path, messages: list[tuple[str, str]], expert: str, tokens: int) -> str:
    """What a fresh session says to a whole conversation."""
    session = lime_edge.open_decoder(bundle, threads=1)
    session.use(expert)
    text = session.codec.render_chat([{"role": role, "content": said} for role, said in messages])
    return "".join(session.generate(text, max_new_tokens=tokens))


def chat(lime: Cli, bundle: Path, *lines: str, options: tuple[object, ...] = ()) -> tuple[str, str]:
    words = ("run", bundle, "--threads", 1, "-e", "expert0", "--max-new-tokens", 3, *options)
    done = lime(*words, text="\n".join([*lines, ""]))
    assert done.code == 0 and "Traceback" not in done.err, done.err
    return done.out, done.err


def test_a_full_cache_forgets_the_oldest_turns_and_says_so(lime: Cli, bundle: Path) -> None:
    file = bundle.parent / "talk.json"
    lines = [f"question {number}" for number in range(5)]
    out, err = chat(lime, bundle, *lines, f"/save {file}", options=("--max-length", 64, "--system", "S"))
    assert len(out.splitlines()) >= 5 and "error" not in err
    assert "the cache of 64 tokens is full: the oldest" in err, err
    kept = [message["content"] for message in json.loads(file.read_text())["messages"]]
    assert kept[0] == "S" and kept[-2] == "question 4" and "question 0" not in kept, kept


def test_what_is_forgotten_is_the_oldest_and_the_system_message_stays(bundle: Path) -> None:
    session = lime_edge.open_decoder(bundle, threads=1, max_length=60)
    options = GenerationOptions(max_new_tokens=4)
    talk = Conversation("Be brief.")
    for number in range(6):
        talk = talk.add("user", f"question {number}").add("assistant", f"answer {number}")
    talk = talk.add("user", "the last")
    shorter, prompt = fit(session, talk, options)
    assert shorter.system == "Be brief." and shorter.turns == talk.turns[-len(shorter.turns) :]
    assert len(shorter.turns) < len(talk.turns) and shorter.turns[0][0] == "user"
    count = len(session.codec.encode(prompt))
    assert count + 4 <= 60
    one_more = Conversation(talk.system, talk.turns[-len(shorter.turns) - 2 :])
    longer = len(session.codec.encode(session.codec.render_chat(one_more.messages())))
    assert longer + 4 > 60, "it forgot more than it had to"
    with pytest.raises(LimeEdgeError, match="message and the system message are too long"):
        fit(session, Conversation("Be brief.", (("user", "far too long " * 30),)), options)


def test_a_chat_answers_as_a_fresh_session_does(lime: Cli, bundle: Path) -> None:
    out, _ = chat(lime, bundle, "hi", "you", options=("--system", "S"))
    first = answer(bundle, [("system", "S"), ("user", "hi")], "expert0", 3)
    second = answer(bundle, [("system", "S"), ("user", "hi"), ("assistant", first), ("user", "you")], "expert0", 3)
    assert out == f"{first}\n{second}\n"


def test_retry_answers_the_last_message_with_the_expert_in_use(lime: Cli, bundle: Path) -> None:
    out, err = chat(lime, bundle, "/retry", "hi", "/expert expert1", "/retry", "/retry")
    one, two = (answer(bundle, [("user", "hi")], expert, 3) for expert in ("expert0", "expert1"))
    assert out == f"{one}\n{two}\n{two}\n" and one != two
    assert err.count("error: nothing to answer again") == 1


def test_the_system_message_can_be_set_and_taken_away(lime: Cli, bundle: Path) -> None:
    out, err = chat(lime, bundle, "/system Be kind.", "hi", "/reset", "/system none", "hi", "/system")
    with_it = answer(bundle, [("system", "Be kind."), ("user", "hi")], "expert0", 3)
    without = answer(bundle, [("user", "hi")], "expert0", 3)
    assert out == f"{with_it}\n{without}\n" and with_it != without
    assert "system message: Be kind." in err and err.splitlines()[-1] == "system message: none"


def test_a_conversation_is_kept_and_gone_on_with(lime: Cli, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    first, err = chat(lime, bundle, "/system S", "hi", f"/save {file}")
    kept = json.loads(file.read_text())
    said = first.removesuffix("\n")
    assert [m["content"] for m in kept["messages"]] == ["S", "hi", said] and kept["expert"] == "expert0"
    second, err = chat(lime, bundle, f"/load {file}", "you")
    messages = [("system", "S"), ("user", "hi"), ("assistant", said), ("user", "you")]
    assert second == answer(bundle, messages, "expert0", 3) + "\n", err
    (tmp_path / "mine.txt").write_text("all of it")
    _, err = chat(lime, bundle, f"/save {tmp_path / 'mine.txt'}", f"/load {tmp_path / 'none'}", "/save", "/load")
    assert err.count("error: ") == 4 and (tmp_path / "mine.txt").read_text() == "all of it"


def test_a_message_may_have_several_lines(lime: Cli, bundle: Path) -> None:
    wanted = answer(bundle, [("user", "one\ntwo")], "expert0", 3)
    for lines in (("one\\", "two"), ('"""one', 'two"""'), ('"""', "one", "two", '"""')):
        out, _ = chat(lime, bundle, *lines)
        assert out == wanted + "\n", lines


def test_the_chat_speaks_its_own_words(lime: Cli, bundle: Path) -> None:
    _, err = chat(lime, bundle, "/retyr", "/expert expert9", "x " * 400, "/stats", "/install", "hi", "/stats")
    assert "unknown command '/retyr'" in err and "did you mean '/retry'" in err
    assert "did you mean 'expert" in err
    assert "the message is too long" in err and "larger --max-length" in err and "`" not in err
    assert "no answer yet" in err and "/install needs a file" in err
    assert "(cut short after 3 tokens; a larger --max-new-tokens gives more)" in err
    stats = err.splitlines()[-1]
    assert (
        stats.startswith("expert0 on CPUExecutionProvider: 3 tokens, first after ")
        and "ended by length; cache " in stats
    ), stats


def test_one_answer_as_json(lime: Cli, bundle: Path) -> None:
    words = ("run", bundle, "hi", "--threads", 1, "-e", "expert0", "--max-new-tokens", 3)
    facts = json.loads(lime(*words, "--json").out)
    assert facts["answer"] == answer(bundle, [("user", "hi")], "expert0", 3)
    assert (facts["expert"], facts["tokens"], facts["finish_reason"]) == ("expert0", 3, "length")
    assert lime(*words).out == facts["answer"] + "\n"
    assert lime("run", bundle, "-", *words[3:], text="hi\n").out == facts["answer"] + "\n"
    assert "a prompt is missing" in lime.refuse("run", bundle, "--json")
    experts = Bundle.open(bundle).manifest.experts
    assert facts["expert"] in experts
