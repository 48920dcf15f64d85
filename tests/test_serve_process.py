"""`lime-edge serve` as a process: its exit code, what it prints, and what it never prints."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.check
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from serve_client import Reply, ask  # noqa: E402

KEY = "sk-never-to-be-seen-4711"


class Server:
    """`lime-edge serve` on a free port, its standard error read into `lines`."""

    def __init__(self, bundle: Path, *options: str, env: dict[str, str] | None = None):
        command = [sys.executable, "-m", "lime_edge", "serve", str(bundle), "--port", "0", "--threads", "1", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {})
        )
        assert self.process.stderr is not None
        self.said = ""
        for line in self.process.stderr:
            self.said += line
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return
        raise AssertionError(f"it did not start: {self.said}")

    def end(self, seconds: float = 30.0) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, self.said + err


@contextmanager
def start(bundle: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    server = Server(bundle, *options, env=env)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


async def end_under_load(server: Server, number: int, tokens: int, count: int = 24) -> list[Reply]:
    """A signal while `count` answers run or wait."""
    body = {"model": "marker:skill-g", "prompt": "x", "max_tokens": tokens, "ignore_eos": True}
    clients = [asyncio.create_task(ask(server.port, "/v1/completions", body)) for _ in range(count)]
    while read_rows(server.port) < 16:
        await asyncio.sleep(0.005)
    server.process.send_signal(number)
    return list(await asyncio.gather(*clients))


def read_rows(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        found = re.search(r"^lime_edge_rows_running (\S+)", reply.read().decode(), re.M)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.small), signal.SIGINT])
def test_a_signal_lets_answers_end(marker_bundle: Path, number: int) -> None:
    with start(marker_bundle, "--grace", "60") as server:
        replies = asyncio.run(end_under_load(server, number, 400))
        code, _, said = server.end()
    assert code == 0, said
    ended = [reply for reply in replies if reply.text == "g" * 400 and reply.reason == "length"]
    assert len(ended) == 24
    assert said.splitlines()[-1] == "ended" and "24 answers run or wait" in said


def test_answers_that_take_too_long_are_told_why(marker_bundle: Path) -> None:
    with start(marker_bundle, "--grace", "0.2") as server:
        began = time.monotonic()
        replies = asyncio.run(end_under_load(server, signal.SIGTERM, 2000))
        code, _, said = server.end()
        assert time.monotonic() - began < 20
    assert code == 0, said
    ends = Counter(reply.error["code"] if reply.error else reply.reason or "nothing" for reply in replies)
    assert ends["shutting_down"] == 24, ends
    assert "cut off and told so" in said and "Traceback" not in said


def test_the_key_is_never_printed(marker_bundle: Path, tmp_path: Path) -> None:
    """Neither a right one nor a wrong one, with a line for each request and with errors."""
    file = tmp_path / "keys"
    file.write_text(f"# of the kitchen\n{KEY}\n")
    env = {"LIME_EDGE_API_KEY": KEY + "-env"}
    with start(marker_bundle, "--api-key-file", str(file), "--log", env=env) as server:
        for key in (KEY, KEY + "-env", KEY + "-wrong"):
            body: dict[str, Any] = {"model": "marker:skill-a", "prompt": "x", "max_tokens": 2, "ignore_eos": True}
            reply = asyncio.run(ask(server.port, "/v1/completions", body, key=key))
            assert reply.status == (401 if key.endswith("wrong") else 200)
            asyncio.run(ask(server.port, "/v1/completions", body | {"n": "x"}, key=key))
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/models")
        server.process.terminate()
        code, out, said = server.end()
    assert code == 0
    assert '"POST /v1/completions HTTP/1.1" 200' in said, "it logs nothing at all"
    assert KEY not in out + said and "kitchen" not in said


def run(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lime_edge", "serve", *map(str, words)]
    env = os.environ | {"COLUMNS": "200"} | (env or {})
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


def test_what_cannot_be_served_is_said(marker_bundle: Path, text_encoder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n")
    for words, told in (
        ((tmp_path / "none.lime",), "no such bundle"),
        ((marker_bundle, "--api-key-file", empty), "holds no key"),
        ((marker_bundle, "--api-key-file", tmp_path / "missing"), "the keys cannot be read"),
        ((marker_bundle, "--embedder", marker_bundle), "models of one kind"),
        ((text_encoder, "--name", "x", "--embedder", text_encoder), "models of one kind"),
        ((marker_bundle, "--allow-install", "--host", "0.0.0.0"), "it needs a key"),
        ((marker_bundle, "--keep-installed"), "--keep-installed writes what --allow-install takes"),
        ((marker_bundle, "--max-length", "100", "--memory", "1", "--host", "256.1.1.1"), "cannot listen there"),
    ):
        done = run(*words)
        assert done.returncode == 2 and told in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr


def test_the_extra_is_named_where_it_is_missing(marker_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['uvicorn'] = None\n")
    done = run(marker_bundle, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 4 and "pip install 'lime-edge[serve]'" in done.stderr, done.stderr


def test_the_server_loads_no_torch() -> None:
    code = (
        "import sys, lime_edge.serve.server; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
