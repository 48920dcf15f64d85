"""Does a bundle compute on this machine what PyTorch computed at export? Every target, every expert; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lime_edge import terminal
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import describe_selection, parse_selection
from lime_edge.bundle.golden import Golden, Rows, condense, read_golden
from lime_edge.errors import EXIT_INPUT, EXIT_MISMATCH, EXIT_MISSING, LimeEdgeError
from lime_edge.session.decoder import Session, SessionOptions
from lime_edge.session.encoder import KIND, EncoderSession, open_encoder_session
from lime_edge.session.switching import ROUTED
from lime_edge.targets.registry import check_target, open_session

OK, MISSED, UNCHECKED = "ok", "missed", "not checked"
EVERY = "all"  # what stands for all selections where a target cannot be run at all
DECIDING = "logits"  # the output whose largest value is a decision
NARROW, ROUTED_FACTOR, NARROW_FACTOR = 16, 2, 3  # see choose_tolerance
LEAN, LEAN_SHARE = 0.25, 0.25  # see find_lean
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tolerance:
    """What a way of computing may differ by, in standard deviations of the output.

    mean: root mean square error of a row, averaged over rows. worst: the largest of any row. decisive: where the
    oracle's best lies further than this before its second, the best must be the same.
    """

    mean: float
    worst: float
    decisive: float


# By what a target computes in; how these were found: docs/bundle-format.md, "Golden outputs".
TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4, 1e-3),
    "float16": Tolerance(0.02, 0.05, 0.2),
    "int8-dynamic": Tolerance(0.1, 0.25, 1.0),  # activations rounded in blocks
    "int8-per-token": Tolerance(0.2, 0.4, 1.0),  # activations rounded with one scale a token: coarser
}


@dataclass(frozen=True)
class Check:
    """One selection on one target: what came of it.

    error, worst: see Tolerance. agreed of decisions: greedy tokens or classes equal to the oracle's. why: what was
    missed, or why it was not checked.
    """

    target: str
    selection: str
    result: str
    why: str = ""
    error: float | None = None
    worst: float | None = None
    agreed: int = 0
    decisions: int = 0


@dataclass(frozen=True)
class Report:
    """What `verify` found: by target, how it computes and what on; and every check."""

    path: str
    files: int
    computes: dict[str, str]
    providers: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def missed(self) -> tuple[Check, ...]:
        """Checks that were not met."""
        return tuple(check for check in self.checks if check.result == MISSED)

    def describe(self) -> dict[str, Any]:
        """What `lime-edge verify --json` prints."""
        limits = {
            target: {"compute": name, "provider": self.providers[target]} | asdict(TOLERANCES[name])
            for target, name in self.computes.items()
        }
        return {
            "path": self.path,
            "passed": not self.missed,
            "files": self.files,
            "targets": limits,
            "checks": [asdict(check) for check in self.checks],
        }


def verify_bundle(
    path: Path,
    targets: Sequence[str] = (),
    selections: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = lambda *_: None,
) -> Report:
    """Compare every file's sha256, then every target with the golden outputs that its export stored.

    Args:
        targets: some of the bundle's; by default all, as far as their engines are here. selections: some of the
            golden ones, as one types them; all by default. progress: called with (target, done, total).
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
        check_target(name)
        if name not in present:
            raise LimeEdgeError(f"{path}: holds no {name} artifact", f"it holds {', '.join(present)}")
    wanted = choose_selections(golden, bundle, selections)
    computes = {name: find_compute(bundle, name) for name in targets or present}
    checks: list[Check] = []
    providers = {}
    for target in computes:
        providers[target], found = verify_target(bundle, golden, target, wanted, threads, bool(targets), progress)
        checks += found
    refuse_nothing(path, checks, providers, count_tokens(golden))
    return Report(str(path), len(bundle.manifest.files), computes, providers, tuple(checks))


def count_tokens(golden: Golden) -> int:
    """What a cache must hold: a prompt and the oracle's steps after it."""
    return next(iter(golden.calls.values())).shape[-1] + golden.steps


