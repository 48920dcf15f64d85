"""Is an answer PyTorch's, within what rounding explains, and not another selection's?"""

from __future__ import annotations

import numpy as np

from lime_edge.bundle.experts import ROUTED
from lime_edge.bundle.golden import Golden, Rows, condense
from lime_edge.checks.replay import DECIDING
from lime_edge.checks.report import MISSED, OK, Check
from lime_edge.checks.tolerance import NARROW, choose_tolerance

LEAN, LEAN_SHARE = 0.25, 0.25  # see find_lean


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
