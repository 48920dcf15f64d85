"""The process: listen, answer until told to end, let what runs end, and go."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import uvicorn

from lime_edge.errors import LimeEdgeError
from lime_edge.serve.routes import make_app
from lime_edge.serve.service import Service, Sources
from lime_edge.serve.settings import ServeOptions

if TYPE_CHECKING:
    from starlette.applications import Starlette

FAREWELL = 2.0  # seconds in which replies that are written already have to leave
IDLE = 75  # seconds that a connection may be quiet: longer than proxies keep theirs
MOST_CONNECTIONS = 1000
BACKLOG = 2048  # connections that wait to be accepted


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


@dataclass(frozen=True)
class Orders:
    """What a server is told while it runs. end: let what runs end, and go. hurry: go now."""

    end: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)


async def _serve(sources: Sources, options: ServeOptions, say: Callable[[str], None], log: bool) -> None:
    with listen(options) as sock:  # taken before a model is loaded
        orders = Orders()
        watch_signals(orders)
        service = Service(sources, options)
        try:
            await service.start()
            await run_service(service, sock, orders, say, log)
        finally:
            service.close()


async def run_service(
    service: Service, sock: socket.socket, orders: Orders, say: Callable[[str], None], log: bool = False
) -> None:
    """Say where, and answer until told to end; then wait for what runs, and end what does not end in time."""
    listener = make_listener(make_app(service), log)
    sock.listen(BACKLOG)  # who comes from now on waits, and is not refused
    say(describe_start(service, sock))
    running = asyncio.create_task(listener.serve([sock]))
    await wait_for_any(running, orders.end.wait())
    say(f"ending: {service.count_under_way()} answers run or wait, {service.options.grace:g} seconds for them")
    await wait_for_any(service.drain(), orders.hurry.wait())
    left = service.end_all()
    listener.should_exit = True
    await running
    say(f"ended: {left} answers were cut off and told so" if left else "ended")


async def wait_for_any(*works: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Wait for the first of some; coroutines that are not done then are cancelled."""
    tasks = [work if isinstance(work, asyncio.Task) else asyncio.ensure_future(work) for work in works]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for work, task in zip(works, tasks, strict=True):
        if work is not task:
            task.cancel()


def watch_signals(orders: Orders) -> None:
    """SIGTERM and SIGINT as orders: the first to end, the second to hurry."""
    loop = asyncio.get_running_loop()

    def note() -> None:
        (orders.hurry if orders.end.is_set() else orders.end).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note)


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
            f"{where}: cannot listen there: {error.strerror or error}", "pass another `host` or `port`"
        ) from None


def make_listener(app: Starlette, log: bool) -> Listener:
    """uvicorn, as it is wanted here."""
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