def refuse_nothing(path: Path, checks: Sequence[Check], providers: Mapping[str, str], needed: int) -> None:
    """An answer that compares nothing is none.

    Args:
        providers: by target; empty where its engine is not here. needed: tokens that a cache must hold.
    Raises:
        LimeEdgeError: no engine is here, every cache is too short, or only what PyTorch never ran was asked for.
    """
    if any(check.result != UNCHECKED for check in checks):
        return
    problem = "; ".join(dict.fromkeys(f"{check.target}, {check.selection}: {check.why}" for check in checks))
    hint, code = "leave --expert out to check what the export knew", EXIT_INPUT
    if not all(providers.values()):
        hint, code = "install one target's engine", EXIT_MISSING
    elif any(check.selection == EVERY for check in checks):
        hint = f"export with --max-seq-len {needed} or more"
    raise LimeEdgeError(f"{path}: nothing could be checked: {problem}", hint, code)


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


def find_compute(bundle: Bundle, target: str) -> str:
    """How a target computes, a key of TOLERANCES: what its manifest entry says, else by the quantization.

    Raises:
        LimeEdgeError: a way that this version does not know.
    """
    default = "float32" if bundle.manifest.quantization["quant"] == "none" else "int8-dynamic"
    compute = bundle.manifest.targets[target].get("compute", default)
    if compute not in TOLERANCES:
        raise LimeEdgeError(
            f"{bundle.path}: target {target}: compute: expected {' or '.join(TOLERANCES)}, found {compute!r}",
            "upgrade lime-edge on this device",
        )
    return compute


def verify_target(
    bundle: Bundle,
    golden: Golden,
    target: str,
    wanted: Sequence[str],
    threads: int | None,
    insist: bool,
    progress: Progress,
) -> tuple[str, list[Check]]:
    """Every selection on one target; insist: a missing engine is an error, not a target left unchecked.

    Returns:
        What the engine runs on (empty where none was opened), and the checks.
    """
    encoder = bundle.manifest.model.get("kind") == KIND
    opener = open_encoder_session if encoder else open_session
    try:
        session = opener(bundle, target, SessionOptions(threads))
    except LimeEdgeError as error:
        if error.exit_code == EXIT_MISSING and insist:
            raise
        result = UNCHECKED if error.exit_code == EXIT_MISSING else MISSED
        return "", [Check(target, EVERY, result, error.problem)]
    compute = find_compute(bundle, target)
    needed = count_tokens(golden)
    if isinstance(session, Session) and session.max_length < needed:
        why = f"its cache holds {session.max_length} tokens, {needed} are needed"
        return session.provider, [Check(target, EVERY, UNCHECKED, why)]
    checks = []
    for index, label in enumerate(wanted):
        progress(target, index, len(wanted))
        if why := find_obstacle(bundle, golden, target, label):
            checks.append(Check(target, label, UNCHECKED, why))
            continue
        try:
            session.use(parse_selection(label))
            if isinstance(session, Session):
                found = run_decoder(session, golden, label)
            else:
                found = run_encoder(session, golden)
            checks.append(judge(golden, target, label, found, compute))
        except Exception as error:  # the engines' own share no public base
            lines = str(error).splitlines() or [""]
            checks.append(Check(target, label, MISSED, f"{type(error).__name__}: {lines[0]}"))
    progress(target, len(wanted), len(wanted))
    return session.provider, checks


def find_obstacle(bundle: Bundle, golden: Golden, target: str, label: str) -> str:
    """Why a selection cannot be compared on a target, or empty."""
    selection, manifest = parse_selection(label), bundle.manifest
    if selection == ROUTED:
        facts = manifest.targets[target]
        if not facts.get("routed"):
            return "this target has no routed graph"
        prompt, most = next(iter(golden.calls.values())).shape[-1], max(facts.get("lengths") or (0,))
        if most and prompt + facts.get("virtual_tokens", 0) > most:  # a routed prompt is run in one call
            return f"its prompt of {prompt} tokens is longer than --prompt-lengths at export, {most}"
        return ""
    names = [selection] if isinstance(selection, str) else list(selection or ())
    if gone := [name for name in names if name not in manifest.experts]:
        return f"{', '.join(gone)}: removed after the export"
    if label not in golden.selections or set(names) & set(manifest.added):
        return "came after the export: PyTorch never ran it"
    return ""


