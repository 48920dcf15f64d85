"""The operators compiled for this machine against the functions' own nodes: same logits, and really run.

Needs neither torch nor onnx where LIME_EDGE_PREBUILT names bundles (see prebuilt.py): what is compiled for another
processor is proven on it.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import Make
from prebuilt import ADAPTERS, ODD, prebuilt_directory

import lime_edge
from lime_edge.bundle.experts import Selection
from lime_edge.runtimes.onnx.operators import find_library

TOLERANCE = 1e-4  # absolute and relative, for float32
PROMPT = [5, 17, 200, 31, 9, 9, 40, 123, 7, 8, 250, 251, 30, 31, 77, 78, 4, 99]  # more rows than one thread takes
NEW = [12, 260, 3]
OPERATORS = {"ExpertRowsBranch", "GappedExpertRowsBranch", "ExpertRowsBranchNorm", "RoutedBranch", "SwiGLU"}
RUN = {  # which of them a bundle's graphs call, of ADAPTERS
    "rank8": {"ExpertRowsBranch", "ExpertRowsBranchNorm", "SwiGLU"},
    "gaps": {"GappedExpertRowsBranch", "ExpertRowsBranchNorm", "SwiGLU"},
}
ROUTED = {"RoutedBranch", "ExpertRowsBranch", "ExpertRowsBranchNorm", "SwiGLU"}


@pytest.fixture(params=ADAPTERS)
def bundle(request: pytest.FixtureRequest) -> Path:
    """A float32 bundle of each adapter, its widths no multiple of what the operators compute at once."""
    if directory := prebuilt_directory():
        return directory / f"{request.param}.lime"
    model = request.getfixturevalue("tiny_model")("llama", **ODD)
    adapter = request.getfixturevalue("tiny_adapter")(model, **ADAPTERS[request.param])
    make_bundle: Make = request.getfixturevalue("tiny_bundle")
    return make_bundle(model, adapter)


def test_the_library_is_there() -> None:
    assert find_library(), "installed without the operators: no C compiler, or no AVX2, FMA and F16C on x86-64"


def test_logits_equal_those_of_the_functions(
    bundle: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in one call, then token by token: pinned, blended, off and routed."""
    name = request.node.callspec.params["bundle"]
    monkeypatch.setattr(onnxruntime, "SessionOptions", partial(profile, onnxruntime.SessionOptions, tmp_path))
    monkeypatch.delenv("LIME_EDGE_OPERATORS", raising=False)
    found, ran = run_all(bundle, operators=True)
    assert ran & OPERATORS == RUN.get(name, ROUTED)
    monkeypatch.setenv("LIME_EDGE_OPERATORS", "0")
    wanted, ran = run_all(bundle, operators=False)
    assert not ran & OPERATORS, "the nodes that we compare with are the operators again"
    assert ("routed" in wanted) == ("routing" in ADAPTERS[name])
    for selection, rows in wanted.items():
        excess = np.abs(found[selection] - rows) / (TOLERANCE * (1 + np.abs(rows)))
        worst = np.unravel_index(excess.argmax(), rows.shape)
        assert excess[worst] < 1, f"{selection}: {found[selection][worst]:.6g}, expected {rows[worst]:.6g} at {worst}"
    others = [rows for selection, rows in wanted.items() if selection != "expert1"]
    assert min(np.abs(rows - wanted["expert1"]).max() for rows in others) > 0.05, "or equality proves nothing"


def profile(make: type, folder: Path) -> onnxruntime.SessionOptions:
    """Session options that record which operators run."""
    options = make()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    return options


def run_all(bundle: Path, operators: bool) -> tuple[dict[str, np.ndarray], set[str]]:
    """Logits (T, V) of every selection, and the types of all nodes that ran."""
    session = lime_edge.open_decoder(bundle, target="onnx", threads=2, max_length=32)
    assert session.operators is operators
    selections: dict[str, Selection] = {"expert1": "expert1", "blend": {"expert0": 0.7, "expert2": 0.3}, "none": None}
    if session.bundle.manifest.targets["onnx"].routed:
        selections["routed"] = "routed"
    logits = {}
    for name, selection in selections.items():
        session.use(selection)
        rows = [session.logits(PROMPT)] + [session.extend([token]).copy() for token in NEW]
        logits[name] = np.concatenate(rows)
    engine = session._engine
    loaded = engine._graphs  # type: ignore[attr-defined]
    graphs = [graph for graph in (loaded.pinned, loaded._routed_graph) if graph]
    events = [event for graph in graphs for event in json.loads(Path(graph.end_profiling()).read_text())]
    return logits, {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
