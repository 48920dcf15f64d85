"""One picture, eight skills: what every expert answers to the same scene, by the toolkit's own session.

    demo.py build/vision-demo.lime            three held-out scenes
    demo.py build/vision-demo.lime --image a.png --target onnx

The picture is seen once: the experts live in the text model alone, so its features serve all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from answers import LONGEST, write_prompt
from PIL import Image
from scenes import HERE, TASKS


def show_picture(path: Path, columns: int = 48) -> str:
    """A picture as coloured half blocks, two pixels a character, for a terminal."""
    image = Image.open(path).convert("RGB").resize((columns, columns), Image.Resampling.BOX)
    lines = []
    for y in range(0, columns, 2):
        pairs = ((image.getpixel((x, y)), image.getpixel((x, y + 1))) for x in range(columns))
        lines.append(
            "".join(f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀" for a, b in pairs) + "\x1b[0m"
        )
    return "\n".join(lines)


def answer_all(session, picture, expected: dict[str, str]) -> int:
    """Ask every expert about one picture; prints a line each, returns how many are right."""
    right = 0
    for expert in TASKS:
        start = time.perf_counter()
        session.use(expert)
        text = "".join(session.generate(write_prompt(), images=[picture], max_new_tokens=LONGEST + 1)).strip()
        took = 1000 * (time.perf_counter() - start)
        mark = "" if not expected else "right" if text == expected[expert] else f"wrong: it is {expected[expert]}"
        print(f"  {expert:>8}  {text:<12} {took:6.0f} ms  {mark}")
        right += bool(expected) and text == expected[expert]
    return right


def main() -> None:
    """Print pictures, skills and answers; with the demo's own scenes, fail when under three in four are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--image", type=Path, help="a scene of your own instead of held-out ones")
    parser.add_argument("--target", default="onnx")
    parser.add_argument("--scenes", type=int, default=3)
    args = parser.parse_args()
    import lime_edge

    session = lime_edge.open(args.bundle, target=args.target)
    rows = [json.loads(line) for line in (HERE / "eval" / "answers.jsonl").read_text().splitlines()][: args.scenes]
    shown = [(args.image, {})] if args.image else [(HERE / "eval" / row["image"], row) for row in rows]
    right = 0
    for path, expected in shown:
        print(f"\n{path}")
        if sys.stdout.isatty():
            print(show_picture(path))
        start = time.perf_counter()
        picture = session.see(path)
        print(f"  seen in {1000 * (time.perf_counter() - start):.0f} ms, once for all skills")
        right += answer_all(session, picture, expected)
    if not args.image:
        asked = len(shown) * len(TASKS)
        print(f"\n{right} of {asked} right")
        raise SystemExit(0 if right >= 0.75 * asked else 1)


if __name__ == "__main__":
    main()
