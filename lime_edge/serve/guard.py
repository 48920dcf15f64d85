"""What every request passes first: whose it is, under which name the server was asked, how large it is."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import uuid
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lime_edge.serve.metrics import Metrics
from lime_edge.serve.refusals import Refusal
from lime_edge.serve.settings import ServeOptions, is_loopback

OPEN = ("/", "/health")  # neither asks for a key: the page holds no secret and sends the key itself
SLOWEST = 60.0  # seconds in which a body has to arrive
CLOSED = 499


class Guard:
    """ASGI middleware: key, host name, an id for each request, and counting."""

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: Metrics, routes: Sequence[str]):
        self._app, self._options, self._metrics, self._routes = app, options, metrics, frozenset(routes)
        self._keys = [digest(key) for key in options.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, request_id = CLOSED, uuid.uuid4().hex.encode()

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            if (refusal := self._judge(scope)) is not None:
                await send_refusal(refusal, send_marked)
            else:
                await self._app(scope, receive, send_marked)
        except Exception:
            status = 500
            raise
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests.labels(route, str(status)).inc()

    def _judge(self, scope: Scope) -> Refusal | None:
        headers = {name: value for name, value in scope["headers"] if name in (b"host", b"authorization")}
        if self._options.is_local and not self._is_own_name(headers.get(b"host", b"").decode("latin-1")):
            told = "this server answers to names of this machine only, and to those it was told when it was started"
            return Refusal(403, told, "unknown_host")
        if self._keys and scope["path"] not in OPEN and not self._has_key(headers.get(b"authorization", b"")):
            return Refusal(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")
        return None

    def _is_own_name(self, host: str) -> bool:
        """Whether a Host header means this machine: a web page elsewhere may let its own name point here."""
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return is_loopback(name.strip("[]")) or name in self._options.hosts

    def _has_key(self, header: bytes) -> bool:
        """Whether it is one of the keys; the time that takes tells nothing about them."""
        kind, _, given = header.partition(b" ")
        found, own = False, hashlib.sha256(given.strip()).digest()
        for key in self._keys:
            found |= hmac.compare_digest(own, key)
        return found and kind.lower() == b"bearer"


def digest(key: str) -> bytes:
    """A key as it is kept: of one length, whatever its own."""
    return hashlib.sha256(key.encode()).digest()


async def send_refusal(refusal: Refusal, send: Send) -> None:
    """Answer with an error."""
    body = msgspec.json.encode(refusal.body())
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | refusal.headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def read_bytes(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        Refusal: 413 when it is larger than allowed, 408 when it does not come, 400 when the client leaves.
    """
    told = Refusal(413, f"the body is larger than {most} bytes", "too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise told
    parts, size = [], 0
    try:
        async with asyncio.timeout(SLOWEST):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise told
                parts.append(part)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {SLOWEST:.0f} seconds", "timeout") from None
    return b"".join(parts)


async def read_json(request: Request, most: int) -> bytes:
    """The body of a request that says it is JSON: web pages elsewhere cannot send that without being asked first.

    Raises:
        Refusal: 415, or as `read_bytes`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(
            415, f"Content-Type: expected application/json, found {kind or 'none'!r}", "unsupported_media_type"
        )
    return await read_bytes(request, most)