def run_decoder(session: Session, golden: Golden, label: str) -> dict[str, np.ndarray]:
    """Logits (P, steps, V) of what the cache path gives: the prompt, then the oracle's tokens one by one."""
    tokens = golden.outputs[DECIDING].expected.best[golden.selections.index(label)]
    calls = []
    for prompt, answer in zip(golden.calls["input_ids"], tokens, strict=True):
        rows = [session.logits(prompt[0].tolist(), keep=1)[-1].copy()]
        rows += [session.extend([int(token)])[-1].copy() for token in answer[: golden.steps - 1]]
        calls.append(np.stack(rows))
    return {DECIDING: np.stack(calls)}


def run_encoder(session: EncoderSession, golden: Golden) -> dict[str, np.ndarray]:
    """The kept rows (P, R, V) of every output."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in golden.outputs}
    for index in range(golden.count):
        outputs = session.run(**{name: calls[index] for name, calls in golden.calls.items()})
        for name, output in golden.outputs.items():
            found[name].append(outputs[name].reshape(-1, outputs[name].shape[-1])[output.rows])
    return {name: np.stack(rows) for name, rows in found.items()}


def choose_tolerance(compute: str, label: str, width: int) -> Tolerance:
    """The limits of one output of that width under one selection.

    Rounding tips a routed token to other experts now and then, and a row of a few values averages nothing out.
    """
    limits, loose = TOLERANCES[compute], 1
    if compute != "float32":
        loose = (ROUTED_FACTOR if label == ROUTED else 1) * (NARROW_FACTOR if width < NARROW else 1)
    return Tolerance(limits.mean * loose, limits.worst * loose, limits.decisive * loose)


def judge(golden: Golden, target: str, label: str, found: dict[str, np.ndarray], compute: str) -> Check:
    """Compare full rows of every output with the golden ones of a selection."""
    index = golden.selections.index(label)
    means, worst, agreed, decisions, faults = [], 0.0, 0, 0, []
    for name, output in golden.outputs.items():
        mine, expected = condense(found[name], output.columns, golden.steps > 0), output.expected.pick(index)
        errors = measure_errors(mine, expected) / output.scale
        tolerance = choose_tolerance(compute, label, output.columns.size)
        means.append(float(errors.mean()))
        worst = float(np.maximum(worst, errors.max()))
        if not (errors.mean() <= tolerance.mean and errors.max() <= tolerance.worst):
            faults.append(f"{name} differ")
        if name == DECIDING:
            same = mine.best == expected.best
            agreed, decisions = int(same.sum()), same.size
            if (~same & (expected.margin > tolerance.decisive * output.scale)).any():
                faults.append("another choice where PyTorch was sure")
        shared = 1 if golden.steps else len(output.rows)  # after its first token every selection reads another text
        other = find_likeness(
            mine.values[:, :shared], output.expected.values[:, :, :shared], index, tolerance.mean * output.scale
        )
        if other is not None:
            faults.append(f"answers like {golden.selections[other]}")
        elif not faults and may_lean(compute, label, output.columns.size):  # gross damage leans anywhere
            leaning = find_lean(
                mine.values[:, :shared], output.expected.values[:, :, :shared], index, tolerance.mean * output.scale
            )
            if leaning is not None:
                faults.append(f"leans towards {golden.selections[leaning]}")
    faults, error = list(dict.fromkeys(faults)), float(np.max(means))
    if not np.isfinite(error):
        return Check(target, label, MISSED, "NaN or infinite values", None, None, agreed, decisions)
    return Check(target, label, MISSED if faults else OK, "; ".join(faults), error, worst, agreed, decisions)


def measure_errors(found: Rows, expected: Rows) -> np.ndarray:
    """Root mean square error of each row's kept values and its largest: (P, R)."""
    values = np.concatenate([found.values, found.peak[..., None]], -1)
    wanted = np.concatenate([expected.values, expected.peak[..., None]], -1)
    return np.sqrt(np.mean((values - wanted) ** 2, -1))


