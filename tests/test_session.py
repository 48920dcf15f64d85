"""Sessions: switching, caches, installing, memory. Engines are real; the model is tiny."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from prebuilt import prebuilt_directory

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import Expert, Selection
from lime_edge.errors import LimeEdgeError
from lime_edge.session.cache import Segment
from lime_edge.session.chunks import CHUNK, plan_chunks
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions

Make = Callable[..., Path]
PROMPTS = ([5, 17, 200, 31], [9, 9, 40], [123], [7, 8, 250, 251, 30, 31, 77, 78, 4, 99])
OPTIONS = GenerationOptions(max_new_tokens=4, ignore_eos=True)
SESSION_TARGETS = (
    "onnx",
    *(pytest.param(name, marks=pytest.mark.check) for name in ("executorch", "coreml", "coreai")),
)
HALF = {"coreml": 1e-5, "coreai": 5e-2}  # targets of float16: what a prompt in other pieces may differ by
KEEPS = "Apple's runtime keeps the memory of every output: docs/coreai.md, Running it"


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
    with pytest.raises(LimeEdgeError, match="threads: expected a whole number, at least 1 and at most 1024, found 0"):
        lime_edge.open(bundle, threads=0)
    session.use("none")
    assert session.selection is None
    for prompt in (None, b"hi", 3, {"a": 1}):
        with pytest.raises(LimeEdgeError, match="prompt: expected text or token ids, found"):
            list(session.generate_ids(prompt))  # type: ignore[arg-type]


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

    1,000 on Core ML: its interpreter takes about a millisecond a token even here. Core AI's takes ten.
    """
    rounds = {"coreml": 1_000, "coreai": 100}.get(find_target(bundle), 10_000)
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


def test_ten_thousand_switches_keep_memory_flat(switched: tuple[list[str], list[int]], target: str) -> None:
    if target == "coreai":
        pytest.skip(KEEPS)
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
    if target == "coreai":
        pytest.skip(KEEPS)
    bundle = Bundle.open(make_bundle(quant="int8"))
    manifest = bundle.manifest
    drawn = np.random.default_rng(0)
    size = 0
    for index in range(101):
        vector = drawn.normal(1, 0.5, manifest.sites.total).astype(np.float16)
        expert = Expert(f"new{index}", vector, manifest.adapter_id)
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
    error = {"coreml": 2e-2, "coreai": 1e-1}.get(find_target(bundle), 1e-4)  # rounded to float16, each for itself
    np.testing.assert_allclose(single.logits(PROMPTS[3]), expected, atol=error, rtol=error)
    assert single.experts == (name,) and single.selection == name
    for selection in (other, None, {name: 1.0}):
        with pytest.raises(LimeEdgeError, match="`single`"):
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
    manifest = session.bundle.manifest
    assert manifest.decoder is not None
    decoder = structs.replace(manifest.decoder, eos=(full[3],))
    session.bundle = replace(session.bundle, manifest=structs.replace(manifest, decoder=decoder))
    found = list(session.generate_ids(prompt, GenerationOptions(room)))
    assert session.finish_reason == "stop" and found == full[: full.index(full[3])]


# one generation, one thread

DISTURBANCES: dict[str, Callable[[Session, Path], object]] = {
    "use": lambda session, _: session.use(session.experts[1]),
    "logits": lambda session, _: session.logits([5, 6]),
    "extend": lambda session, _: session.extend([5]),
    "reset": lambda session, _: session.reset(),
    "install": lambda session, path: session.install(expert_of(path, 1), name=session.experts[0]),
    "another generation": lambda session, _: next(session.generate_ids([9, 9, 40], OPTIONS)),
}


def expert_of(path: Path, index: int) -> Path:
    return path / "experts" / f"expert{index}.safetensors"


@pytest.mark.parametrize("by", DISTURBANCES)
@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_disturbed_generation_raises(bundle: Path, by: str, after: int) -> None:
    """At its next token, the end included, and the session is as good as new."""
    session = open_session(bundle)
    expected = answer(session, PROMPTS[0])
    stream = session.generate_ids(PROMPTS[0], OPTIONS)
    assert [next(stream) for _ in range(after)] == expected[:after]
    DISTURBANCES[by](session, bundle)
    with pytest.raises(LimeEdgeError, match=f"this generation was disturbed by {by}"):
        next(stream)
    assert session.finish_reason is None
    fresh = open_session(bundle)
    if by == "install":
        fresh.install(expert_of(bundle, 1), name="expert0")
    fresh.use(session.selection)
    assert answer(session, PROMPTS[3]) == answer(fresh, PROMPTS[3])


