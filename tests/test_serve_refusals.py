"""What a server refuses: malformed bodies, strangers, files outside the bundle, experts that it did not ask for."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Running, serve_here

from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.serve.settings import ServeOptions

JSON = {"Content-Type": "application/json"}
KEY = "sk-test-0123456789abcdef"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@pytest.fixture(scope="module")
def server(marker_bundle: Path, text_encoder: Path) -> Iterator[Running]:
    with serve_here(marker_bundle, text_encoder, most_body=20_000) as running:
        yield running


def send(
    port: int, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = JSON
) -> tuple[int, Any, Mapping[str, str]]:
    """Status, body (JSON where it is), headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, dict(headers))
        reply = connection.getresponse()
        data = reply.read()
    finally:
        connection.close()
    kind = reply.headers.get("content-type", "")
    return reply.status, json.loads(data) if kind == "application/json" else data, dict(reply.headers)


def post(port: int, path: str, body: Any, headers: Mapping[str, str] = JSON) -> tuple[int, Any, Mapping[str, str]]:
    return send(port, "POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)


def check_error(status: int, body: Any) -> None:
    """A refusal in the API's own form, without a trace."""
    assert 400 <= status < 500, (status, body)
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and "Traceback" not in body["error"]["message"]


# malformed bodies

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    "model", "messages", "prompt", "input", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
    "seed", "stop", "n", "stream", "stream_options", "lime", "encoding_format", "dimensions", "logit_bias", "tools",
    "response_format", "ignore_eos", "echo", "logprobs",
)  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    PATHS[0]: {"model": "marker", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    PATHS[1]: {"model": "marker", "prompt": "x", "max_tokens": 2},
    PATHS[2]: {"model": "vectors", "input": "x"},
}
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(["user", "system", "tool", "x"]) | SCALARS, "content": VALUES}
    ),
    max_size=3,
)


@st.composite
def draw_bodies(draw: Any) -> tuple[str, bytes]:
    """Bytes that are no JSON, JSON that is no request, and requests with one to three fields exchanged."""
    path = draw(st.sampled_from(PATHS))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return path, draw(st.binary(max_size=60))
    if kind == 1:
        return path, json.dumps(draw(VALUES)).encode()
    body = dict(GOOD[path])
    for name in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3, unique=True)):
        if draw(st.integers(0, 5)) == 0:
            body.pop(name, None)
        else:
            body[name] = draw(MESSAGES if name == "messages" else VALUES)
    data = json.dumps(body).encode()
    return path, data[: draw(st.integers(0, len(data)))] if kind == 2 else data


@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(asked=draw_bodies())
def test_malformed_bodies_are_4xx_never_5xx(server: Running, asked: tuple[str, bytes]) -> None:
    """What happens to be a good request is answered; all others are refused in the API's form."""
    status, body, _ = post(server.port, *asked)
    if status != 200:
        check_error(status, body)
    elif body and isinstance(body, dict):
        assert body["object"] in ("chat.completion", "text_completion", "list")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 15_000, b'{"a":' * 3_000,
        b'{"model": "marker", "prompt": "\\ud800"}',
        b'{"model": "\\udfff", "prompt": "x"}',
        b'{"model": "marker", "prompt": "x", "stop": ["\\ud800"], "max_tokens": 1}',
        b'{"model": "marker", "prompt": "x", "seed": 99999999999999999999999999}',
        b'{"model": "marker", "prompt": [], "max_tokens": 1}',
        b'{"model": "marker", "prompt": [[]], "max_tokens": 1}',
        b'{"model": "marker", "prompt": [99999], "max_tokens": 1}',
        b'{"model": "marker", "prompt": ["x", 5], "max_tokens": 1}',
        b'{"model": "marker", "prompt": "x", "max_tokens": 1e999}',
        b'{"model": "vectors", "input": [99999]}',
        b'{"model": "vectors", "input": [true]}',
        b'{"model": "vectors", "input": ""}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", PATHS)
def test_known_traps_are_4xx(server: Running, path: str, body: bytes) -> None:
    status, found, _ = post(server.port, path, body)
    if status != 200:
        check_error(status, found)


