"""Several sequences in one pass on ONNX Runtime: each row answers as a session of its own, whoever comes and goes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import Make
from models import ALL_LINEARS, CASES, draw_ids, load_model, load_sites
from test_variants import make_prompt_adapter

import lime_edge
from lime_edge.bundle.experts import Selection
from lime_edge.compiler.compile import CompileOptions, compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.decoder import Cache, DecoderModule
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.errors import LimeEdgeError
from lime_edge.runtimes.onnx.decoder import OnnxEngine
from lime_edge.runtimes.onnx.rows import OnnxRows
from lime_edge.session.decoder import Session

TOLERANCE = 1e-4  # of float32 logits, absolute and relative
CAPACITY, VOCAB = 40, 256
BLEND = {"expert0": 0.7, "expert2": 0.5, "expert3": -0.2}
EXPERTS: tuple[Selection, ...] = ("expert0", "expert1", "expert2", "expert3", BLEND)
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"targets": ALL_LINEARS, "rank": 8}),
    "gaps": ("llama", {"targets": ("q_proj", "v_proj", "down_proj"), "rank": 5}),
    "embeddings": ("llama", {"targets": ("q_proj", "v_proj", "embed_tokens"), "rank": 3}),
    "slicefine": ("llama", {"targets": ("q_proj", "v_proj", "embed_tokens"), "variant": "slicefine"}),
    "dora": ("llama", {"targets": ALL_LINEARS, "variant": "dora"}),
    "windows": ("mistral-window", {}),
    "sliding": ("qwen2-sliding", {}),
    "routed": ("llama", {"targets": ALL_LINEARS, "routing": {"top_k": 2}}),
}


def make_bundle(name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make, **options: Any) -> Path:
    case, adapter = CHECKPOINTS[name]
    model = tiny_model(CASES[case].family, **CASES[case].changes)
    return tiny_bundle(model, tiny_adapter(model, **({"targets": CASES[case].targets} | adapter)), **options)


def open_rows(session: Session, count: int, capacity: int | None = None) -> OnnxRows:
    return cast(OnnxEngine, session._engine).open_rows(count, capacity)


def find_residual(session: Session, selection: Selection) -> np.ndarray | None:
    return None if selection == "routed" else session._bank.residual(selection)


def assert_close(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    """Every logit within TOLERANCE; names the worst."""
    off = np.abs(found - wanted) / (TOLERANCE * (1 + np.abs(wanted)))
    worst = off.argmax()
    assert off[worst] < 1, f"{what}: {found[worst]:.6g}, expected {wanted[worst]:.6g} at {worst}"


@dataclass
class Sequence:
    """What a row is given, step by step, and the logits that came back."""

    selection: Selection
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    found: list[np.ndarray] = field(default_factory=list)

    def compare(self, session: Session, what: str) -> None:
        """With a session of its own."""
        session.use(self.selection)
        wanted = [session.logits(self.prompt, keep=1)[-1].copy()]
        wanted += [session.extend([token])[-1].copy() for token in self.tokens]
        assert len(wanted) == len(self.found)
        for step, (one, other) in enumerate(zip(self.found, wanted, strict=True)):
            assert_close(one, other, f"{what}, {self.selection}, step {step}")


class Schedule:
    """Sequences that start and end at random, their prompts fed in pieces while others go on."""

    def __init__(self, session: Session, rows: OnnxRows, selections: tuple[Selection, ...], seed: int):
        self.session, self.rows, self.selections = session, rows, selections
        self.random = random.Random(seed)
        self.running: dict[int, Sequence] = {}
        self.waiting: dict[int, tuple[Sequence, list[int]]] = {}  # and what is left of the prompt
        self.ended: list[Sequence] = []

    def start(self) -> None:
        draw = self.random
        sequence = Sequence(draw.choice(self.selections), [draw.randrange(VOCAB) for _ in range(draw.randint(1, 20))])
        row = self.rows.start(find_residual(self.session, sequence.selection))
        self.waiting[row] = sequence, list(sequence.prompt)

    def feed(self, row: int) -> None:
        """A piece of a prompt; a routed one in one call."""
        sequence, left = self.waiting[row]
        count = len(left) if sequence.selection == "routed" else self.random.randint(1, len(left))
        logits = self.rows.feed(row, np.array(left[:count]), 1)
        del left[:count]
        if not left:
            sequence.found.append(logits[-1].copy())
            self.running[row] = self.waiting.pop(row)[0]

    def step(self, rows: list[int]) -> None:
        tokens = [self.random.randrange(VOCAB) for _ in rows]
        logits = [row.copy() for row in self.rows.step(rows, tokens)]
        for row, token, found in zip(rows, tokens, logits, strict=True):
            self.running[row].tokens.append(token)
            self.running[row].found.append(found)

    def run(self, steps: int) -> None:
        """Whatever comes, with a bias towards full rows."""
        draw = self.random
        for _ in range(steps):
            if len(self.running) + len(self.waiting) < self.rows.count and draw.random() < 0.5:
                self.start()
            if self.waiting and draw.random() < 0.7:
                self.feed(draw.choice(list(self.waiting)))
            if self.running and draw.random() < 0.8:
                some = [row for row in self.running if draw.random() < 0.8] or list(self.running)
                draw.shuffle(some)
                self.step([row for row in some if self.rows.length(row) < CAPACITY])
            if self.running and draw.random() < 0.25:
                row = draw.choice(list(self.running))
                self.rows.stop(row)
                self.ended.append(self.running.pop(row))
        self.ended += self.running.values()


def check_schedule(
    bundle: Path, count: int, seed: int, selections: tuple[Selection, ...], what: str, steps: int = 60
) -> None:
    session = lime_edge.open_decoder(bundle, threads=1, max_length=CAPACITY)
    schedule = Schedule(session, open_rows(session, count), selections, seed)
    schedule.run(steps)
    assert len(schedule.ended) > 3
    for sequence in schedule.ended:
        sequence.compare(session, what)


@pytest.mark.parametrize("operators", ["1", "0"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_rows_answer_as_sessions_of_their_own(
    name: str,
    operators: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Make,
    tiny_adapter: Make,
    tiny_bundle: Make,
) -> None:
    """Mixed batches of 1 to 8: experts, blends, none, routed; prompts in pieces; random starts and ends."""
    monkeypatch.setenv("LIME_EDGE_OPERATORS", operators)
    bundle = make_bundle(name, tiny_model, tiny_adapter, tiny_bundle)
    others: tuple[Selection, ...] = () if name in ("dora", "slicefine") else (None,)
    others += ("routed",) if name == "routed" else ()
    for seed, count in enumerate((1, 3, 8)):
        check_schedule(bundle, count, seed, EXPERTS + others, f"{name}, {count} rows")


def test_sixteen_rows(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    bundle = make_bundle("llama", tiny_model, tiny_adapter, tiny_bundle)
    check_schedule(bundle, 16, 5, (*EXPERTS, None), "16 rows", steps=120)


@pytest.mark.parametrize("conditioned", [True, False])
def test_virtual_tokens(conditioned: bool, tiny_model: Make, tiny_bundle: Make, tmp_path: Path) -> None:
    """They lie in every row's cache, before its own tokens."""
    model = tiny_model("llama")
    bundle = tiny_bundle(model, make_prompt_adapter(tmp_path / "adapter", model, input_conditioned=conditioned))
    session = lime_edge.open_decoder(bundle, threads=1, max_length=CAPACITY)
    names: tuple[Selection, ...] = tuple(session.experts)
    for seed in range(3):
        check_schedule(bundle, 4, seed, names, f"conditioned {conditioned}")