def test_text_is_disturbed_like_ids_and_stop_strings_end_it_first(bundle: Path) -> None:
    session = open_session(bundle)
    stream = session.generate("hello there", OPTIONS)
    next(stream)
    session.reset()
    with pytest.raises(LimeEdgeError, match="disturbed by reset"):
        list(stream)


def test_the_later_generation_goes_on(bundle: Path) -> None:
    session = open_session(bundle)
    expected = answer(session, PROMPTS[3])
    first, second = (session.generate_ids(PROMPTS[3], OPTIONS) for _ in range(2))
    begun = [next(first)]
    assert list(second) == expected and begun == expected[:1]
    with pytest.raises(LimeEdgeError, match="disturbed by another generation"):
        next(first)
    assert session.finish_reason == "length"


def test_what_changes_nothing_disturbs_nothing(bundle: Path) -> None:
    """The same selection again, another expert installed or removed, a switch that fails, a look at the cache."""
    session = open_session(bundle)
    expected = answer(session, PROMPTS[0])
    stream = session.generate_ids(PROMPTS[0], OPTIONS)
    found = [next(stream)]
    session.use(session.selection)
    session.install(expert_of(bundle, 1), name="other")
    found.append(next(stream))
    session.remove("other")
    with pytest.raises(LimeEdgeError):
        session.use("missing")
    assert session.cache and session.max_length == 32
    assert found + list(stream) == expected


