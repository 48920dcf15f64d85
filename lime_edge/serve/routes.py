"""The endpoints: from a request to what the models are asked, and to the reply."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lime_edge import __version__
from lime_edge.bundle.experts import Selection, parse_expert
from lime_edge.errors import LimeEdgeError
from lime_edge.serve.answers import CLOSED_REQUEST, Answer, reply
from lime_edge.serve.bodies import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    Sampling,
    read_body,
    read_messages,
    read_options,
    read_prompts,
)
from lime_edge.serve.embedder import write_vector
from lime_edge.serve.guard import Guard, read_bytes, read_json
from lime_edge.serve.install import install_expert
from lime_edge.serve.page import CONTENT_POLICY, read_page
from lime_edge.serve.refusals import Refusal, refuse, refuse_model
from lime_edge.serve.replies import CHAT, TEXT, Form, Head, Usage
from lime_edge.serve.service import Service
from lime_edge.serve.skills import choose_skill, find_shelf
from lime_edge.serve.worker import Ask, Worker

MOST_PROMPTS, MOST_TEXTS = 64, 2048  # of one request
Endpoint = Callable[[Request], Awaitable[Any]]


def make_app(service: Service) -> Starlette:
    """The server as an ASGI application; `service` has been started."""
    api = Endpoints(service)
    routes = [
        Route("/", api.show_page, methods=["GET"]),
        Route("/health", api.tell_health, methods=["GET"]),
        Route("/metrics", api.tell_metrics, methods=["GET"]),
        Route("/v1/models", api.list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", api.tell_model, methods=["GET"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
        Route("/v1/embeddings", api.embed, methods=["POST"]),
        Route("/experts", api.install, methods=["POST"]),
    ]
    paths = [route.path for route in routes]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, options=service.options, metrics=service.metrics, routes=paths)],
        exception_handlers={
            Refusal: answer_refusal,
            LimeEdgeError: answer_fault,
            HTTPException: answer_http,
            ClientDisconnect: answer_departure,
            Exception: answer_bug,
        },
    )


def write_json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON document."""
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def answer_refusal(_: Request, error: Exception) -> Response:
    """A refusal in the API's form."""
    assert isinstance(error, Refusal)
    return write_json(error.body(), error.status, error.headers)


def answer_fault(request: Request, error: Exception) -> Response:
    """A fault that the client can mend."""
    assert isinstance(error, LimeEdgeError)
    return answer_refusal(request, refuse(error))


