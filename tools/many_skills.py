"""What many skills at once cost and spare, measured; the numbers of docs/many-skills.md.

    python tools/many_skills.py build/demo.lime [--activated build/activated.lime] [--threads 1,2] [--write]

1. Rows: decode steps of 8 sequences under 8 experts beside one sequence, one expert for all, and plain nodes.
2. One text, every skill: one pass beside a single run of each, prompts and decoding apart.
3. Activated adapters: the first token after a switch inside a conversation, and every skill on one long text.

Everything that is compared alternates inside one process; medians over rounds, and the range from the 5th to the 95th
percentile of the ratio inside a round. --write puts the tables between the markers of docs/many-skills.md.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import lime_edge
from lime_edge.bench.batch import BatchOptions, bench_batch, tabulate_batch
from lime_edge.bench.inputs import draw_prompt
from lime_edge.bench.machine import describe_machine
from lime_edge.bench.tables import Table, write_markdown
from lime_edge.bench.timing import compare_rounds
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions

PAGE = Path(__file__).parent.parent / "docs" / "many-skills.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TEXT = "That queen sees my kettle in the morning."
SIZES, STEPS = (1, 8), 24  # rows; steps of a round
NEW, LONG = 32, 512  # tokens of an answer; of a conversation


def run_pass(session: Session, ids: Sequence[int], new: int) -> tuple[float, float, float]:
    """Every skill in one pass: seconds in all, of reading prompts, of decoding."""
    options = GenerationOptions(new, ignore_eos=True)
    begun = time.perf_counter()
    desk = session.open_desk(rows=len(session.experts), capacity=len(ids) + new)
    for name in session.experts:
        desk.ask(ids, name, options)
    while desk.busy:
        desk.advance()
    return time.perf_counter() - begun, desk.prompts_s, desk.steps_s


def run_single(session: Session, ids: Sequence[int], new: int) -> tuple[float, float, float]:
    """Every skill in a run of its own, from nothing: seconds in all, up to first tokens, after them."""
    prompts, options, begun = 0.0, GenerationOptions(new, ignore_eos=True), time.perf_counter()
    for name in session.experts:
        session.reset()
        session.use(name)
        start = time.perf_counter()
        for count, _ in enumerate(session.generate_ids(ids, options)):
            prompts += time.perf_counter() - start if count == 0 else 0.0
    whole = time.perf_counter() - begun
    return whole, prompts, whole - prompts


def alternate(ways: Sequence[Callable[[], Sequence[float]]], rounds: int) -> list[np.ndarray]:
    """Each way's numbers (rounds, N), one round to warm up; the other order every second round."""
    found: list[list[Sequence[float]]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for place in list(range(len(ways)))[:: 1 if number % 2 else -1]:
            values = ways[place]()
            if number:
                found[place].append(values)
    return [np.array(one) for one in found]


def compare_passes(session: Session, ids: Sequence[int], rounds: int, label: str) -> list[list[str]]:
    """Rows of a table: in all, prompts, decoding; single runs beside one pass."""

    def pass_anew() -> tuple[float, float, float]:
        session.prefixes.clear()
        return run_pass(session, ids, NEW)

    single, together = alternate([lambda: run_single(session, ids, NEW), pass_anew], rounds)
    rows = []
    for place, name in enumerate(("in all", "prompts", "decoding")):
        ratio = compare_rounds(together[:, place].tolist(), single[:, place].tolist())
        times = [f"{np.median(one[:, place]):.2f} s" for one in (single, together)]
        rows.append([label, name, *times, show_ratio(ratio)])
    return rows


def show_ratio(ratio: dict) -> str:
    """With its interval."""
    return f"{ratio['ratio']:.2f} ({ratio['spread']['p5']:.2f}-{ratio['spread']['p95']:.2f})"


def time_switch(session: Session, ids: Sequence[int], rounds: int) -> list[str]:
    """A row: the first token after a switch inside a conversation, beside a decode step."""
    options, first, steps = GenerationOptions(9, ignore_eos=True), [], []
    for number in range(rounds + 1):
        session.use(session.experts[number % len(session.experts)])
        stamps = [time.perf_counter()]
        for _ in session.generate_ids(ids, options):
            stamps.append(time.perf_counter())
        if number:
            first.append(stamps[1] - stamps[0])
            steps.append(float(np.median(np.diff(stamps[1:]))))
    ratio = compare_rounds(first, steps)
    return [f"{np.median(first) * 1e3:.1f} ms", f"{np.median(steps) * 1e3:.1f} ms", show_ratio(ratio)]


def measure(arguments: argparse.Namespace) -> list[Table]:
    """All tables."""
    tables, options = [], BatchOptions(SIZES, 128, STEPS, arguments.rounds)
    threads = [int(number) for number in arguments.threads.split(",")]
    for count in threads:
        tables.append(tabulate_batch(bench_batch(arguments.bundle, "onnx", count, options)))
    headers = ["text, threads", "", "single runs", "one pass", "ratio (5%-95%)"]
    rows: list[list[str]] = []
    bundles = {"always acts": arguments.bundle} | ({"activated": arguments.activated} if arguments.activated else {})
    switches = []
    for kind, bundle in bundles.items():
        for count in threads:
            session = lime_edge.open_decoder(bundle, target="onnx", threads=count, max_length=LONG + NEW)
            short = session.codec.encode(session.codec.render_chat([{"role": "user", "content": TEXT}]))
            rows += compare_passes(session, short, arguments.rounds, f"{kind}, {len(short)} tokens, {count} thr.")
            if kind == "activated" or arguments.long:
                body = draw_prompt(session.bundle.manifest.backbone.vocab, LONG - len(short))
                text = [*short[:1], *body, *short[1:]]
                few = max(2, arguments.rounds // 3)
                rows += compare_passes(session, text, few, f"{kind}, {len(text)} tokens, {count} thr.")
                switches.append([f"{kind}, {count} thr.", *time_switch(session, text, 2 * arguments.rounds)])
    tables.append(Table(f"{len(session.experts)} skills on one text, {NEW} tokens each", headers, rows))
    if switches:
        title = f"A switch inside a conversation of {LONG} tokens"
        tables.append(Table(title, ["", "first token", "a decode step", "ratio (5%-95%)"], switches))
    return tables


def describe(arguments: argparse.Namespace) -> str:
    """Where and how it was measured."""
    machine = describe_machine()
    return (
        f"Measured by `python tools/many_skills.py BUNDLE{' --activated BUNDLE' if arguments.activated else ''}` on "
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']} when it began"
        f"{' (busy: others computed beside it)' if (machine['load_1min'] or 0) > 1 else ''}; "
        f"{arguments.rounds} rounds, alternating."
    )


def main() -> None:
    """Print the tables; --write puts them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--activated", type=Path, help="a bundle of an adapter that acts from the header on")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--long", action="store_true", help="the long text with the first bundle too")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/many-skills.md")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    head = describe(arguments)
    body = "\n\n".join([head, *(write_markdown(table).strip() for table in measure(arguments))])
    print(body)
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
