"""What one server serves: a language model, an encoder, or both; opened, watched and closed together."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.manifest import MANIFEST
from lime_edge.errors import LimeEdgeError
from lime_edge.serve.embedder import Embedder
from lime_edge.serve.metrics import Metrics
from lime_edge.serve.settings import ServeOptions
from lime_edge.serve.skills import Shelf, describe_shelf
from lime_edge.serve.worker import Worker
from lime_edge.session.decoder import Session
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.engines import SessionOptions
from lime_edge.session.kinds import DECODER, ENCODER, find_kind
from lime_edge.session.open import open_decoder, open_encoder
from lime_edge.session.switching import ExpertSwitch

SessionT = TypeVar("SessionT", bound=ExpertSwitch)
NAME_LETTERS = "A-Za-z0-9._/-"
MODEL_NAME = rf"[{NAME_LETTERS}]{{1,100}}"
POLL = 0.05  # seconds between two looks at what still runs


@dataclass(frozen=True)
class Source(Generic[SessionT]):
    """A bundle to serve. name: of its model. open: gives its session, on the thread that is to own it."""

    name: str
    bundle: Bundle
    open: Callable[[], SessionT]


@dataclass(frozen=True)
class Sources:
    """What a server is made of: at least one of them."""

    decoder: Source[Session] | None = None
    encoder: Source[EncoderSession] | None = None


def find_sources(
    bundle: Path, embedder: Path | None, name: str | None, target: str | None, session: SessionOptions
) -> Sources:
    """The bundles to serve, their manifests read.

    Args:
        bundle: of any kind. embedder: an encoder beside a language model. name: of the first; its folder's otherwise.
    Raises:
        LimeEdgeError: no bundle, two of one kind, or two of one name.
    """
    decoders: list[Source[Session]] = []
    encoders: list[Source[EncoderSession]] = []
    if name is not None and not re.fullmatch(MODEL_NAME, name):
        hint = "letters, digits and . _ - /; a colon is put before a skill"
        raise LimeEdgeError(f"`name`: {name!r:.100} is no name of a model", hint)
    for path, given in ((bundle, name), (embedder, None)):
        if path is None:
            continue
        opened = Bundle.open(path)
        called, kind = given or name_model(path), find_kind(opened)
        if kind is DECODER:
            decoders.append(Source(called, opened, lambda one=opened: open_decoder(one, target, session)))  # type: ignore[misc]
        elif kind is ENCODER:
            encoders.append(Source(called, opened, lambda one=opened: open_encoder(one, None, session)))  # type: ignore[misc]
        else:
            raise LimeEdgeError(f"{path} holds {kind.noun}: no server for it is written yet", "serve another bundle")
    if len(decoders) > 1 or len(encoders) > 1:
        raise LimeEdgeError(
            f"{bundle} and {embedder} hold models of one kind", "one process serves one language model and one encoder"
        )
    if decoders and encoders and decoders[0].name == encoders[0].name:
        raise LimeEdgeError(f"two models are called {decoders[0].name!r}", "pass another `name`")
    return Sources(next(iter(decoders), None), next(iter(encoders), None))


def name_model(path: Path) -> str:
    """A bundle's folder as a model's name: no colon, which separates the skill."""
    return re.sub(rf"[^{NAME_LETTERS}]", "-", path.resolve().name.removesuffix(".lime")) or "model"


class Service:
    """The opened models of a server. `shelves` tells what each offers now."""

    def __init__(self, sources: Sources, options: ServeOptions):
        self.options, self.metrics, self.draining = options, Metrics(), False
        self._sources = sources
        self.worker = Worker(sources.decoder.open, options, self.metrics) if sources.decoder else None
        self.embedder = Embedder(sources.encoder.open, options) if sources.encoder else None
        self.shelf: Shelf | None = None
        self.encoder_shelf: Shelf | None = None

    @property
    def shelves(self) -> tuple[Shelf, ...]:
        """What all models offer."""
        return tuple(shelf for shelf in (self.shelf, self.encoder_shelf) if shelf is not None)

    @property
    def fingerprint(self) -> str:
        """What tells this bundle and version of its skills from others, for `system_fingerprint`."""
        assert self._sources.decoder is not None
        return f"lime-{self._sources.decoder.bundle.manifest.manifest_sha256[:12]}"

    async def start(self) -> None:
        """Open the models.

        Raises:
            LimeEdgeError: what opening raises.
        """
        if self.worker is not None and self._sources.decoder is not None:
            session = await self.worker.start()
            self.shelf = put_on_shelf(session, self._sources.decoder)
            self._watch(self.worker)
        if self.embedder is not None and self._sources.encoder is not None:
            self.encoder_shelf = put_on_shelf(await self.embedder.start(), self._sources.encoder)

    def _watch(self, worker: Worker) -> None:
        self.metrics.watch("rows", "answers that can run at once", lambda: worker.rows)
        self.metrics.watch("rows_running", "rows that are taken", lambda: worker.running)
        self.metrics.watch("queue_waiting", "answers that wait for a row", lambda: worker.waiting)
        self.metrics.watch("prefix_bytes", "beginnings kept for other requests", lambda: worker.kept_bytes)

    @property
    def broken(self) -> str | None:
        """Why no answer can be given any more, if so."""
        return None if self.worker is None else self.worker.broken

    def count_under_way(self) -> int:
        """Requests that are not answered yet."""
        answers = len(self.worker.under_way) if self.worker is not None else 0
        return answers + (self.embedder.under_way if self.embedder is not None else 0)

    def begin_drain(self) -> None:
        """From now on nothing new is taken."""
        self.draining = True
        for part in self._parts():
            part.closing = True

    async def drain(self) -> None:
        """Take nothing new, and wait until all has ended, `grace` seconds at most."""
        self.begin_drain()
        loop = asyncio.get_running_loop()
        end = loop.time() + self.options.grace
        while self.count_under_way() and loop.time() < end:
            await asyncio.sleep(POLL)

    def end_all(self) -> int:
        """End what still runs, and say so to who asked; how many answers those were."""
        left = self.count_under_way()
        if self.worker is not None:
            self.worker.end_all()
        return left

    def close(self) -> None:
        """End the threads."""
        for part in self._parts():
            part.thread.close()

    def _parts(self) -> Iterator[Worker | Embedder]:
        yield from (part for part in (self.worker, self.embedder) if part is not None)


def put_on_shelf(session: ExpertSwitch, source: Source[SessionT]) -> Shelf:
    """What a session that was just opened offers."""
    created = int((source.bundle.path / MANIFEST).stat().st_mtime)
    return describe_shelf(session, source.name, session.selection, created)
