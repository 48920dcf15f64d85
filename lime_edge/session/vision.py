"""The session of a vision-language model: pictures are seen, and their rows stand in prompts as ids of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import ROUTED, ExpertBank, Selection
from lime_edge.bundle.vision.pictures import Picture, Source, open_picture
from lime_edge.bundle.vision.processor import Cut
from lime_edge.bundle.vision.reading import AnyProcessor, decode_processor
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import IN_USE, Session
from lime_edge.session.engines import VisionEngine, blame_engine
from lime_edge.session.generate import GenerationOptions

TILES = 8  # of a pinned call: bounds its memory; a routed one has them all, as its scales run over all of them
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
USAGE = "write the placeholder where each picture stands, or give messages and images"


class VisionSession(Session):
    """An opened vision-language model: everything a `Session` does, and pictures in prompts.

    A row of a picture's features is an id beyond the vocabulary. Two pictures never have the same ids, so they never
    share a cache, and a prompt with pictures is a list of ids wherever a prompt is taken: `read_prompt` writes it.

    Features are kept for pictures seen before: for all experts where no site is in the vision tower, else for each.
    Routed, the tower's scales run over all tiles of a prompt, so that its pictures are seen together, and anew.
    """

    def __init__(self, bundle: Bundle, engine: VisionEngine, bank: ExpertBank, target: str):
        self._eyes, self._vision = engine, bundle.manifest.vision
        super().__init__(bundle, engine, bank, target)

    @cached_property
    def processor(self) -> AnyProcessor:
        """How pictures become tiles and rows, read when first needed.

        Raises:
            LimeEdgeError: the bundle has none, or a damaged one.
        """
        assert self._vision is not None
        file = self._vision.processor
        if file is None:
            raise LimeEdgeError(f"{self.bundle.path}: holds no processor: it takes pixel_values only", "use see_tiles")
        return decode_processor(self.bundle.read(file), str(self.bundle.path / file))

    # seeing

    def see(self, source: Source) -> Picture:
        """A picture to give to prompts; its features are computed now where they do not depend on what else is seen.

        Args:
            source: a path, an image of Pillow's, an array (height, width, 3) uint8, or a list: a video's frames.
        Raises:
            LimeEdgeError: no picture, a damaged or a too large one.
        """
        self._owner.check()
        picture = open_picture(source)
        if self._seen_by(self._selection) != ROUTED or not self._adapts_tower:
            self._find_rows((picture,), self._selection)
        return picture

    def see_tiles(self, tiles: np.ndarray) -> np.ndarray:
        """Features (T, rows, hidden) float32 of tiles as they are: pixel_values (T, 3, S, S) float32.

        For who has a preprocessor of their own; all in one call. Tiles of zeros alone are padding, and left out.

        Raises:
            LimeEdgeError: tiles of another shape, or an engine that fails.
        """
        self._owner.check()
        assert self._vision is not None
        tiles = np.asarray(tiles)
        shape = (3, self._vision.tile, self._vision.tile)
        if tiles.ndim != 4 or tiles.shape[1:] != shape or tiles.dtype.kind != "f" or not len(tiles):
            raise LimeEdgeError(f"tiles: expected (T, {shape[0]}, {shape[1]}, {shape[2]}) floats, found {tiles.shape}")
        real = tiles.reshape(len(tiles), -1).any(1)
        return self._look(tiles[real] if real.any() else tiles[:1], self._seen_by(self._selection))

    def place(self, ids: Sequence[int], rows: np.ndarray) -> list[int]:
        """Ids in which placeholders, one for each row, stand for these rows.

        Args:
            rows: (N, hidden) float32, in order.
        Raises:
            LimeEdgeError: another number of placeholders than of rows.
        """
        store, tokens = self._eyes.features, set(self._image_tokens)
        array, rows = np.asarray(ids), np.asarray(rows, np.float32)
        places = np.flatnonzero(np.isin(array, list(tokens)))
        if len(places) != len(rows) or rows.ndim != 2 or rows.shape[1] != store.hidden:
            raise LimeEdgeError(f"{len(places)} placeholders for features {rows.shape}", "a placeholder for each row")
        placed, start = array.astype(np.int64), 0
        for token in self._image_tokens:
            mine = places[array[places] == token]
            if len(mine):
                key = ("rows", token, hash(rows[start : start + len(mine)].tobytes()), rows.shape)
                kept = store.find(key) or store.add(key, rows[start : start + len(mine)], token)
                placed[mine] = np.asarray(kept)
                start += len(mine)
        found: list[int] = placed.tolist()
        return found

    def _run_tower(self, tiles: np.ndarray) -> np.ndarray:
        try:
            return self._eyes.see(tiles)
        except LimeEdgeError:
            raise
        except Exception as error:
            raise blame_engine(self.target, error) from error

    @property
    def _adapts_tower(self) -> bool:
        assert self._vision is not None
        return self._vision.adapts_tower

    @property
    def _image_tokens(self) -> tuple[int, ...]:
        assert self._vision is not None
        return self._vision.image_tokens

    def _find_rows(self, pictures: tuple[Picture, ...], selection: Selection, cut: Cut | None = None) -> list[range]:
        """The ids of each picture's rows under a selection, computed where they are not kept. cut: theirs, if known."""
        selection = self._seen_by(selection)
        store, routed = self._eyes.features, selection == ROUTED and self._adapts_tower
        alone = sum(not picture.moves for picture in pictures) == 1
        filler = self.identify(selection)[1] if self._adapts_tower else b""
        together = tuple(picture.digest for picture in pictures) if routed else ()
        keys = [(filler, picture.digest, alone, together) for picture in pictures]
        found = [store.find(key) for key in keys]
        if any(one is None for one in found):
            cut = cut or self.processor.cut(pictures)
            features = self._compute(cut, selection, routed)
            packed = self.processor.pack(features, cut)
            tokens = [self.processor.token(picture) for picture in pictures]
            found = [
                store.find(key) or store.add(key, rows, token)
                for key, rows, token in zip(keys, packed, tokens, strict=True)
            ]
        return cast(list[range], found)

    def _seen_by(self, selection: Selection) -> Selection:
        """Who sees for a selection: the original model where experts act from the generation prompt on only."""
        return None if self._header else selection

    def _compute(self, cut: Cut, selection: Selection, routed: bool) -> np.ndarray:
        """Features of all tiles, some at a time unless they are routed."""
        step = len(cut.tiles) if routed else TILES
        parts = [self._look(cut.tiles[i : i + step], selection) for i in range(0, len(cut.tiles), step)]
        return np.concatenate(parts)

    def _look(self, tiles: np.ndarray, selection: Selection) -> np.ndarray:
        """Features of tiles under a selection, which need not be the one in use."""
        if not self._adapts_tower or selection == self._selection:
            return self._run_tower(tiles)
        self._switch(selection)
        try:
            return self._run_tower(tiles)
        finally:
            self._apply(self._selection)

    def _switch(self, selection: Selection) -> None:
        """Give the engine a selection without its being the session's."""
        kept = self._selection
        try:
            self._apply(selection)
        finally:
            self._selection = kept

    # prompts

    def _knows(self, ids: np.ndarray) -> bool:
        """Ids beyond the vocabulary are rows of pictures that are held.

        Raises:
            LimeEdgeError: none of them, or forgotten.
        """
        self._eyes.features.check(ids)
        return True

    def read_prompt(self, prompt: Prompt, images: Sequence[Source] = (), selection: Selection = IN_USE) -> list[int]:
        """The token ids of a prompt, rows of pictures among them; for `generate`, `generate_many` or `logits`.

        Args:
            prompt: complete text with a placeholder for each picture (its tokenizer's own, "<image>" for example),
                token ids with a placeholder each, or messages, whose chat template is applied: {"role": ..., "content":
                text or a list of {"type": "image"} and {"type": "text", "text": ...}}. Messages that name no picture
                get all of them before the first user's text.
            images: a picture for each placeholder, in order: what `see` gives or takes.
            selection: under which they are seen; by default the one in use.
        Raises:
            LimeEdgeError: no prompt, another number of placeholders than of pictures, or no such selection.
        """
        pictures = tuple(open_picture(image) for image in images)
        selection = self._selection if selection is IN_USE else self._check_selection(selection)
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping):
            prompt = self.codec.render_chat(show_pictures(cast(Sequence[Mapping[str, Any]], prompt), pictures))
        if not pictures:
            self._refuse_bare(prompt)
            return super().read_prompt(cast(str | Sequence[int], prompt))
        cut = None
        if isinstance(prompt, str):
            cut = self.processor.cut(pictures)
            prompt = self._spell(prompt, cut)
        ids = super().read_prompt(cast(str | Sequence[int], prompt))
        rows = self._find_rows(pictures, selection, cut)
        return self._insert(ids, rows, [self.processor.token(picture) for picture in pictures])

    def _refuse_bare(self, prompt: Prompt) -> None:
        """A text with placeholders and no pictures is a mistake; ids may hold any token."""
        if isinstance(prompt, str):
            marks = [name for token in self._image_tokens if (name := self.codec.name_token(token))]
            if bare := [mark for mark in marks if mark in prompt]:
                raise LimeEdgeError(f"prompt: {bare[0]} without a picture", "give `images`, one for each")

    def _spell(self, text: str, cut: Cut) -> str:
        """A text whose placeholders are written out: a token for each row, and what the family puts around them."""
        marks = [self.codec.name_token(self.processor.token(picture)) for picture in cut.pictures]
        known, count = set(self.codec.vocabulary()), len(marks)
        spelled = {mark: self.processor.spell(cut, known, mark) for mark in dict.fromkeys(marks) if mark}
        pieces, place = [], 0
        for number, mark in enumerate(marks):
            start = text.find(mark, place) if mark else -1
            if not mark or start < 0:
                raise LimeEdgeError(f"prompt: no placeholder {mark} for picture {number + 1} of {count}", USAGE)
            pieces += [text[place:start], spelled[mark][number]]
            place = start + len(mark)
        rest = text[place:]
        if left := [mark for mark in spelled if mark in rest]:
            raise LimeEdgeError(f"prompt: more placeholders {left[0]} than the {count} pictures", USAGE)
        return "".join([*pieces, rest])

    def _insert(self, ids: list[int], rows: list[range], tokens: list[int]) -> list[int]:
        """Placeholders replaced by rows: as many of them as rows, or one for each picture."""
        count, each = sum(map(ids.count, set(self._image_tokens))), sum(map(len, rows))
        if count == each:
            return self._replace(ids, [((row,), token) for own, token in zip(rows, tokens, strict=True) for row in own])
        if count == len(rows):
            return self._replace(ids, list(zip(rows, tokens, strict=True)))
        raise LimeEdgeError(f"prompt: {count} placeholders for {len(rows)} pictures of {each} rows", USAGE)

    def _replace(self, ids: list[int], rows: Sequence[tuple[Sequence[int], int]]) -> list[int]:
        """Each placeholder in turn by its rows' ids."""
        waiting, placed, mine = iter(rows), list[int](), set(self._image_tokens)
        for number in ids:
            if number not in mine:
                placed.append(number)
                continue
            own, token = next(waiting)
            if token != number:
                raise LimeEdgeError(f"prompt: token {number} stands for a picture whose token is {token}", USAGE)
            placed += own
        return placed

    def generate(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        keep_cache: bool = False,
        images: Sequence[Source] = (),
        **changes: Any,
    ) -> Iterator[str]:
        """Stream the answer, piece by piece; see `Session.generate`.

        Args:
            prompt: see `read_prompt`. images: a picture for each placeholder, in order.
        Raises:
            LimeEdgeError: see `read_prompt` and `Session.generate`.
        """
        self._owner.check()
        yield from super().generate(self.read_prompt(prompt, images), options, keep_cache, **changes)


def show_pictures(messages: Sequence[Mapping[str, Any]], pictures: Sequence[Picture]) -> list[Mapping[str, Any]]:
    """Messages in which every picture has its place: before the first user's text, where none is named."""
    named = any(
        isinstance(message.get("content"), list)
        and any(isinstance(part, Mapping) and part.get("type") in ("image", "video") for part in message["content"])
        for message in messages
    )
    if named or not pictures:
        return list(messages)
    shown: list[Mapping[str, Any]] = list(messages)
    for index, message in enumerate(shown):
        if message.get("role") == "user":
            content = message.get("content")
            text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
            marks = [{"type": "video" if picture.moves else "image"} for picture in pictures]
            shown[index] = {**message, "content": [*marks, *text]}
            return shown
    raise LimeEdgeError("messages: no user's turn to show the pictures in", USAGE)
