"""Sessions: switching, caches, installing, memory. Engines are real; the model is tiny."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from prebuilt import prebuilt_directory

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import Expert, Selection
from lime_edge.errors import LimeEdgeError
from lime_edge.session.decoder import Segment, Session
from lime_edge.session.generate import GenerationOptions

Make = Callable[..., Path]
PROMPTS = ([5, 17, 200, 31], [9, 9, 40], [123], [7, 8, 250, 251, 30, 31, 77, 78, 4, 99])
OPTIONS = GenerationOptions(max_new_tokens=4, ignore_eos=True)
SESSION_TARGETS = ("onnx", *(pytest.param(name, marks=pytest.mark.check) for name in ("executorch", "coreml")))


@pytest.fixture(scope="module", params=("onnx",) if prebuilt_directory() else SESSION_TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """Every target, one suite; a machine without torch has bundles of one."""
    return request.param


@pytest.fixture(scope="module")
def make_bundle(tiny_bundle: Make, target: str) -> Make:
    """tiny_bundle for the target, which comes last in it."""
    return tiny_bundle if target == "onnx" else partial(tiny_bundle, targets=("onnx", target))


@pytest.fixture(scope="module")
def bundle(make_bundle: Make) -> Path:
    return make_bundle()


def find_target(path: Path) -> str:
    return tuple(Bundle.open(path).manifest.targets)[-1]


def open_session(path: Path, max_length: int = 32) -> Session:
    return lime_edge.open_decoder(path, target=find_target(path), threads=1, max_length=max_length)


def selections(session: Session) -> list[Selection]:
    first, second = session.experts[:2]
    return [*session.experts, {first: 0.7, second: 0.3}, {first: 1.5, second: -0.5}, None]


def answer(session: Session, prompt: list[int]) -> list[int]:
    return list(session.generate_ids(prompt, OPTIONS))


def test_what_is_not_a_selection_or_a_token_is_refused(bundle: Path) -> None:
    session = open_session(bundle)
    with pytest.raises(LimeEdgeError, match="expected a name, a blend or None, found 3"):
        session.use(3)  # type: ignore[arg-type]
    with pytest.raises(LimeEdgeError, match="expected a non-empty list of integers, found shape \\(1,\\) float64"):
        session.logits([1.5])  # type: ignore[list-item]
    with pytest.raises(LimeEdgeError, match="threads: expected at least 1, found 0"):
        lime_edge.open(bundle, threads=0)
    session.use("none")
    assert session.selection is None


def test_experts_answer_differently(bundle: Path) -> None:
    """Or the tests below prove nothing."""
    session = open_session(bundle)
    answers = []
    for selection in selections(session):
        session.use(selection)
        answers.append(session.logits(PROMPTS[0], keep=1)[-1].copy())
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert np.abs(one - other).max() > 0.05


@pytest.fixture(scope="module")
def switched(bundle: Path) -> tuple[list[str], list[int]]:
    """10,000 random switches: answers that differ from a fresh session's, and resident bytes as they went.

    1,000 on Core ML: its interpreter takes about a millisecond a token even here.
    """
    rounds = 1_000 if find_target(bundle) == "coreml" else 10_000
    session = open_session(bundle)
    expected = {}
    for i, selection in enumerate(selections(session)):
        for j, prompt in enumerate(PROMPTS):
            fresh = open_session(bundle)
            fresh.use(selection)
            expected[i, j] = answer(fresh, prompt)
    assert len({tuple(tokens) for tokens in expected.values()}) > len(PROMPTS)
    draw = random.Random(0)
    options = selections(session)
    wrong, memory = [], []
    for count in range(rounds):
        i, j = draw.randrange(len(options)), draw.randrange(len(PROMPTS))
        session.use(options[i])
        if answer(session, PROMPTS[j]) != expected[i, j]:
            wrong.append(f"switch {count}: {options[i]} on prompt {j}")
        if (count + 1) % (rounds // 10) == 0:
            memory.append(read_rss())
    return wrong, memory


def test_ten_thousand_switches_equal_fresh_sessions(switched: tuple[list[str], list[int]]) -> None:
    assert not switched[0], f"{len(switched[0])} answers differ, the first at {switched[0][0]}"


def test_ten_thousand_switches_keep_memory_flat(switched: tuple[list[str], list[int]]) -> None:
    memory = switched[1]
    settled = memory[2]  # allocators of a process that ran other tests before take a while to settle
    assert max(memory[3:]) - settled < 1_000_000, f"memory grew: {memory}"


def read_rss() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


HUNDRED = """
import json, sys
from pathlib import Path
import lime_edge
bundle, folder, target = sys.argv[1:]
session = lime_edge.open(bundle, target=target, threads=1, max_length=32)
def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def run():
    for name in session.experts:
        session.use(name)
        list(session.generate_ids([5, 6, 7]))
