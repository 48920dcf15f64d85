"""The graph for ONNX Runtime GenAI: the pinned one, whose inputs of ours have default values, on the same weight file.

GenAI feeds what it knows, and an adapter sets `expert`; without one the default is the folded model. It lies beside the
pinned graph, because ONNX Runtime refuses weights outside of a graph's folder. Other APIs refuse inputs with defaults,
so the pinned graph has none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from lime_edge.exporters.onnx.experts import EXPERT
from lime_edge.exporters.onnx.graph import LOGITS_TO_KEEP
from lime_edge.targets.genai import GRAPH


def write_defaulted(file: Path, neutral: float) -> Path:
    """Write genai.onnx beside a pinned graph.

    Args:
        file: the pinned graph, without virtual tokens. neutral: what changes nothing in an expert: 0, SliceFine 1.
    Returns:
        The file written.
    """
    model = onnx.load(file, load_external_data=False)
    defaults = {LOGITS_TO_KEEP: np.zeros(1, np.int64)}  # all of them
    for value in model.graph.input:
        if value.name == EXPERT:
            rows, total = value.type.tensor_type.shape.dim
            rows.dim_value = 1
            defaults[EXPERT] = np.full((1, total.dim_value), neutral, np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in defaults.items())
    written = file.with_name(Path(GRAPH).name)
    written.write_bytes(model.SerializeToString())
    return written
