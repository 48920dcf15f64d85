"""The server as OpenAI's own client sees it: answers are those of a session of its own, errors are its exceptions."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from serving import Running, serve_here

import lime_edge
from lime_edge.bundle.prompts import TextCodec
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions

Make = Callable[..., Path]
TALK: Any = [{"role": "system", "content": "hi"}, {"role": "user", "content": "a fox"}]
FREE: Any = {"ignore_eos": True}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Make, tiny_model: Make) -> Path:
    return tiny_bundle(tiny_model(max_position_embeddings=256))


@pytest.fixture(scope="module")
def server(bundle: Path, text_encoder: Path) -> Iterator[Running]:
    with serve_here(bundle, text_encoder) as running:
        yield running


@pytest.fixture(scope="module")
def name(server: Running) -> str:
    """The model's name: the bundle's folder."""
    return server.service.shelves[0].name


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.api, api_key="unused", max_retries=0) as opened:
        yield opened


@pytest.fixture
def alone(bundle: Path) -> Session:
    return lime_edge.open_decoder(bundle, threads=1)


def answer_alone(session: Session, prompt: str, selection: Any, **options: Any) -> str:
    session.use(selection)
    return "".join(session.generate(prompt, GenerationOptions(**options)))


def test_models_are_the_bundle_and_its_skills(client: OpenAI, name: str) -> None:
    """As LangChain and Open WebUI list them: GET /v1/models, `data[].id`."""
    ids = [model.id for model in client.models.list()]
    skills = ["expert0", "expert1", "expert2", "expert3", "none"]
    assert ids[: 1 + len(skills)] == [name, *(f"{name}:{skill}" for skill in skills)]
    assert "vectors" in ids and "vectors:expert1" in ids
    assert client.models.retrieve(f"{name}:expert2").owned_by == "lime-edge"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(f"{name}:expert9")


@pytest.mark.parametrize("skill", ["expert0", "expert2", "none"])
def test_a_chat_is_answered_by_the_skill_of_its_model(client: OpenAI, alone: Session, name: str, skill: str) -> None:
    prompt = alone.codec.render_chat(TALK)
    found = client.chat.completions.create(model=f"{name}:{skill}", messages=TALK, max_tokens=9, extra_body=FREE)
    expected = answer_alone(alone, prompt, skill, max_new_tokens=9, ignore_eos=True)
    assert found.choices[0].message.content == expected
    assert found.choices[0].message.role == "assistant" and found.choices[0].finish_reason == "length"
    assert found.usage is not None
    counted = (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens)
    assert counted == (len(alone.codec.encode(prompt)), 9, len(alone.codec.encode(prompt)) + 9)
    assert found.to_dict()["lime"] == {"expert": skill}


def test_the_bare_name_is_the_default(client: OpenAI, alone: Session, name: str) -> None:
    found = client.completions.create(model=name, prompt="a fox", max_tokens=8, extra_body=FREE)
    assert found.choices[0].text == answer_alone(alone, "a fox", "expert0", max_new_tokens=8, ignore_eos=True)


@pytest.mark.parametrize(
    ("lime", "selection"),
    [
        ({"expert": "expert3"}, "expert3"),
        ({"expert": "none"}, None),
        ({"blend": {"expert0": 0.25, "expert2": 0.75}}, {"expert0": 0.25, "expert2": 0.75}),
        ("expert0=0.5,expert1=0.5", {"expert0": 0.5, "expert1": 0.5}),
    ],
)
def test_the_field_lime_names_a_skill_or_a_blend(
    client: OpenAI, alone: Session, name: str, lime: Any, selection: Any
) -> None:
    body = FREE | {"lime": lime}
    found = client.completions.create(model=name, prompt="a fox", max_tokens=8, extra_body=body)
    assert found.choices[0].text == answer_alone(alone, "a fox", selection, max_new_tokens=8, ignore_eos=True)


def test_a_routed_skill(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model = tiny_model()
    path = tiny_bundle(model, tiny_adapter(model, routing={"top_k": 2}))
    alone = lime_edge.open_decoder(path, threads=1)
    expected = answer_alone(alone, "a fox", "routed", max_new_tokens=8, ignore_eos=True)
    with serve_here(path) as running, OpenAI(base_url=running.api, api_key="x") as client:
        model_name = running.service.shelves[0].name
        for asked, lime in ((f"{model_name}:routed", None), (model_name, {"expert": "routed"})):
            found = client.completions.create(
                model=asked, prompt="a fox", max_tokens=8, extra_body=FREE | {"lime": lime}
            )
            assert found.choices[0].text == expected


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_the_whole_answer_in_pieces(client: OpenAI, alone: Session, name: str, chat: bool) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 20, "extra_body": FREE}
    model = f"{name}:expert1"
    if chat:
        events: list[Any] = list(client.chat.completions.create(model=model, messages=TALK, **options))
        assert events[0].choices[0].delta.role == "assistant"
        pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
        prompt = alone.codec.render_chat(TALK)
    else:
        events = list(client.completions.create(model=model, prompt="a fox", **options))
        pieces, prompt = [event.choices[0].text for event in events if event.choices], "a fox"
    assert "".join(pieces) == answer_alone(alone, prompt, "expert1", max_new_tokens=20, ignore_eos=True)
    assert sum(map(bool, pieces)) > 5, "it came in one piece"
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert events[-1].usage.completion_tokens == 20 and not events[-1].choices
    assert len({event.id for event in events}) == 1


def test_stop_strings_end_an_answer(client: OpenAI, alone: Session, name: str) -> None:
    whole = answer_alone(alone, "a fox", "expert1", max_new_tokens=20, ignore_eos=True)
    stop = whole[7:9]
    for given in (stop, ["never seen", stop]):
        found = client.completions.create(
            model=f"{name}:expert1", prompt="a fox", max_tokens=20, stop=given, extra_body=FREE
        )
        assert found.choices[0].text == whole[: whole.index(stop)]
        assert found.choices[0].finish_reason == "stop"


def test_a_seed_is_the_sessions_seed(client: OpenAI, alone: Session, name: str) -> None:
    options: Any = {"temperature": 1.1, "top_p": 0.9, "seed": 5}
    found = [
        client.completions.create(
            model=f"{name}:expert0", prompt="a fox", max_tokens=12, extra_body=FREE | {"top_k": 40}, **options
        )
        .choices[0]
        .text
        for _ in range(2)
    ]
    expected = answer_alone(alone, "a fox", "expert0", max_new_tokens=12, ignore_eos=True, top_k=40, **options)
    assert found == [expected] * 2
    assert expected != answer_alone(alone, "a fox", "expert0", max_new_tokens=12, ignore_eos=True)


def test_several_answers_and_several_prompts(client: OpenAI, alone: Session, name: str) -> None:
    drawn: Any = {"temperature": 1.0, "max_new_tokens": 6, "ignore_eos": True}
    found = client.completions.create(
        model=f"{name}:expert0", prompt=["a fox", "two"], n=2, temperature=1, seed=3, max_tokens=6, extra_body=FREE
    )
    expected = [
        answer_alone(alone, prompt, "expert0", seed=3 + place, **drawn)
        for place, prompt in enumerate(["a fox", "a fox", "two", "two"])
    ]
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage is not None and found.usage.completion_tokens == 24


def test_token_ids_are_prompts(client: OpenAI, alone: Session, name: str) -> None:
    ids = alone.codec.encode("a fox")
    found = client.completions.create(model=f"{name}:expert0", prompt=ids, max_tokens=6, extra_body=FREE)
    assert found.choices[0].text == answer_alone(alone, "a fox", "expert0", max_new_tokens=6, ignore_eos=True)


def test_the_end_token_ends_an_answer(client: OpenAI, alone: Session, name: str) -> None:
    """Some seed draws it; the session says which."""
    for seed in range(200):
        options: Any = {"max_new_tokens": 30, "temperature": 1.5, "seed": seed}
        expected = answer_alone(alone, "a fox", "expert0", **options)
        if alone.finish_reason == "stop":
            break
    found = client.completions.create(
        model=f"{name}:expert0", prompt="a fox", max_tokens=30, temperature=1.5, seed=seed
    )
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")


def test_a_full_row_ends_an_answer_by_length(client: OpenAI, server: Running, name: str) -> None:
    room = server.worker.capacity - 4
    found = client.completions.create(model=name, prompt=[5, 6, 7, 8], max_tokens=5000, extra_body=FREE)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None and found.usage.completion_tokens == room


def read_vector(given: Any) -> np.ndarray:
    """What one text got: numbers, or base64 of little-endian float32."""
    return np.frombuffer(base64.b64decode(given), "<f4") if isinstance(given, str) else np.array(given)


@pytest.mark.parametrize("form", ["float", "base64", openai.NOT_GIVEN])
def test_embeddings(client: OpenAI, text_encoder: Path, form: Any) -> None:
    """Each text alone, under the expert asked for: the batch and its order play no part."""
    texts = ["a fox", "two longer foxes", "a", "b fox"]
    session, codec = lime_edge.open_encoder(text_encoder, threads=1), TextCodec(text_encoder / "tokenizer")
    session.use("expert2")
    expected = [
        session.run(input_ids=np.array([codec.encode(text, True)]))["sentence_embedding"][0].copy() for text in texts
    ]
    found = client.embeddings.create(model="vectors:expert2", input=texts, encoding_format=form)
    worst = max(
        float(np.abs(read_vector(one.embedding) - vector).max())
        for one, vector in zip(found.data, expected, strict=True)
    )
    assert worst < 1e-6
    assert [one.index for one in found.data] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == sum(len(codec.encode(text, True)) for text in texts)
    other = client.embeddings.create(model="vectors:expert1", input=texts[0])
    assert np.abs(np.array(other.data[0].embedding) - expected[0]).max() > 0.01, "experts are alike"


def test_errors_are_the_clients_own(client: OpenAI, name: str) -> None:
    """The class follows the status; message, type, param and code are what the body says."""
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="did you mean 'expert1'") as missing:
        create(model=f"{name}:exprt1", messages=TALK)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    refused: list[tuple[dict[str, Any], str | None]] = [
        ({"temperature": 9}, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 1.5}, "presence_penalty"),
        ({"n": 999}, "n"),
        ({"extra_body": {"lime": {"blend": {"expert0": 0.5}}}}, "lime"),
        ({"extra_body": {"lime": {"blend": {"expert0": 0.5}, "expert": "expert1"}}}, "lime"),
    ]
    for change, param in refused:
        with pytest.raises(openai.BadRequestError) as error:
            create(**({"model": name, "messages": TALK, "max_tokens": 4} | change))
        assert (error.value.type, error.value.param) == ("invalid_request_error", param), change
    with pytest.raises(openai.BadRequestError, match="a row holds"):
        create(model=name, messages=[{"role": "user", "content": "x y " * 900}])
    with pytest.raises(openai.BadRequestError, match="it answers /v1/embeddings"):
        create(model="vectors", messages=TALK)
    with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
        client.embeddings.create(model=name, input="x")


def test_what_asks_for_nothing_is_taken(client: OpenAI, name: str) -> None:
    found = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}], max_completion_tokens=2,
        n=1, presence_penalty=0, frequency_penalty=0, logit_bias={}, user="me", tools=[], top_p=1,
        response_format={"type": "text"}, stop=[],
    )  # fmt: skip
    assert found.choices[0].message is not None


def test_metrics_count_what_was_done(server: Running, client: OpenAI, name: str) -> None:
    def read() -> dict[str, float]:
        with urllib.request.urlopen(f"{server.url}/metrics") as reply:
            lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = read()
    client.completions.create(model=f"{name}:expert3", prompt=[7, 8, 9], max_tokens=11, extra_body=FREE)
    after = read()

    def grown(key: str) -> float:
        return after[key] - before.get(key, 0.0)

    assert grown('lime_edge_generated_tokens_total{expert="expert3"}') == 11
    assert grown('lime_edge_prompt_tokens_total{expert="expert3"}') == 3
    assert grown('lime_edge_answers_total{expert="expert3",reason="length"}') == 1
    assert grown("lime_edge_first_token_seconds_count") == 1
    assert grown('lime_edge_http_requests_total{route="/v1/completions",status="200"}') == 1
    assert after["lime_edge_rows_running"] == 0 and after["lime_edge_rows"] == 16


def test_health(server: Running, name: str) -> None:
    with urllib.request.urlopen(f"{server.url}/health") as reply:
        told = json.load(reply)
    assert (told["status"], told["models"]) == ("ok", [name, "vectors"])
