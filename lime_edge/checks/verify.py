"""Does a bundle compute on this machine what PyTorch computed at export? Every target, every expert; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import ROUTED, describe_selection, parse_selection
from lime_edge.bundle.golden import Golden, read_golden
from lime_edge.checks.judge import judge
from lime_edge.checks.replay import count_tokens, find_shortage, replay
from lime_edge.checks.report import EVERY, MISSED, UNCHECKED, Check, Report, refuse_nothing
from lime_edge.checks.tolerance import find_compute
from lime_edge.errors import EXIT_MISSING, LimeEdgeError
from lime_edge.session.engines import SessionOptions
from lime_edge.session.open import open_any
from lime_edge.targets.registry import find_target

Progress = Callable[[str, int, int], None]


def verify_bundle(
    path: Path,
    targets: Sequence[str] = (),
    selections: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = lambda *_: None,
    providers: tuple[str, ...] = (),
) -> Report:
    """Compare every file's sha256, then every target with the golden outputs that its export stored.

    Args:
        targets: some of the bundle's; by default all, as far as their engines are here. selections: some of the
            golden ones, as one types them; all by default. progress: called with (target, done, total). providers:
            see SessionOptions.
    Raises:
        LimeEdgeError: a damaged file, no golden outputs, an unknown target or selection, no engine.
    """
    bundle = Bundle.open(path, verify=True)
    golden = read_golden(bundle)
    if golden is None:
        raise LimeEdgeError(
            f"{path}: holds no golden outputs to compare with",
            "export the bundle again: lime-edge export of this version stores them",
        )
    present = bundle.manifest.targets
    for name in targets:
        find_target(name)
        if name not in present:
            raise LimeEdgeError(f"{path}: holds no {name} artifact", f"it holds {', '.join(present)}")
    wanted = choose_selections(golden, bundle, selections)
    computes = {name: find_compute(bundle, name) for name in targets or present}
    checks: list[Check] = []
    options, used = SessionOptions(threads, None, providers), {}
    for target in computes:
        used[target], found = verify_target(bundle, golden, target, wanted, options, bool(targets), progress)
        checks += found
    refuse_nothing(path, checks, used, count_tokens(golden))
    return Report(str(path), len(bundle.manifest.files), computes, used, tuple(checks))


def choose_selections(golden: Golden, bundle: Bundle, asked: Sequence[str]) -> tuple[str, ...]:
    """The selections to check: those asked for, else the golden ones and every expert that came later.

    Raises:
        LimeEdgeError: one that neither knows.
    """
    known = tuple(dict.fromkeys((*golden.selections, *bundle.manifest.experts)))
    names = [describe_selection(parse_selection(text)) for text in asked]
    for name in names:
        if name not in known:
            raise LimeEdgeError(f"no golden outputs for {name!r}", f"there are some for {', '.join(golden.selections)}")
    return tuple(names) or known


def verify_target(
    bundle: Bundle,
    golden: Golden,
    target: str,
    wanted: Sequence[str],
    options: SessionOptions,
    insist: bool,
    progress: Progress,
) -> tuple[str, list[Check]]:
    """Every selection on one target; insist: a missing engine is an error, not a target left unchecked.

    Returns:
        What the engine runs on (empty where none was opened), and the checks.
    """
    try:
        session = open_any(bundle, target, options)
    except LimeEdgeError as error:
        if error.exit_code == EXIT_MISSING and insist:
            raise
        result = UNCHECKED if error.exit_code == EXIT_MISSING else MISSED
        return "", [Check(target, EVERY, result, error.problem)]
    compute = find_compute(bundle, target)
    if why := find_shortage(session, golden):
        return session.provider, [Check(target, EVERY, UNCHECKED, why)]
    checks = []
    for index, label in enumerate(wanted):
        progress(target, index, len(wanted))
        if why := find_obstacle(bundle, golden, target, label):
            checks.append(Check(target, label, UNCHECKED, why))
            continue
        try:
            session.use(parse_selection(label))
            checks.append(judge(golden, target, label, replay(session, golden, label), compute))
        except LimeEdgeError as error:
            checks.append(Check(target, label, MISSED, error.problem))
        except Exception as error:  # answers of a shape that nobody expects
            first = next(iter(str(error).splitlines()), "")
            checks.append(Check(target, label, MISSED, f"{type(error).__name__}: {first}"))
    progress(target, len(wanted), len(wanted))
    return session.provider, checks


def find_obstacle(bundle: Bundle, golden: Golden, target: str, label: str) -> str:
    """Why a selection cannot be compared on a target, or empty."""
    selection, manifest = parse_selection(label), bundle.manifest
    if selection == ROUTED:
        facts = manifest.targets[target]
        if not facts.routed:
            return "this target has no routed graph"
        prompt, most = next(iter(golden.calls.values())).shape[-1], max(getattr(facts, "lengths", ()), default=0)
        if most and prompt + facts.virtual_tokens > most:  # a routed prompt is run in one call
            return f"its prompt of {prompt} tokens is longer than `prompt_lengths` at export, {most}"
        return ""
    names = [selection] if isinstance(selection, str) else list(selection or ())
    if gone := [name for name in names if name not in manifest.experts]:
        return f"{', '.join(gone)}: removed after the export"
    if label not in golden.selections or set(names) & set(manifest.added):
        return "came after the export: PyTorch never ran it"
    return ""