def find_likeness(found: np.ndarray, expected: np.ndarray, index: int, limit: float) -> int | None:
    """The selection that rows are the answers of, where they are nearer to them than to those of the one in use.

    Args:
        found: (P, R, C). expected: (S, P, R, C). limit: answers lie within it; selections that differ by less than
            half of it are not told apart.
    """

    def distance(values: np.ndarray) -> np.ndarray:
        return np.sqrt(((expected - values) ** 2).mean((1, 2, 3)))

    apart, away = distance(expected[index]), distance(found)
    away[(apart < limit / 2) & (np.arange(len(away)) != index)] = np.inf
    nearest = int(away.argmin())
    return nearest if nearest != index and away[nearest] <= limit else None


def may_lean(compute: str, label: str, width: int) -> bool:
    """Whether rounding leaves errors without a direction: not where it tips routing, nor in a row of a few values."""
    return compute == "float32" or (label != ROUTED and width >= NARROW)


def find_lean(found: np.ndarray, expected: np.ndarray, index: int, limit: float) -> int | None:
    """The selection that a part of the answers seems to come from, as when some slices of an expert are another's.

    Rounding errors have no direction; a mixture's error points from the answers of the one to those of the other.
    Their least squares coefficient must be beyond LEAN, and what it explains of the error beyond LEAN_SHARE of the
    limit (coefficients of selections that are close together are noise).

    Args:
        found, expected, limit: see find_likeness.
    """
    ways = (expected - expected[index]).reshape(len(expected), -1).astype(np.float64)
    squares = np.maximum((ways**2).mean(1), 1e-30)
    leans = (ways * (found - expected[index]).reshape(-1)).mean(1) / squares
    explained = leans * np.sqrt(squares)
    explained[leans <= LEAN] = 0.0
    best = int(explained.argmax())
    return best if explained[best] > LEAN_SHARE * limit else None


def show_report(report: Report) -> None:
    """Print the table of `lime-edge verify`."""
    columns = {
        "target": "left",
        "selection": "left",
        "error": "right",
        "worst": "right",
        "decisions": "right",
        "result": "left",
    }
    rows = [
        [
            c.target,
            c.selection,
            _number(c.error),
            _number(c.worst),
            f"{c.agreed} of {c.decisions}" if c.decisions else "",
            f"{c.result}: {c.why}" if c.why else c.result,
        ]
        for c in report.checks
    ]
    terminal.print_table(
        f"{report.path}: {report.files} files as they were written; errors in standard deviations of the output",
        columns,
        rows,
    )
    for target, compute in report.computes.items():
        limit = TOLERANCES[compute]
        own = [check for check in report.checks if check.target == target]
        engine = f" on {report.providers[target]}" if report.providers[target] else ""
        terminal.out.print(
            f"{target}{engine}: {count_results(own)} ({compute}: error at most {limit.mean:g}, worst {limit.worst:g})",
            soft_wrap=True,
        )


def count_results(checks: Sequence[Check]) -> str:
    """One target's results in words: "5 checked, 5 as PyTorch computed them, 3 not checked"."""
    unchecked = sum(check.result == UNCHECKED for check in checks)
    if any(check.selection == EVERY for check in checks):
        return "not checked" if unchecked else "not as PyTorch computed it"
    passed = sum(check.result == OK for check in checks)
    words = f"{len(checks) - unchecked} checked, {passed} as PyTorch computed them"
    return f"{words}, {unchecked} not checked" if unchecked else words


def refuse_misses(report: Report) -> None:
    """Raise what makes the command line end with 3.

    Raises:
        LimeEdgeError: a check missed.
    """
    if report.missed:
        lines = "\n".join(f"  - {check.target}, {check.selection}: {check.why}" for check in report.missed)
        raise LimeEdgeError(
            f"{report.path}: {len(report.missed)} of {len(report.checks)} checks missed\n{lines}",
            "the artifact does not compute here what it should: try --target with another one, or export it again",
            EXIT_MISMATCH,
        )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"