session.install(Path(folder) / "new0.safetensors")
run()
before = rss()
for index in range(1, 101):
    session.install(Path(folder) / f"new{index}.safetensors")
run()
print(json.dumps({"grown": rss() - before, "count": len(session.experts)}))
"""


def test_a_hundred_experts_cost_their_bytes(make_bundle: Make, target: str, tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(quant="int8"))
    manifest = bundle.manifest
    drawn = np.random.default_rng(0)
    size = 0
    for index in range(101):
        vector = drawn.normal(1, 0.5, manifest.sites.total).astype(np.float16)
        expert = Expert(f"new{index}", vector, manifest.fingerprint, manifest.sites.hash)
        (tmp_path / f"new{index}.safetensors").write_bytes(expert.to_bytes())
        size += vector.nbytes if index else 0
    command = [sys.executable, "-c", HUNDRED, str(bundle.path), str(tmp_path), target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["count"] == len(manifest.experts) + 101
    assert facts["grown"] <= size + 2_000_000, facts


def test_installed_expert_works_like_a_bundled_one(bundle: Path, tmp_path: Path) -> None:
    session = open_session(bundle)
    name = session.experts[1]
    session.use(name)
    expected = session.logits(PROMPTS[0])
    source = Bundle.open(bundle).path / "experts" / f"{name}.safetensors"
    assert session.install(source, name="copy") == "copy"
    session.use("copy")
    assert np.array_equal(session.logits(PROMPTS[0]), expected)
    session.use(name)
    session.remove("copy")
    with pytest.raises(LimeEdgeError, match="unknown expert 'copy'"):
        session.use("copy")


def test_replacing_the_expert_in_use_takes_effect(bundle: Path) -> None:
    session = open_session(bundle)
    one, two = session.experts[:2]
    session.use(two)
    expected = session.logits(PROMPTS[0])
    session.use(one)
    session.install(bundle / "experts" / f"{two}.safetensors", name=one)
    assert session.cache == ()
    assert np.array_equal(session.logits(PROMPTS[0]), expected)


def test_the_expert_in_use_cannot_be_removed(bundle: Path) -> None:
    session = open_session(bundle)
    one, two = session.experts[:2]
    session.use({one: 0.5, two: 0.5})
    with pytest.raises(LimeEdgeError, match="in use"):
        session.remove(two)


def test_a_failed_switch_changes_nothing(bundle: Path) -> None:
    session = open_session(bundle)
    session.use(session.experts[2])
    expected = session.logits(PROMPTS[0])
    for bad in ("missing", {session.experts[0]: 0.5}, "routed"):
        with pytest.raises(LimeEdgeError):
            session.use(bad)
    assert session.selection == session.experts[2]
    assert np.array_equal(session.logits(PROMPTS[0]), expected)


def test_switching_starts_a_new_cache_unless_told_otherwise(bundle: Path) -> None:
    session = open_session(bundle)
    one, two = session.experts[:2]
    session.use(one)
    session.logits(PROMPTS[0])
    session.use(one)
    assert session.cache == (Segment(one, 4),)
    session.use(two)
    assert session.cache == ()
    session.logits(PROMPTS[0])
    session.use(one, keep_cache=True)
    session.extend([50, 51])
    assert session.cache == (Segment(two, 4), Segment(one, 2))


def test_a_kept_cache_is_a_mixture_and_a_new_one_is_not(bundle: Path) -> None:
    session = open_session(bundle)
    one, two = session.experts[:2]
    ids = PROMPTS[3]
    session.use(two)
    pure = session.logits(ids)[-1].copy()
    session.use(one)
    session.logits(ids[:-1])
    session.use(two, keep_cache=True)
    mixed = session.extend(ids[-1:])[-1].copy()
    assert np.abs(mixed - pure).max() > 1e-3
    session.use(one)
    session.use(two)
    assert np.array_equal(session.logits(ids)[-1], pure)


def test_generation_keeps_the_common_prefix_when_told(bundle: Path) -> None:
    session = open_session(bundle)
    fed: list[int] = []
    feed = session._engine.feed

    def count(ids: np.ndarray, keep: int) -> np.ndarray:
        fed.append(ids.size)
        return feed(ids, keep)

    session._engine.feed = count  # type: ignore[method-assign]
    ids = PROMPTS[3]
    first = list(session.generate_ids(ids, OPTIONS))
    assert fed == [10, 1, 1, 1]
    fed.clear()
    longer = ids + first + [60]
    kept = list(session.generate_ids(longer, OPTIONS, keep_cache=True))
    assert fed == [2, 1, 1, 1]  # the last token given was never fed, and one is new
    fed.clear()
    assert list(session.generate_ids(longer, OPTIONS)) == kept
    assert fed[0] == len(longer)
    assert sum(segment.tokens for segment in session.cache) == session._engine.length


def test_an_abandoned_generation_leaves_no_trace(bundle: Path) -> None:
    session = open_session(bundle)
    expected = answer(session, PROMPTS[0])
    stream = session.generate_ids(PROMPTS[3], OPTIONS)
    next(stream)
    del stream
    assert answer(session, PROMPTS[0]) == expected


def test_extend_equals_one_call(bundle: Path) -> None:
    session = open_session(bundle)
    ids = PROMPTS[3]
    whole = session.logits(ids)
    session.logits(ids[:3])
    parts = [session.extend([token])[-1].copy() for token in ids[3:]]
    np.testing.assert_allclose(np.stack(parts), whole[3:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ids", [[], [-1], [300], [[1, 2]]])
def test_bad_token_ids_are_refused(bundle: Path, ids: list) -> None:
    with pytest.raises(LimeEdgeError, match="token ids"):
        open_session(bundle).logits(ids)


def test_a_full_cache_is_refused_and_survives(bundle: Path) -> None:
    session = open_session(bundle, max_length=6)
    assert len(answer(session, PROMPTS[0])) == 2  # four of the prompt, two more fit
    session.logits([1, 2, 3, 4, 5])
    with pytest.raises(LimeEdgeError, match="holds 6 tokens, 8 are needed"):
        session.extend([1, 2, 3])
    assert session.extend([6]).shape == (1, 300)
    with pytest.raises(LimeEdgeError, match="the prompt has 6"):
        answer(session, [1, 2, 3, 4, 5, 6])
    with pytest.raises(LimeEdgeError, match="max_length: expected 1..64, found 65"):
        open_session(bundle, max_length=65)


def test_text_in_text_out(bundle: Path) -> None:
    session = open_session(bundle)
    ids = session.codec.encode("hello there")
    expected = session.codec.decode(answer(session, ids))
    assert "".join(session.generate("hello there", OPTIONS)) == expected


def test_a_single_bundle_runs_its_expert_only(make_bundle: Make, bundle: Path) -> None:
    session = open_session(bundle)
    name, other = session.experts[:2]
    single = open_session(make_bundle(fold=name, single=True))
    session.use(name)
    expected = session.logits(PROMPTS[3])
    error = 2e-2 if find_target(bundle) == "coreml" else 1e-4  # both weights are rounded to float16, each for itself
    np.testing.assert_allclose(single.logits(PROMPTS[3]), expected, atol=error, rtol=error)
    assert single.experts == (name,) and single.selection == name
    for selection in (other, None, {name: 1.0}):
        with pytest.raises(LimeEdgeError, match="--single"):
            single.use(selection)


def test_folding_an_expert_makes_its_residual_zero(tiny_bundle: Make) -> None:
    """`--fold NAME` gives d = 0 exactly, because p_ref is computed from the stored vectors."""
    name = open_session(tiny_bundle()).experts[1]
    for quant in ("none", "int8"):
        bank = Bundle.open(tiny_bundle(fold=name, quant=quant)).open_bank()
        assert not bank.residual(name).any()
        assert bank.residual(None).any()


def test_why_a_generation_ended(bundle: Path) -> None:
    """The limit, the end of the cache, an end token, and nothing while it is not over."""
    session = open_session(bundle)
    prompt, room = list(range(5, 15)), session.max_length - 10
    assert session.finish_reason is None
    list(session.generate_ids(prompt, GenerationOptions(4, ignore_eos=True)))
    assert session.finish_reason == "length"
    full = list(session.generate_ids(prompt, GenerationOptions(room + 9, ignore_eos=True)))
    assert session.finish_reason == "cache" and len(full) == room
    unfinished = session.generate_ids(prompt, GenerationOptions(4, ignore_eos=True))
    next(unfinished)
    assert session.finish_reason is None
    session.bundle.manifest.model["eos"] = [full[3]]
    found = list(session.generate_ids(prompt, GenerationOptions(room)))
    assert session.finish_reason == "stop" and found == full[: full.index(full[3])]