def test_against_transformers(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """Four prompts of four lengths, four experts, the next tokens in one pass."""
    model = tiny_model("llama")
    adapter = tiny_adapter(model, targets=ALL_LINEARS)
    session = lime_edge.open_decoder(tiny_bundle(model, adapter), threads=1)
    unfolded = UnfoldedModel(load_model(model), *load_sites(adapter))
    ids = [draw_ids(length + 3, seed=length)[0] for length in (3, 11, 1, 7)]
    rows = open_rows(session, 4)
    numbers = [rows.start(session._bank.residual(f"expert{index}")) for index in range(4)]
    found = [[rows.feed(row, one[:-3].numpy(), 1)[-1].copy()] for row, one in zip(numbers, ids, strict=True)]
    for step in (-3, -2, -1):
        for place, last in enumerate(rows.step(numbers, [int(one[step]) for one in ids])):
            found[place].append(last.copy())
    for index, (one, logits) in enumerate(zip(ids, found, strict=True)):
        unfolded.use(index)
        wanted = unfolded.logits({"input_ids": one[None]})[0, -4:].numpy()
        for step in range(4):
            assert_close(logits[step], wanted[step], f"expert{index}, step {step}")


def test_oracle_takes_an_expert_for_each_row(tiny_model: Make, tiny_adapter: Make) -> None:
    """The compiler's decoder, prompt and step: rows of a batch equal those of calls of their own."""
    for name in ("llama", "gaps", "embeddings", "slicefine", "dora"):
        case, options = CHECKPOINTS[name]
        model = tiny_model(CASES[case].family)
        compiled = compile_checkpoint(read_checkpoint(model, tiny_adapter(model, **options)), CompileOptions("none"))
        module, ids = DecoderModule(compiled), torch.cat([draw_ids(6, seed) for seed in range(3)])
        residuals = torch.stack([compiled.experts[f"expert{index}"].float() - compiled.reference for index in range(3)])
        cache = Cache()
        together = torch.cat([module(ids[:, :5], residuals, cache), module(ids[:, 5:], residuals, cache)], dim=1)
        for row in range(3):
            alone = module(ids[row : row + 1], residuals[row])[0]
            assert_close(together[row].flatten().numpy(), alone.flatten().numpy(), f"{name}, row {row}")


# what is kept, swapped, refused


@pytest.fixture
def session(tiny_bundle: Make) -> Session:
    return lime_edge.open_decoder(tiny_bundle(), threads=1, max_length=CAPACITY)


def run_alone(session: Session, selection: Selection, ids: list[int]) -> np.ndarray:
    session.use(selection)
    return session.logits(ids, keep=1)[-1].copy()


def test_a_saved_prefix_begins_other_rows(session: Session) -> None:
    """Saved once, begun with twice, by another row set too; the rows go on with other tokens."""
    prompt, rows = [5, 17, 200, 31, 9], open_rows(session, 3)
    residual = session._bank.residual("expert1")
    first = rows.start(residual)
    rows.feed(first, np.array(prompt), 1)
    prefix = rows.save(first, 4)
    assert prefix.tokens == 4 and prefix.nbytes == sum(array.nbytes for array in prefix.arrays)
    rows.stop(first)
    others = open_rows(session, 2)
    for holder, end in ((rows, [40, 7]), (rows, [9, 123]), (others, [40, 8])):
        row = holder.start(residual, prefix)
        assert holder.length(row) == 4
        found = holder.feed(row, np.array(end), 1)[-1]
        assert_close(found, run_alone(session, "expert1", prompt[:4] + end), f"{end}")


def test_the_single_session_saves_and_loads(session: Session) -> None:
    engine = cast(OnnxEngine, session._engine)
    engine.set_expert(session._bank.residual("expert2"))
    wanted = engine.feed(np.array([5, 17, 200]), 1)[0].copy()
    prefix = engine.save(2)
    engine.rewind(0)
    engine.feed(np.array([1, 2, 3, 4]), 1)
    engine.load(prefix)
    assert engine.length == 2
    assert_close(engine.feed(np.array([200]), 1)[0], wanted, "after loading")


def test_another_expert_in_the_middle(session: Session) -> None:
    """The cache stays: what a session does with keep_cache=True."""
    rows = open_rows(session, 2)
    row, other = (rows.start(session._bank.residual(name)) for name in (None, "expert3"))
    rows.feed(row, np.array([5, 17, 200]), 1)
    rows.feed(other, np.array([9]), 1)
    rows.set_expert(row, session._bank.residual("expert1"))
    found = rows.step([other, row], [31, 40])[1].copy()
    session.use(None)
    session.logits([5, 17, 200], keep=1)
    session.use("expert1", keep_cache=True)
    assert_close(found, session.extend([40])[-1], "the step after")
    rows.rewind(row, 3)
    assert_close(rows.step([row], [40])[0], found, "the same step again")


def test_residuals_are_copied(session: Session) -> None:
    """The bank's buffers are used over and over."""
    rows, residual = open_rows(session, 1), session._bank.residual("expert1").copy()
    row = rows.start(residual)
    residual[:] = np.nan
    assert_close(rows.feed(row, np.array([5, 6]), 1)[0], run_alone(session, "expert1", [5, 6]), "after the copy")


def test_what_is_refused_changes_nothing(session: Session) -> None:
    rows = open_rows(session, 2, capacity=4)
    assert (rows.count, rows.capacity) == (2, 4)
    residual = session._bank.residual("expert0")
    full, other = rows.start(residual), rows.start(residual)
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: rows.start(residual), "all 2 rows are taken"),
        (lambda: rows.feed(other, np.arange(5), 1), "holds 4 tokens, 5 are needed"),
        (lambda: rows.step([other, full], [1, 2]), "holds 4 tokens, 5 are needed"),
        (lambda: open_rows(session, 0), "at least 1"),
        (lambda: open_rows(session, 1, 0), "tokens of a row"),
        (lambda: open_rows(session, 1, 10**9), "tokens of a row"),
    ]
    rows.feed(full, np.array([1, 2, 3, 4]), 1)
    for act, message in refusals:
        with pytest.raises(LimeEdgeError, match=message):
            act()
    assert (rows.length(full), rows.length(other)) == (4, 0)
    prefix = rows.save(full, 3)
    rows.stop(full)
    with pytest.raises(LimeEdgeError, match="holds 2 tokens, 3 are needed"):
        open_rows(session, 1, capacity=2).start(residual, prefix)
    assert rows.start(residual, prefix) not in (full, other), "numbers are not used again"


def test_memory_is_said_and_bounded(session: Session) -> None:
    """By what a token takes: keys and values of every layer."""
    manifest = session.bundle.manifest
    assert manifest.decoder is not None
    token = 2 * manifest.backbone.layers * manifest.decoder.kv_heads * manifest.decoder.head_dim * 4
    assert open_rows(session, 3).nbytes == 3 * CAPACITY * token
    assert open_rows(session, 2, 8).nbytes == 2 * 8 * token
