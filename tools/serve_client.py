"""A small HTTP client for loading a server: one connection a request, streamed, and cut wherever it is told to.

Nothing but the standard library, so that it costs the server's machine little; used by serve_load.py, bench_serve.py
and the tests.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What came back. text: of the answer. first, seconds: to the first piece and in all. tokens: that usage counted.

    error: the API's own, where there is one. cut: the client left before the end.
    """

    status: int
    text: str
    first: float
    seconds: float
    tokens: int = 0
    reason: str | None = None
    error: dict[str, Any] | None = None
    cut: bool = False
    retry_after: str | None = None


async def ask(
    port: int, path: str, body: dict[str, Any], cut_after: int | None = None, key: str | None = None
) -> Reply:
    """Post a streamed request to 127.0.0.1.

    Args:
        body: of a chat or a completion; `stream` and usage are added. cut_after: leave after so many pieces.
    """
    began = time.perf_counter()
    sent = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
        head += f"Authorization: Bearer {key}\r\n" if key else ""
        writer.write(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        await writer.drain()
        status, headers = await read_head(reader)
        if status != 200:
            error = json.loads(await reader.read()).get("error")
            return Reply(
                status, "", 0.0, time.perf_counter() - began, 0, None, error, False, headers.get("retry-after")
            )
        return await _read_answer(reader, began, cut_after)
    finally:
        writer.close()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    pairs = [line.partition(": ") for line in lines[1:] if line]
    return int(lines[0].split()[1]), {name.lower(): value for name, _, value in pairs}


async def read_events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The data of server-sent events in a chunked body, until it ends."""
    held = b""
    while True:
        size = int(await reader.readline() or b"0", 16)
        if size == 0:
            return
        held += (await reader.readexactly(size + 2))[:-2]
        *events, held = held.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event[6:].decode()


async def _read_answer(reader: asyncio.StreamReader, began: float, cut_after: int | None) -> Reply:
    pieces, first, tokens, reason, error, ended = list[str](), 0.0, 0, None, None, False
    async for data in read_events(reader):
        if data == "[DONE]":
            ended = True
            break
        event = json.loads(data)
        error = event.get("error") or error
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event.get("choices", ()):
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            reason = choice.get("finish_reason") or reason
            if piece:
                first = first or time.perf_counter() - began
                pieces.append(piece)
        if cut_after is not None and len(pieces) >= cut_after:
            return Reply(200, "".join(pieces), first, time.perf_counter() - began, tokens, reason, error, True)
    cut = not ended and error is None
    return Reply(200, "".join(pieces), first, time.perf_counter() - began, tokens, reason, error, cut)
