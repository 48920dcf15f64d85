"""lime-edge serve: the OpenAI API over a bundle, a skill per request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lime_edge import terminal
from lime_edge.cli.options import BundlePath, Quiet, Target, Threads
from lime_edge.errors import LimeEdgeError, need

KEY = "LIME_EDGE_API_KEY"
EXAMPLES = """

[bold]Examples[/bold]

 lime-edge serve smollm2.lime

 curl http://127.0.0.1:8080/v1/models

 lime-edge serve smollm2.lime --host 0.0.0.0 --api-key-file /etc/lime-edge/keys --embedder minilm.lime
"""


def register(app: typer.Typer) -> None:
    """Add the command `serve`."""
    app.command(epilog=EXAMPLES)(serve)


def serve(
    bundle: BundlePath,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and says which.")] = 8080,
    name: Annotated[str | None, typer.Option(help="Of the model; the bundle's folder otherwise.")] = None,
    embedder: Annotated[
        Path | None, typer.Option(help="An encoder's bundle, for /v1/embeddings beside a language model.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"A file with API keys, one a line; or one key in ${KEY}.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name under which a server on 127.0.0.1 may be asked; may be repeated."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers that run at once.")] = 16,
    memory: Annotated[int | None, typer.Option(min=1, help="MB that their caches may take; fewer rows then.")] = None,
    prefix_memory: Annotated[int, typer.Option(min=0, help="MB of beginnings kept for later requests; 0: none.")] = 64,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens that a row holds, prompt and answer.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of one answer at most.")] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait for a row; others get 429.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="kB of a request.")] = 1024,
    allow_install: Annotated[bool, typer.Option(help="Take experts by POST /experts, into memory.")] = False,
    keep_installed: Annotated[bool, typer.Option(help="Write them into the bundle too.")] = False,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running answers have after SIGTERM.")] = 30.0,
    target: Target = None,
    threads: Threads = None,
    log: Annotated[bool, typer.Option(help="A line for each request on standard error: no texts, no keys.")] = False,
    quiet: Quiet = False,
) -> None:
    """Serve a bundle over HTTP: the OpenAI API, a skill per request."""
    from lime_edge.session.health import is_there

    for module in ("starlette", "uvicorn", "prometheus_client"):
        if not is_there(module):
            raise need(module, "serve")
    from lime_edge.serve.server import serve as run
    from lime_edge.serve.service import find_sources
    from lime_edge.serve.settings import ServeOptions
    from lime_edge.session.engines import SessionOptions

    options = ServeOptions(
        host,
        port,
        read_keys(api_key_file),
        tuple(allow_host or ()),
        max_body << 10,
        max_tokens,
        max_waiting,
        rows,
        None if memory is None else memory * 10**6,
        prefix_memory * 10**6,
        allow_install,
        keep_installed,
        grace,
    )
    if not options.is_local and not options.keys:
        terminal.warn(f"whoever reaches {host} can use the model", "--api-key-file names the keys that let in")
    sources = find_sources(bundle, embedder, name, target, SessionOptions(threads, max_length))
    run(sources, options, terminal.note, log)


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The API keys: of a file, one a line, and of the environment.

    Raises:
        LimeEdgeError: a file that cannot be read, or holds none.
    """
    keys = [os.environ[KEY]] if os.environ.get(KEY) else []
    if file is not None:
        try:
            found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            told = error.strerror if isinstance(error, OSError) else "it is no text"
            raise LimeEdgeError(f"{file}: the keys cannot be read: {told}", "one key a line") from None
        if not any(found):
            raise LimeEdgeError(f"{file}: holds no key", "one key a line")
        keys += [line for line in found if line and not line.startswith("#")]
    return tuple(keys)
