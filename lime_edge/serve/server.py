"""The process: listen, answer until told to end, let what runs end, and go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import uvicorn

from lime_edge.errors import EXIT_INPUT, LimeEdgeError
from lime_edge.serve.routes import make_app
from lime_edge.serve.service import Service, Sources
from lime_edge.serve.settings import ServeOptions

if TYPE_CHECKING:
    from starlette.applications import Starlette

FAREWELL = 2.0  # seconds in which replies that are written already have to leave
IDLE = 75  # seconds that a connection may be quiet: longer than proxies keep theirs
MOST_CONNECTIONS = 1000


class Listener(uvicorn.Server):
    """uvicorn's server, its signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are `serve`'s."""
        yield


def serve(sources: Sources, options: ServeOptions, say: Callable[[str], None], log: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; what runs then has `grace` seconds, a second signal ends it at once.

    Args:
        say: takes what is to be told: the address, and how it ended. log: a line for each request, on standard error.
    Raises:
        LimeEdgeError: a bundle that does not open, or an address that is taken.
    """
    asyncio.run(_serve(sources, options, say, log))


async def _serve(sources: Sources, options: ServeOptions, say: Callable[[str], None], log: bool) -> None:
    with listen(options) as sock:  # taken before a model is loaded
        service = Service(sources, options)
        hurry = asyncio.Event()
        stopped = watch_signals(hurry)
        try:
            await service.start()
            listener = make_listener(make_app(service), log)
            running = asyncio.create_task(listener.serve([sock]))
            say(describe_start(service, sock))
            await asyncio.wait([running, asyncio.ensure_future(stopped.wait())], return_when=asyncio.FIRST_COMPLETED)
            say(f"ending: {service.count_under_way()} answers run or wait, {options.grace:g} seconds for them")
            draining = asyncio.create_task(service.drain())
            hurried = asyncio.create_task(hurry.wait())
            await asyncio.wait([draining, hurried], return_when=asyncio.FIRST_COMPLETED)
            left = await end_now(service, draining)
            listener.should_exit = True
            await running
            say("ended" if not left else f"ended: {left} answers were cut off and told so")
        finally:
            service.close()


async def end_now(service: Service, draining: asyncio.Task[int]) -> int:
    """The number of answers that had to be ended."""
    if draining.done():
        return draining.result()
    draining.cancel()
    left = service.count_under_way()
    if service.worker is not None:
        service.worker.end_all()
    return left


def watch_signals(hurry: asyncio.Event) -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; the second one sets `hurry`."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()

    def note() -> None:
        (hurry if stopped.is_set() else stopped).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note)
    return stopped


def listen(options: ServeOptions) -> socket.socket:
    """A socket on the wanted address.

    Raises:
        LimeEdgeError: it is taken, or none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError:
            sock.close()
            raise
        return sock
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise LimeEdgeError(
            f"{where}: cannot listen there: {error.strerror or error}", "pass another `port`", EXIT_INPUT
        ) from None


def make_listener(app: Starlette, log: bool) -> Listener:
    """uvicorn, as it is wanted here."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=LOGGING,
        log_level="info" if log else "error",
        access_log=log,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=int(FAREWELL),
    )
    return Listener(config)


LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {
        "uvicorn.error": {"handlers": ["stderr"], "level": "ERROR", "propagate": False},
        "uvicorn.access": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


def describe_start(service: Service, sock: socket.socket) -> str:
    """What is served, where, and for how many at once."""
    host, port = sock.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    models = ", ".join(f"{shelf.name} ({len(shelf.experts)} skills)" for shelf in service.shelves)
    worker = service.worker
    rows = f"; {worker.rows} rows of {worker.capacity} tokens, {worker.nbytes / 1e6:.0f} MB at most" if worker else ""
    return f"serving {models} at http://{place}:{port}{rows}"