def run_in_thread(work: Callable[[], object]) -> list[object]:
    """What `work` gave or raised in a thread of its own, in a list."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(work())
        except LimeEdgeError as error:
            found.append(error)

    thread = threading.Thread(target=run, name="helper")
    thread.start()
    thread.join()
    return found


USES: dict[str, Callable[[Session, Path], object]] = {
    "use": lambda session, _: session.use(session.experts[0]),
    "logits": lambda session, _: session.logits([5, 6]),
    "extend": lambda session, _: session.extend([5]),
    "reset": lambda session, _: session.reset(),
    "install": lambda session, path: session.install(expert_of(path, 1), name="other"),
    "remove": lambda session, _: session.remove("expert3"),
    "generate": lambda session, _: list(session.generate("hello", OPTIONS)),
    "generate_ids": lambda session, _: list(session.generate_ids([5, 6], OPTIONS)),
    "hand_over": lambda session, _: session.hand_over(),
}


@pytest.mark.parametrize("name", USES)
def test_a_second_thread_is_refused(bundle: Path, name: str) -> None:
    session = open_session(bundle)
    session.logits(PROMPTS[0])
    (found,) = run_in_thread(lambda: USES[name](session, bundle))
    assert isinstance(found, LimeEdgeError) and "belongs to the thread 'MainThread', 'helper' may not" in str(found)
    assert "hand_over()" in found.hint
    assert answer(session, PROMPTS[0])


def test_a_running_generation_does_not_change_threads(bundle: Path) -> None:
    session = open_session(bundle)
    expected = answer(session, PROMPTS[0])
    stream = session.generate_ids(PROMPTS[0], OPTIONS)
    found = [next(stream)]
    (refused,) = run_in_thread(lambda: next(stream))
    assert isinstance(refused, LimeEdgeError)
    stream = session.generate_ids(PROMPTS[0], OPTIONS)  # the refusal ended the first
    found = [next(stream)]
    session.hand_over()
    (rest,) = run_in_thread(lambda: list(stream))
    assert found + list(rest) == expected  # type: ignore[call-overload]


def test_a_session_is_handed_over(bundle: Path) -> None:
    """Opened here, used there; given back by its owner, or taken when that has ended."""
    session = open_session(bundle)
    (there,) = run_in_thread(lambda: answer(session, PROMPTS[0]))
    with pytest.raises(LimeEdgeError, match="belongs to the thread 'helper'"):
        session.logits([5])
    session.hand_over()
    assert answer(session, PROMPTS[0]) == there


def test_two_threads_at_once_one_is_refused(bundle: Path) -> None:
    session, start = open_session(bundle), threading.Barrier(4)

    def work() -> object:
        start.wait()
        return [answer(session, prompt) for prompt in PROMPTS]

    with ThreadPoolExecutor(4) as pool:
        found = [one.exception() for one in [pool.submit(work) for _ in range(4)]]
    refused = [error for error in found if error is not None]
    assert len(refused) == 3 and all(isinstance(error, LimeEdgeError) for error in refused)


def test_sessions_in_threads_do_not_bleed(bundle: Path) -> None:
    """Four sessions, four experts, at the same time; every answer is that of a session alone."""
    rounds = 4 if find_target(bundle) in HALF else 40
    names = open_session(bundle).experts[:4]

    def work(name: str) -> list[list[int]]:
        session = open_session(bundle)
        session.use(name)
        return [answer(session, prompt) for _ in range(rounds) for prompt in PROMPTS]

    expected = {name: work(name) for name in names}
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(names, pool.map(work, names), strict=True))
    assert found == expected


# what is refused in words


@pytest.mark.parametrize("name", ["none", "routed", "", "../x", "a b", "x" * 65, 3])
def test_install_checks_the_name_it_is_given(bundle: Path, name: str) -> None:
    session = open_session(bundle)
    with pytest.raises(LimeEdgeError, match="install: .* is (not a valid expert name|reserved)"):
        session.install(expert_of(bundle, 1), name=name)
    assert session.experts == Bundle.open(bundle).manifest.experts


def test_an_engine_that_fails_is_one_clear_error_and_the_session_survives(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(bundle)
    expected = session.logits(PROMPTS[3]).copy()
    feed, calls = session._engine.feed, []

    def fail(ids: np.ndarray, keep: int) -> np.ndarray:
        calls.append(ids.size)
        if len(calls) == 2:
            raise RuntimeError("Non-zero status code\nand more")
        return feed(ids, keep)

    monkeypatch.setattr(session._engine, "feed", fail)
    monkeypatch.setattr("lime_edge.session.cache.CHUNK", 4)
    with pytest.raises(LimeEdgeError, match=r"the engine failed: RuntimeError: Non-zero status code\n  hint") as error:
        session.logits(PROMPTS[3])
    assert "lime-edge verify" in error.value.hint
    assert session.cache == (Segment(session.experts[0], 4),) and session._engine.length == 4
    np.testing.assert_allclose(session.extend(PROMPTS[3][4:], keep=0), expected[4:], atol=1e-4, rtol=1e-4)


def test_logits_that_are_no_numbers_end_a_generation(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(bundle)
    monkeypatch.setattr(session._engine, "feed", lambda ids, keep: np.full((1, 300), np.nan, np.float32))
    with pytest.raises(LimeEdgeError, match="logits hold nan: no token can be picked"):
        answer(session, PROMPTS[0])


@pytest.mark.parametrize("blend", [{"expert0": None}, {"expert0": "1"}, {"expert0": float("nan")}, {}])
def test_weights_that_are_no_numbers_are_refused(bundle: Path, blend: dict) -> None:
    with pytest.raises(LimeEdgeError, match="blend"):
        open_session(bundle).use(blend)


# where prompts are cut


def test_chunks_end_at_multiples_in_the_cache_and_none_is_a_single_token() -> None:
    assert plan_chunks(0, 1500) == [CHUNK, 2 * CHUNK, 1500]
    assert plan_chunks(500, 1500) == [12, 524, 1036, 1500]
    for held in (0, 1, 500, 510, 511, 512, 513, 1023):
        for count in (1, 2, 3, 4, 511, 512, 513, 514, 1024, 1025):
            sizes = np.diff([0, *plan_chunks(held, count)])
            assert sizes.sum() == count and sizes.max() <= CHUNK + 2
            assert sizes.min() > 1 or count == 1


def test_int4_answers_do_not_depend_on_what_was_kept(make_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty prompts that share beginnings, read anew or after a kept beginning: the same logits, to the bit.

    Core ML alone pads what is left of a prompt to enumerated lengths, and float products of other sizes add up in
    another order: there they are equal to float32's rounding.
    """
    monkeypatch.setattr("lime_edge.session.cache.CHUNK", 8)
    bundle = make_bundle(quant="int4")
    keeping, anew = open_session(bundle), open_session(bundle)
    draw = random.Random(1)
    stem = [draw.randrange(300) for _ in range(25)]
    options = replace(OPTIONS, max_new_tokens=1)
    for round_ in range(60 if find_target(bundle) == "onnx" else 12):
        prompt = stem[: draw.randrange(1, 25)] + [draw.randrange(300) for _ in range(draw.randrange(4))]
        list(keeping.generate_ids(prompt, options, keep_cache=True))
        list(anew.generate_ids(prompt, options))
        following = [draw.randrange(300)]
        found, expected = keeping.extend(following)[-1], anew.extend(following)[-1]
        error = HALF.get(find_target(bundle), 0.0)
        assert np.abs(found - expected).max() <= error, f"round {round_}: {np.abs(found - expected).max()}"