def answer_http(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    told = {404: "there is no such path", 405: "this path does not take that method"}
    response = answer_refusal(request, Refusal(error.status_code, told.get(error.status_code, error.detail)))
    response.headers.update(error.headers or {})
    return response


def answer_departure(_: Request, __: Exception) -> Response:
    """The client left before its request was whole."""
    return Response(status_code=CLOSED_REQUEST)


def answer_bug(request: Request, _: Exception) -> Response:
    """Our own fault: the trace is for the log."""
    return answer_refusal(request, Refusal(500, "the server failed at this request: its log says more", "bug"))


class Endpoints:
    """One method for each path."""

    def __init__(self, service: Service):
        self._service, self._options = service, service.options

    async def show_page(self, _: Request) -> Response:
        """The built-in page."""
        return Response(read_page(), headers={"Content-Security-Policy": CONTENT_POLICY}, media_type="text/html")

    async def tell_health(self, _: Request) -> Response:
        """200 while it answers; 503 when it goes down or is broken."""
        service = self._service
        state = "draining" if service.draining else "failed" if service.broken else "ok"
        models = [shelf.name for shelf in service.shelves]
        return write_json({"status": state, "models": models, "version": __version__}, 200 if state == "ok" else 503)

    async def tell_metrics(self, _: Request) -> Response:
        """What Prometheus reads."""
        return Response(self._service.metrics.render(), media_type="text/plain; version=0.0.4")

    async def list_models(self, _: Request) -> Response:
        """Every model and every skill."""
        entries = [entry for shelf in self._service.shelves for entry in shelf.list_models()]
        return write_json({"object": "list", "data": entries})

    async def tell_model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        for shelf in self._service.shelves:
            for entry in shelf.list_models():
                if entry["id"] == name:
                    return write_json(entry)
        raise refuse_model(name)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = read_body(await read_json(request, self._options.most_body), ChatBody)
        worker, selection = self._find_skill(body)
        messages = read_messages(body)
        codec = worker.codec

        def encode() -> list[int]:
            return codec.encode(codec.render_chat(messages))

        return await self._answer(request, body, CHAT, worker, selection, [await asyncio.to_thread(encode)])

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = read_body(await read_json(request, self._options.most_body), CompletionBody)
        worker, selection = self._find_skill(body)
        prompts = read_prompts(body.prompt, "prompt")
        if len(prompts) * (body.n or 1) > MOST_PROMPTS:
            raise Refusal(400, f"`prompt`: at most {MOST_PROMPTS} answers in one request", param="prompt")
        vocab = worker.thread.session.bundle.manifest.backbone.vocab

        def encode() -> list[list[int]]:
            return [worker.codec.encode(one) if isinstance(one, str) else check_ids(one, vocab) for one in prompts]

        return await self._answer(request, body, TEXT, worker, selection, await asyncio.to_thread(encode))

    def _find_skill(self, body: Sampling) -> tuple[Worker, Selection]:
        shelf = find_shelf(body.model, self._service.shelves)
        if self._service.worker is None or shelf is not self._service.shelf:
            raise Refusal(400, f"{shelf.name} is an encoder: it answers /v1/embeddings", "wrong_model", "model")
        return self._service.worker, choose_skill(body.model, body.lime, shelf)

    async def _answer(
        self,
        request: Request,
        body: Sampling,
        form: Form,
        worker: Worker,
        selection: Selection,
        prompts: Sequence[Sequence[int]],
    ) -> Response:
        """Ask for `n` answers to each prompt."""
        options = read_options(body, self._options.most_tokens, worker.capacity)
        asks: list[Ask] = []
        for ids in prompts:
            check_length(ids, worker.capacity)
            for _ in range(body.n or 1):
                own = None if options.seed is None else (options.seed + len(asks)) % (1 << 64)
                asks.append(Ask(tuple(ids), selection, replace(options, seed=own)))
        head = Head(form, body.model, selection, self._service.fingerprint)
        usage = Usage(sum(len(ids) for ids in prompts))
        counted = bool(body.stream_options and body.stream_options.include_usage)
        answer = Answer(worker, asks, head, usage, request.receive)
        found = await reply(request, answer, bool(body.stream), counted)
        return found if isinstance(found, Response) else write_json(found)

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        body = read_body(await read_json(request, self._options.most_body), EmbeddingBody)
        shelf, embedder = find_shelf(body.model, self._service.shelves), self._service.embedder
        if embedder is None or shelf is not self._service.encoder_shelf:
            raise Refusal(400, f"{shelf.name} is a language model: it gives no embeddings", "wrong_model", "model")
        form = body.encoding_format or "float"
        if form not in ("float", "base64"):
            raise Refusal(400, f"`encoding_format`: expected float or base64, found {form!r}", param="encoding_format")
        selection, texts = choose_skill(body.model, body.lime, shelf), read_prompts(body.input, "input")
        if len(texts) > MOST_TEXTS:
            raise Refusal(400, f"`input`: at most {MOST_TEXTS} texts in one request", param="input")
        codec, context = embedder.codec, embedder.context

        def encode() -> list[list[int]]:
            return [codec.encode(one, True) if isinstance(one, str) else one for one in texts]

        ids = await asyncio.to_thread(encode)
        for place, one in enumerate(ids):
            if not 0 < len(one) <= (context or len(one)):
                told = f"`input`: text {place} has {len(one)} tokens, the model reads 1 to {context}"
                raise Refusal(400, told, "context_length_exceeded", "input")
        vectors = await embedder.embed(ids, selection)
        if body.dimensions not in (None, vectors[0].size):
            raise Refusal(400, f"`dimensions`: this model gives {vectors[0].size}", param="dimensions")
        data = [
            {"object": "embedding", "index": index, "embedding": write_vector(vector, form)}
            for index, vector in enumerate(vectors)
        ]
        count = sum(map(len, ids))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return write_json({"object": "list", "data": data, "model": body.model, "usage": usage})

    async def install(self, request: Request) -> Response:
        """POST /experts: an expert file as it is, `?name=` for another name than its own."""
        service = self._service
        if not self._options.allow_install:
            raise Refusal(403, "this server takes no experts: it was not started so that it does", "not_allowed")
        if service.worker is None or service.shelf is None:
            raise Refusal(400, "this server has no language model", "wrong_model")
        if request.headers.get("content-type", "").partition(";")[0] != "application/octet-stream":
            raise Refusal(415, "Content-Type: expected application/octet-stream", "unsupported_media_type")
        session = service.worker.thread.session
        total = session.bundle.manifest.sites.total
        data = await read_bytes(request, 4 * total + (1 << 17))
        expert = parse_expert(data, "the body", total)
        expert = replace(expert, name=request.query_params.get("name") or expert.name)
        keep = self._options.keep_installed
        names = await service.worker.thread.call(lambda own: install_expert(own, expert, keep))
        service.shelf = replace(service.shelf, experts=names)
        return write_json({"object": "expert", "name": expert.name, "id": f"{service.shelf.name}:{expert.name}"}, 201)


def check_length(ids: Sequence[int], capacity: int) -> None:
    """Refuse a prompt that leaves no room for an answer."""
    if not ids:
        raise Refusal(400, "the prompt has no tokens", "invalid_value", "prompt")
    if len(ids) >= capacity:
        told = f"the prompt has {len(ids)} tokens, a row holds {capacity} with its answer"
        raise Refusal(400, told, "context_length_exceeded", "messages")


def check_ids(ids: list[int], vocab: int) -> list[int]:
    """Token ids that the model has."""
    if max(ids) >= vocab:
        raise Refusal(400, f"`prompt`: token ids are 0..{vocab - 1}, found {max(ids)}", "invalid_value", "prompt")
    return ids
