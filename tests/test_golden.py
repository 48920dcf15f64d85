"""Bundles against values that torch computed beforehand: the same on a workstation and on a device without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Make
from prebuilt import BUNDLES, NEW, SELECTIONS, Options, name_of, prebuilt_directory, selections_of, write_golden

import lime_edge
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions

TOLERANCE = 1e-4  # absolute and relative, for float32
DRIFT = 0.05  # how far int8 activations may move logits, in their standard deviations
FLOAT32 = [options for options in BUNDLES if options.get("quant", "none") == "none"]
QUANTIZED = [options for options in BUNDLES if options not in FLOAT32]


@pytest.fixture
def golden(request: pytest.FixtureRequest, tiny_bundle: Make, tmp_path: Path) -> tuple[Session, dict[str, np.ndarray]]:
    """An open session and torch's values for it."""
    options: Options = request.param
    directory = prebuilt_directory()
    file = (directory or tmp_path) / f"{name_of(options)}.npz"
    if directory is None:
        model = request.getfixturevalue("tiny_model")()
        write_golden(file, model, request.getfixturevalue("tiny_adapter")(model), options)
    with np.load(file) as values:
        return lime_edge.open_decoder(tiny_bundle(**options), threads=1), dict(values)


@pytest.mark.parametrize("golden", FLOAT32, indirect=True, ids=name_of)
def test_float32_logits_and_tokens_equal_torch(golden: tuple[Session, dict[str, np.ndarray]]) -> None:
    """Every expert, a blend and none: the prompt in one call, then token by token, then greedy tokens."""
    session, values = golden
    ids = values["ids"].tolist()
    names = [key.removeprefix("logits/") for key in values if key.startswith("logits/")]
    assert names == selections_of({"fold": session.experts[0], "single": len(session.experts) == 1})
    for name in names:
        session.use(SELECTIONS[name])
        wanted = values[f"logits/{name}"]
        assert_close(session.logits(ids), wanted, name)
        rows = [session.logits(ids[:9])] + [session.extend([token]).copy() for token in ids[9:]]
        assert_close(np.concatenate(rows), wanted, f"{name}, token by token")
        found = list(session.generate_ids(ids, GenerationOptions(NEW, ignore_eos=True)))
        assert found == values[f"tokens/{name}"].tolist(), f"greedy tokens of {name}"


def assert_close(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    assert found.shape == wanted.shape, what
    excess = np.abs(found - wanted) / (TOLERANCE * (1 + np.abs(wanted)))
    worst = np.unravel_index(excess.argmax(), wanted.shape)
    assert excess[worst] < 1, f"{what}: {found[worst]:.6g}, expected {wanted[worst]:.6g} at {worst}"


@pytest.mark.parametrize("golden", QUANTIZED, indirect=True, ids=name_of)
def test_quantized_logits_stay_near_torch(golden: tuple[Session, dict[str, np.ndarray]]) -> None:
    """The weights are the same integers; what differs is that the graph rounds activations to int8."""
    session, values = golden
    for name, selection in SELECTIONS.items():
        session.use(selection)
        found, wanted = session.logits(values["ids"].tolist()), values[f"logits/{name}"]
        drift = np.abs(found - wanted).std() / wanted.std()
        assert drift < DRIFT, f"{name}: int8 activations move logits by {drift:.3g} standard deviations"
        others = [values[f"logits/{other}"] for other in SELECTIONS if other != name]
        nearest = min(np.abs(found - other).std() / wanted.std() for other in others)
        assert nearest > 2 * DRIFT, f"{name}: another expert is as near as its own ({nearest:.3g})"
