"""d = p - p_ref in numpy; an engine may hand in a compiled loop that gives the same bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Subtract = Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # (p, p_ref, out): see subtract_reference


def subtract_reference(vector: np.ndarray, reference: np.ndarray, out: np.ndarray) -> None:
    """Write an expert's residual.

    Args:
        vector: p (sum_H,) float16 or float32. reference: p_ref (sum_H,) float32. out: (sum_H,) float32; all contiguous.
    """
    np.copyto(out, vector)
    out -= reference
