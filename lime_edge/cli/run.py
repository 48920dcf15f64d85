"""lime-edge run: one answer, or a chat, with any expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lime_edge import terminal
from lime_edge.cli.options import (
    BundlePath,
    Clean,
    Hosts,
    Json,
    On,
    Provider,
    Quiet,
    RemotePython,
    SitePackages,
    SkillsOption,
    Target,
    Threads,
    Wheels,
    read_providers,
)
from lime_edge.cli.remote import Where, run_there
from lime_edge.cli.streams import read_prompt
from lime_edge.errors import LimeEdgeError

if TYPE_CHECKING:
    from lime_edge.session.decoder import Session

EXAMPLES = """

[bold]Examples[/bold]

 lime-edge run smollm2.lime "Is this review positive? A delight." --expert movie

 lime-edge run smollm2.lime "patent" --expert all                (every expert's answer, in one pass)

 lime-edge run scenes.lime "What time is it?" --image clock.png --expert clock

 lime-edge run smollm2.lime "patent" --on ssh://pi@raspberrypi

 lime-edge run smollm2.lime                 (chat; /expert NAME switches, /help lists the commands)

 echo "Once upon a time" | lime-edge run smollm2.lime - --raw --temperature 0.8 --seed 1
"""


def register(app: typer.Typer) -> None:
    """Add the command `run`."""
    app.command(epilog=EXAMPLES)(run)


def run(
    bundle: BundlePath,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads standard input; without it a chat begins.")
    ] = None,
    expert: SkillsOption = None,
    target: Target = None,
    threads: Threads = None,
    provider: Provider = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens the cache holds.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep this probability mass, in (0, 1].")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampler.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture to look at, before the text; may be repeated.")
    ] = None,
    raw: Annotated[bool, typer.Option(help="The prompt is complete: no chat template.")] = False,
    on: On = None,
    hosts: Hosts = None,
    wheels: Wheels = None,
    python: RemotePython = None,
    site_packages: SitePackages = False,
    clean: Clean = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer one prompt, or chat, with any expert; or one prompt with several at once."""
    from lime_edge.bundle.experts import parse_selection
    from lime_edge.cli.answer import CUT, INTERRUPTED, answer_once
    from lime_edge.cli.chat import Chat
    from lime_edge.cli.skills import answer_many, asks_for_many, read_selections
    from lime_edge.session.generate import GenerationOptions

    if as_json and prompt is None:
        raise LimeEdgeError(
            "--json prints one answer: a prompt is missing", "give a prompt, or leave --json out to chat"
        )
    text = None if prompt is None else read_prompt(prompt)
    images = tuple(image or ())
    if images and text is None:
        raise LimeEdgeError("`image`: pictures go with one prompt: it is missing", "a chat has no pictures yet")
    where = Where(on, hosts, wheels, python, site_packages, clean)
    if where.elsewhere:
        if images:
            raise LimeEdgeError(
                "`image`: pictures are not sent to another machine", "run it there, beside the pictures"
            )
        numbers = {"temperature": temperature, "top-k": top_k, "top-p": top_p, "max-new-tokens": max_new_tokens}
        given = {"expert": expert, "target": target, "threads": threads, "max-length": max_length, "seed": seed}
        asked = numbers | given | {"system": system, "provider": provider}
        words = [word for name, value in asked.items() if value is not None for word in (f"--{name}", str(value))]
        words += [word for one in stop or () for word in ("--stop", one)] + (["--raw"] if raw else [])
        run_there(where, bundle, text, words, target, as_json)
        return
    options = GenerationOptions(max_new_tokens, temperature, top_k, top_p, seed, tuple(stop or ()))
    session = open_bundle(bundle, target, threads, max_length, provider)
    if expert is not None and asks_for_many(expert, session.experts):
        if text is None:
            raise LimeEdgeError(f"`expert`: {expert!r} answers one prompt: it is missing", "a chat has one expert")
        done = answer_many(
            session, text, read_selections(expert, session.experts), options, system, raw, as_json, images
        )
        if any(skill.reason == INTERRUPTED for skill in done.skills):
            raise typer.Exit(CUT)
        return
    if expert is not None:
        session.use(parse_selection(expert))
    if text is None:
        Chat(session, options, system, raw).loop()
    else:
        answer_once(session, text, options, system, raw, as_json, images)


def open_bundle(
    path: Path, target: str | None, threads: int | None, max_length: int | None = None, provider: str | None = None
) -> Session:
    """The session of a language model's bundle; a spinner while its engine is loaded."""
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.session.engines import SessionOptions
    from lime_edge.session.open import open_decoder

    options = SessionOptions(threads, max_length, read_providers(provider))
    with terminal.show_wait(f"opening {path}"):  # some engines import for seconds
        return open_decoder(Bundle.open(path), target, options)
