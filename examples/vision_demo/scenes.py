"""Scenes of the vision demo: one picture of 96 x 96 that eight questions can be asked about.

A scene holds a clock, dots, a coloured shape, a number, a word, an arrow and bars, at random places, in random
sizes and colours. Nothing in the picture says what is asked. The answers of two tasks are never the same text:
`7:35`, `five`, `red`, `star`, `482`, `LAMP`, `up left`, `third`.

Held out for tests: fonts (FONTS), words, numbers and clock times (choose_split). Everything follows from a seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
SEED = 21
SIDE = 96  # pixels of a scene
FINE = 4  # scenes are drawn this many times larger, then averaged down: smooth edges
CELL = (32, 36)  # width and height of a cell; six cells and the word's band fill the scene

TASKS = ("clock", "count", "colour", "shape", "digits", "word", "arrow", "tallest")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("first", "second", "third", "fourth", "fifth")
ARROWS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")  # clockwise, 45 degrees each
COLOURS = {
    "red": (214, 38, 38),
    "orange": (244, 139, 28),
    "yellow": (240, 214, 40),
    "green": (46, 150, 62),
    "blue": (44, 90, 206),
    "purple": (126, 54, 170),
    "pink": (242, 128, 182),
    "brown": (122, 78, 44),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "moon")
INKS = ((24, 24, 28), (52, 52, 60), (30, 40, 84), (84, 30, 40), (24, 70, 56))

_DEJAVU = "Sans Sans-Oblique SansMono SansMono-Bold SansMono-Oblique Serif Serif-Bold Serif-Italic SansCondensed"
_LIBERATION = "Mono-Regular Mono-Bold Mono-Italic Serif-Regular Serif-Bold Serif-Italic Serif-BoldItalic"
# Debian's packages fonts-dejavu-core, fonts-dejavu-extra and fonts-liberation2 (or fonts-liberation).
FONTS = {
    "train": (
        *(f"DejaVu{name}.ttf" for name in _DEJAVU.split()),
        *(f"Liberation{name}.ttf" for name in _LIBERATION.split()),
    ),
    "test": (
        "LiberationSans-Regular.ttf",
        "LiberationSans-Bold.ttf",
        "DejaVuSans-Bold.ttf",
        "DejaVuSerifCondensed-Bold.ttf",
    ),
}
FONT_FOLDERS = (
    "/usr/share/fonts/truetype/dejavu",
    "/usr/share/fonts/truetype/liberation2",
    "/usr/share/fonts/truetype/liberation",
)

Box = tuple[float, float, float, float]  # left, top, right, bottom, in fine pixels


@dataclass(frozen=True)
class Scene:
    """What a scene shows. clock: hour 1 to 12 and minute. tallest: the index of the tallest bar."""

    clock: tuple[int, int]
    count: int
    colour: str
    shape: str
    digits: str
    word: str
    arrow: int
    tallest: int

    def answer(self) -> dict[str, str]:
        """The right answer of every task."""
        return {
            "clock": write_time(*self.clock),
            "count": NUMBERS[self.count - 1],
            "colour": self.colour,
            "shape": self.shape,
            "digits": self.digits,
            "word": self.word,
            "arrow": ARROWS[self.arrow],
            "tallest": PLACES[self.tallest],
        }


def write_time(hour: int, minute: int) -> str:
    """Write a time as the clock expert does: 7:05."""
    return f"{hour}:{minute:02d}"


def choose_split(kind: str, value: str) -> str:
    """Choose train (75%) or test (25%) for a word, number or time, from its text alone."""
    digest = hashlib.sha256(f"{SEED}:{kind}:{value}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < 2**30 else "train"


@cache
def list_values(kind: str, split: str) -> tuple[str, ...]:
    """List the clock times, numbers or words of a split."""
    every = {
        "clock": [write_time(h, m) for h in range(1, 13) for m in range(0, 60, 5)],
        "digits": [str(number) for number in range(100, 1000)],
        "word": (HERE / "words.txt").read_text().upper().split(),
    }[kind]
    return tuple(value for value in every if choose_split(kind, value) == split)


def draw_word(rng: random.Random, split: str) -> str:
    """Draw a word; half of the training words are random letters, so that reading has to be letter by letter."""
    if split == "test" or rng.random() < 0.5:
        return rng.choice(list_values("word", split))
    while True:
        letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(3, 5)))
        if letters not in list_values("word", "test"):
            return letters


def draw_scene(rng: random.Random, split: str) -> Scene:
    """Draw what a scene shows."""
    hour, minute = rng.choice(list_values("clock", split)).split(":")
    return Scene(
        clock=(int(hour), int(minute)),
        count=rng.randint(1, 9),
        colour=rng.choice(tuple(COLOURS)),
        shape=rng.choice(SHAPES),
        digits=rng.choice(list_values("digits", split)),
        word=draw_word(rng, split),
        arrow=rng.randrange(8),
        tallest=rng.randrange(5),
    )


def make_scene(index: int, split: str, seed: int = SEED) -> tuple[Scene, Image.Image]:
    """Make one scene of a split and its picture; the same arguments give the same pixels."""
    rng = random.Random(f"{seed}:{split}:{index}")
    scene = draw_scene(rng, split)
    return scene, paint_scene(scene, rng, FONTS[split])


def paint_scene(scene: Scene, rng: random.Random, fonts: tuple[str, ...]) -> Image.Image:
    """Paint a scene: six things in cells, the word in a band of its own; rng decides places, sizes and colours."""
    paper = tuple(rng.randint(222, 255) for _ in range(3))
    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), paper)
    pen = ImageDraw.Draw(image)
    things = [paint_clock, paint_dots, paint_shape, paint_number, paint_arrow, paint_bars]
    rng.shuffle(things)
    rows = [things[:3], [paint_word], things[3:]]
    rng.shuffle(rows)
    top = 0
    for row in rows:
        height = SIDE - 2 * CELL[1] if row == [paint_word] else CELL[1]
        width = SIDE // len(row)
        for column, paint in enumerate(row):
            box = (column * width, top, (column + 1) * width, top + height)
            paint(pen, scene, tuple(v * FINE for v in box), rng, fonts)
        top += height
    return image.reduce(FINE)


def _place(box: Box, size: float, rng: random.Random) -> tuple[float, float]:
    """Place a thing of a size (its diameter) anywhere inside a box; returns its centre."""
    left, top, right, bottom = box
    margin = size / 2 + FINE
    return rng.uniform(left + margin, right - margin), rng.uniform(top + margin, bottom - margin)


def _turn(centre: tuple[float, float], radius: float, degrees: float) -> tuple[float, float]:
    """The point at a distance and an angle (clockwise from the right)."""
    angle = math.radians(degrees)
    return centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)


def _mix(colour: tuple[int, ...], rng: random.Random, spread: int = 14) -> tuple[int, ...]:
    """A colour, a little off."""
    return tuple(min(255, max(0, v + rng.randint(-spread, spread))) for v in colour)


def _any_colour(rng: random.Random) -> tuple[int, ...]:
    """Ink or one of the eight colours: what is not the shape may have any."""
    return _mix(rng.choice(INKS) if rng.random() < 0.5 else rng.choice(tuple(COLOURS.values())), rng)


def paint_clock(pen: ImageDraw.ImageDraw, scene: Scene, box: Box, rng: random.Random, _fonts: tuple[str, ...]) -> None:
    """A dial with twelve marks; the hour hand is short and thick and moves on between the hours."""
    size = rng.uniform(28, 30) * FINE
    centre, radius, ink = _place(box, size, rng), size / 2, rng.choice(INKS)
    x, y = centre
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255), outline=ink, width=FINE)
    for mark in range(12):
        inner = radius * (0.74 if mark % 3 == 0 else 0.84)
        pen.line((*_turn(centre, inner, mark * 30), *_turn(centre, radius * 0.93, mark * 30)), fill=ink, width=FINE - 1)
    hour, minute = scene.clock
    hand = (200, 30, 30) if rng.random() < 0.3 else ink
    pen.line((x, y, *_turn(centre, radius * 0.46, (hour + minute / 60) * 30 - 90)), fill=ink, width=int(2.6 * FINE))
    pen.line((x, y, *_turn(centre, radius * 0.82, minute * 6 - 90)), fill=hand, width=int(1.3 * FINE))


def paint_dots(pen: ImageDraw.ImageDraw, scene: Scene, box: Box, rng: random.Random, _fonts: tuple[str, ...]) -> None:
    """One to nine dots of one colour on a jittered grid of 3 x 4."""
    ink = _any_colour(rng)
    left, top, right, bottom = box
    width, height = (right - left) / 3, (bottom - top) / 4
    radius = rng.uniform(2.5, 3.2) * FINE
    for place in rng.sample(range(12), scene.count):
        x = left + (place % 3 + 0.5) * width + rng.uniform(-1.4, 1.4) * FINE
        y = top + (place // 3 + 0.5) * height + rng.uniform(-1.0, 1.0) * FINE
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)


def paint_shape(pen: ImageDraw.ImageDraw, scene: Scene, box: Box, rng: random.Random, _fonts: tuple[str, ...]) -> None:
    """One of eight shapes, filled with one of eight colours, turned by a few degrees."""
    size = rng.uniform(19, 27) * FINE
    centre, radius = _place(box, size, rng), size / 2
    tilt, fill = rng.uniform(-8, 8), _mix(COLOURS[scene.colour], rng)
    pen.polygon([_turn(centre, radius * far, angle + tilt) for far, angle in OUTLINES[scene.shape]], fill=fill)


def _outline_moon() -> list[tuple[float, float]]:
    """A crescent as (distance, angle): an arc of the circle, and back along the edge of a smaller circle beside it."""
    outer = [(1.0, angle) for angle in range(45, 316, 10)]
    inner = []
    for angle in range(285, 74, -10):
        x, y = 0.5 + 0.76 * math.cos(math.radians(angle)), 0.76 * math.sin(math.radians(angle))
        inner.append((math.hypot(x, y), math.degrees(math.atan2(y, x))))
    return outer + inner


def _outline_heart() -> list[tuple[float, float]]:
    """A heart as (distance, angle) around its centre."""
    corners = []
    for step in range(32):
        t = 2 * math.pi * step / 32
        x = 16 * math.sin(t) ** 3
        y = -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        corners.append((math.hypot(x, y) / 17, math.degrees(math.atan2(y, x))))
    return corners


def _outline_cross() -> list[tuple[float, float]]:
    """A cross with arms a third wide, as (distance, angle) around its centre."""
    corners = [(1, 0.33), (0.33, 0.33), (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33)]
    corners += [(-x, -y) for x, y in corners]
    return [(math.hypot(x, y), math.degrees(math.atan2(y, x))) for x, y in corners]


OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(1.0, 10 * k) for k in range(36)],
    "moon": _outline_moon(),
    "square": [(1.15, 45 + 90 * k) for k in range(4)],
    "triangle": [(1.1, 120 * k - 90) for k in range(3)],
    "diamond": [(1.0 if k % 2 else 0.62, 90 * k) for k in range(4)],
    "star": [(0.45 if k % 2 else 1.1, 36 * k - 90) for k in range(10)],
    "heart": _outline_heart(),
    "cross": _outline_cross(),
}


@cache
def find_font(name: str) -> str:
    """Find a font file in Debian's folders, or in those that VISION_DEMO_FONTS names (separated by colons)."""
    folders = [f for f in os.environ.get("VISION_DEMO_FONTS", "").split(":") if f] + list(FONT_FOLDERS)
    for folder in folders:
        if (Path(folder) / name).is_file():
            return str(Path(folder) / name)
    raise SystemExit(
        f"no font {name}: apt install fonts-dejavu-core fonts-dejavu-extra fonts-liberation2, or set VISION_DEMO_FONTS"
    )


@cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font at a size, in fine pixels."""
    return ImageFont.truetype(find_font(name), size, layout_engine=ImageFont.Layout.BASIC)


def _paint_text(
    pen: ImageDraw.ImageDraw, text: str, name: str, size: int, box: Box, rng: random.Random, ink: tuple[int, ...]
) -> None:
    """Text of about a size somewhere in a box, made smaller where it would not fit."""
    width, height = box[2] - box[0] - 2 * FINE, box[3] - box[1] - 2 * FINE
    left, top, right, bottom = load_font(name, size).getbbox(text)
    fit = min(1.0, width / (right - left), height / (bottom - top))
    font = load_font(name, int(size * fit))
    left, top, right, bottom = font.getbbox(text)
    x = box[0] + FINE + rng.uniform(0, max(0.0, width - (right - left))) - left
    y = box[1] + FINE + rng.uniform(0, max(0.0, height - (bottom - top))) - top
    pen.text((x, y), text, font=font, fill=ink)


def paint_number(pen: ImageDraw.ImageDraw, scene: Scene, box: Box, rng: random.Random, fonts: tuple[str, ...]) -> None:
    """A number of three digits."""
    _paint_text(pen, scene.digits, rng.choice(fonts), rng.randint(14, 17) * FINE, box, rng, rng.choice(INKS))


def paint_word(pen: ImageDraw.ImageDraw, scene: Scene, box: Box, rng: random.Random, fonts: tuple[str, ...]) -> None:
    """The word, in capitals."""
    _paint_text(pen, scene.word, rng.choice(fonts), rng.randint(17, 21) * FINE, box, rng, rng.choice(INKS))


def paint_arrow(pen: ImageDraw.ImageDraw, scene: Scene, box: Box, rng: random.Random, _fonts: tuple[str, ...]) -> None:
    """An arrow in one of eight directions."""
    size = rng.uniform(22, 28) * FINE
    centre, reach, ink = _place(box, size, rng), size / 2, _any_colour(rng)
    angle = scene.arrow * 45 + rng.uniform(-6, 6)
    tip, tail, neck = _turn(centre, reach, angle), _turn(centre, reach, angle + 180), _turn(centre, reach * 0.2, angle)
    pen.line((*tail, *neck), fill=ink, width=int(rng.uniform(2.5, 4) * FINE))
    wing = reach * rng.uniform(0.5, 0.65)
    pen.polygon([tip, _turn(neck, wing, angle + 90), _turn(neck, wing, angle - 90)], fill=ink)


def paint_bars(pen: ImageDraw.ImageDraw, scene: Scene, box: Box, rng: random.Random, _fonts: tuple[str, ...]) -> None:
    """Five bars on a line; the tallest is taller than the next by 4 pixels or more."""
    left, top, right, bottom = box
    high = rng.uniform(20, 31) * FINE
    heights = [rng.uniform(4 * FINE, high - 4 * FINE) for _ in PLACES]
    heights[scene.tallest] = high
    step, ink = (right - left - 2 * FINE) / len(PLACES), _any_colour(rng)
    floor = bottom - rng.uniform(2, 4) * FINE
    for place, height in enumerate(heights):
        x = left + FINE + place * step
        pen.rectangle((x + 0.15 * step, floor - height, x + 0.85 * step, floor), fill=ink)
    pen.line((left + FINE, floor, right - FINE, floor), fill=INKS[0], width=FINE)


def main() -> None:
    """Write scenes of a split: PNG files and answers.jsonl with the answers of all tasks."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(args.count):
        scene, image = make_scene(index, args.split)
        image.save(args.out / f"{index:03d}.png", optimize=True)
        lines.append(json.dumps({"image": f"{index:03d}.png", **scene.answer()}))
    (args.out / "answers.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