def test_the_body_is_limited(server: Running) -> None:
    status, body, _ = post(server.port, PATHS[1], b" " * 20_001)
    assert status == 413
    check_error(status, body)
    with socket.create_connection(("127.0.0.1", server.port)) as raw:  # chunked: no length is said beforehand
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        raw.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        assert b" 413 " in raw.recv(100)


def test_other_content_types_are_refused(server: Running) -> None:
    """A web page elsewhere may post text/plain to this machine without being asked; it may not post JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, body, _ = post(server.port, PATHS[1], GOOD[PATHS[1]], {"Content-Type": kind} if kind else {})
        assert status == 415
        check_error(status, body)


def test_unknown_paths_and_methods(server: Running) -> None:
    for method, path, wanted in (("GET", "/v1/nothing", 404), ("GET", PATHS[0], 405), ("DELETE", "/experts", 405)):
        status, body, _ = send(server.port, method, path)
        assert status == wanted
        check_error(status, body)


# nothing outside the bundle


@pytest.mark.parametrize(
    "path",
    [
        "/../lime.json", "/lime.json", "/tokenizer/tokenizer.json", "/..%2f..%2fetc/passwd", "/v1/models/../../x",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/page.html", "//etc/passwd", "/static/../../etc/passwd",
    ],
)  # fmt: skip
def test_no_path_reaches_a_file(server: Running, path: str) -> None:
    status, body, _ = send(server.port, "GET", path)
    assert status == 404
    check_error(status, body)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "skill-a/../skill-b", "experts/skill-a", "\0"])
def test_no_name_reaches_a_file(server: Running, name: str) -> None:
    for body in (
        GOOD[PATHS[1]] | {"model": f"marker:{name}"},
        GOOD[PATHS[1]] | {"model": name},
        GOOD[PATHS[1]] | {"lime": {"expert": name}},
        GOOD[PATHS[1]] | {"lime": {"blend": {name: 1.0}}},
    ):
        status, found, _ = post(server.port, PATHS[1], body)
        assert status == 404, body
        check_error(status, found)


# whose it is


@pytest.fixture(scope="module")
def locked(marker_bundle: Path) -> Iterator[Running]:
    with serve_here(marker_bundle, keys=(KEY, "sk-other")) as running:
        yield running


def test_a_key_is_needed_where_there_is_one(locked: Running) -> None:
    body = json.dumps(GOOD[PATHS[1]]).encode()
    for headers in (
        {}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": "Bearer "}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer \xff"},
    ):  # fmt: skip
        for method, path in (("POST", PATHS[1]), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/experts")):
            status, found, answered = send(locked.port, method, path, body, JSON | headers)
            assert status == 401, (headers, path)
            check_error(status, found)
            assert KEY not in json.dumps(found) and answered["www-authenticate"] == "Bearer"
    for key in (KEY, "sk-other"):
        assert post(locked.port, PATHS[1], body, JSON | {"Authorization": f"Bearer {key}"})[0] == 200
    for path in ("/health", "/"):
        assert send(locked.port, "GET", path)[0] == 200


def test_keys_are_compared_in_constant_time(locked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared, with hmac's function, whichever fits."""
    from lime_edge.serve import guard

    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    assert send(locked.port, "GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})[0] == 200
    assert len(compared) == 2 and {len(value) for pair in compared for value in pair} == {32}


def test_other_names_of_this_machine_are_refused(server: Running, marker_bundle: Path) -> None:
    """A web page may let its own name point to 127.0.0.1 and ask from a browser here."""
    for host, wanted in (
        ("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:80", 200), ("127.8.9.1", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403),
    ):  # fmt: skip
        assert send(server.port, "GET", "/v1/models", headers={"Host": host})[0] == wanted, host
    with serve_here(marker_bundle, hosts=("box.example",)) as running:
        assert send(running.port, "GET", "/v1/models", headers={"Host": "box.example"})[0] == 200


# experts


def expert_bytes(bundle: Path, name: str, **changes: Any) -> bytes:
    expert = Bundle.open(bundle).read_expert("skill-b")
    return replace(expert, **({"name": name} | changes)).to_bytes()


OCTETS = {"Content-Type": "application/octet-stream"}


def test_experts_are_not_taken_unless_allowed(server: Running, marker_bundle: Path) -> None:
    status, body, _ = post(server.port, "/experts", expert_bytes(marker_bundle, "new"), OCTETS)
    assert status == 403 and body["error"]["code"] == "not_allowed"
    assert "new" not in server.service.shelves[0].experts


@pytest.fixture
def own_bundle(marker_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(marker_bundle, tmp_path / "marker.lime"))


@pytest.mark.parametrize("keep", [False, True])
def test_an_expert_is_installed_and_answers(own_bundle: Path, keep: bool) -> None:
    with serve_here(own_bundle, allow_install=True, keep_installed=keep) as running:
        status, body, _ = post(running.port, "/experts", expert_bytes(own_bundle, "new"), OCTETS)
        assert (status, body["id"]) == (201, "marker:new")
        asked = GOOD[PATHS[1]] | {"model": "marker:new", "max_tokens": 5, "ignore_eos": True}
        assert post(running.port, PATHS[1], asked)[1]["choices"][0]["text"] == "bbbbb"
        listed = send(running.port, "GET", "/v1/models")[1]
        assert "marker:new" in [model["id"] for model in listed["data"]]
    assert ("new" in Bundle.open(own_bundle, verify=True).manifest.experts) is keep


def test_what_experts_add_refuses_is_refused(own_bundle: Path) -> None:
    good = expert_bytes(own_bundle, "new")
    vector = Bundle.open(own_bundle).read_expert("skill-b").vector
    bad = {
        "empty": b"",
        "no safetensors": b"x" * 500,
        "cut": good[:-5],
        "longer": good + b"12345678",
        "NaN": expert_bytes(own_bundle, "new", vector=np.full_like(vector, np.nan)),
        "another length": expert_bytes(own_bundle, "new", vector=vector[:-1].copy()),
        "another adapter": expert_bytes(own_bundle, "new", adapter_id="0" * 64),
        "a path": expert_bytes(own_bundle, "../new"),
        "reserved": expert_bytes(own_bundle, "routed"),
    }
    before = {file: file.read_bytes() for file in own_bundle.rglob("*") if file.is_file()}
    with serve_here(own_bundle, allow_install=True, keep_installed=True) as running:
        for why, data in bad.items():
            status, body, _ = post(running.port, "/experts", data, OCTETS)
            check_error(status, body)
            assert status == 400, why
        for name in ("../../x", "/tmp/x", "none", "a b"):
            status, body, _ = post(running.port, f"/experts?name={quote(name, safe='')}", good, OCTETS)
            assert status == 400, name
        for name in ("skill-a", "SKILL-A"):
            status, body, _ = post(running.port, f"/experts?name={name}", good, OCTETS)
            assert (status, body["error"]["code"]) == (409, "name_taken")
        assert post(running.port, "/experts", good)[0] == 415
        assert post(running.port, "/experts", good + b" " * (1 << 20), OCTETS)[0] == 413
        assert len(running.service.shelves[0].experts) == 16
    assert {file: file.read_bytes() for file in own_bundle.rglob("*") if file.is_file()} == before


# the server's own command line


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"allow_install": True, "host": "0.0.0.0"}, "it needs a key"),
        ({"keep_installed": True}, "`allow_install`"),
        ({"keys": ("two words",)}, r"\(not shown\)"),
        ({"keys": ("",)}, "an API key"),
        ({"rows": 0, "grace": -1}, "2 faults"),
    ],
)
def test_settings_that_contradict_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(LimeEdgeError, match=told) as error:
        ServeOptions(**wrong)
    assert "two words" not in str(error.value)


def test_keys_are_not_in_what_the_settings_say_of_themselves() -> None:
    assert KEY not in repr(ServeOptions(keys=(KEY,)))


def test_a_port_that_is_taken(marker_bundle: Path, server: Running) -> None:
    with pytest.raises(LimeEdgeError, match="cannot listen there"), serve_here(marker_bundle, port=server.port):
        pass
