"""A routed checkpoint's behaviour as one pinned expert."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models import load_model, load_sites

from lime_edge.bundle.bundle import Bundle
from lime_edge.checks.evaluate import Example
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.profiling import average_routing, mix_experts
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.profile import add_profile, compare_profile

Make = Callable[..., Path]
ROUTING = {"auto_topk": True, "temperature": 0.3}
EXAMPLES = [Example("hello", "abc"), Example("is it so?", "no")]


@pytest.fixture
def pair(tiny_model: Make, tiny_adapter: Make) -> tuple[Path, Path]:
    return tiny_model(), tiny_adapter(tiny_model(), routing=ROUTING, shared=True)


def test_weights_are_the_references_mean(pair: tuple[Path, Path]) -> None:
    """Independent: the unfolded layers' own weights, prompt in one call, then one token a call."""
    compiled = compile_checkpoint(read_checkpoint(*pair), CompileOptions(quant="none"))
    found = average_routing(compiled, [([9, 8, 7, 30], [40, 41]), ([100, 101], [])])
    seen: dict[str, list[torch.Tensor]] = {}
    reference = UnfoldedModel(load_model(pair[0]), *load_sites(pair[1]))
    from lime_edge.compiler.maths import layers

    original, order = layers.route, []

    def watch(*arguments: object, **named: object) -> torch.Tensor:
        weights = original(*arguments, **named)  # type: ignore[arg-type]
        order.append(weights)
        return weights

    layers.route = watch
    try:
        reference.use("routed")
        reference.generate(torch.tensor([[9, 8, 7, 30]]), 1)
    finally:
        layers.route = original
    names = [site.name for site in compiled.sites]
    for name, weights in zip(names, order[: len(names)], strict=True):
        seen.setdefault(name, []).append(weights)
    single = average_routing(compiled, [([9, 8, 7, 30], [])])
    for name in names:
        wanted = torch.cat(seen[name], dim=1).double().mean((0, 1))
        torch.testing.assert_close(single[name], wanted, atol=1e-5, rtol=1e-4)
        assert float(found[name].sum()) == pytest.approx(1, abs=1e-5)
        assert (found[name] - single[name]).abs().max() > 1e-4


def test_mixture_is_per_site(pair: tuple[Path, Path]) -> None:
    compiled = compile_checkpoint(read_checkpoint(*pair), CompileOptions(quant="none"))
    count = len(compiled.experts)
    weights = {s.name: torch.eye(count, dtype=torch.float64)[i % count] for i, s in enumerate(compiled.sites)}
    mixed, names = mix_experts(compiled, weights), list(compiled.experts)
    for index, site in enumerate(compiled.sites):
        wanted = compiled.experts[names[index % count]][site.offset : site.offset + site.width]
        assert torch.equal(mixed[site.offset : site.offset + site.width], wanted)


def test_profile_lands_in_the_bundle_and_is_compared(
    pair: tuple[Path, Path], tiny_bundle: Make, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle(*pair), tmp_path / "x.lime"))
    used = add_profile(bundle, *pair, EXAMPLES, "task", False, lambda *_: None)
    opened = Bundle.open(bundle, verify=True)
    assert 1 <= used <= len(opened.manifest.experts) - 1 and opened.manifest.experts[-1] == "task"
    rows = compare_profile(bundle, EXAMPLES, "task", lambda *_: None)
    assert [row["selection"] for row in rows][:2] == ["routed", "task"]
    assert len(rows) == 1 + len(opened.manifest.experts)
    losses = {row["selection"]: row["loss"] for row in rows}
    assert abs(losses["task"] - losses["routed"]) < np.mean(
        [abs(losses[n] - losses["routed"]) for n in opened.manifest.experts[:-1]]
    )
    with pytest.raises(LimeEdgeError, match="exists already"):
        add_profile(bundle, *pair, EXAMPLES, "task", False, lambda *_: None)


def test_other_models_and_pinned_adapters_are_refused(
    pair: tuple[Path, Path], tiny_adapter: Make, tiny_bundle: Make, tiny_model: Make, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle(*pair), tmp_path / "x.lime"))
    other = tiny_model(num_hidden_layers=1)
    with pytest.raises(LimeEdgeError, match="was not exported from"):
        add_profile(bundle, other, tiny_adapter(other), EXAMPLES, "task", False, lambda *_: None)
    pinned = tiny_adapter(pair[0])
    with pytest.raises(LimeEdgeError, match="was not exported from"):
        add_profile(bundle, pair[0], pinned, EXAMPLES, "task", False, lambda *_: None)
    assert Bundle.open(bundle).manifest.experts == tuple(f"expert{i}" for i in range(4))
    bundle = Path(shutil.copytree(tiny_bundle(pair[0], pinned), tmp_path / "pinned.lime"))
    with pytest.raises(LimeEdgeError, match="without routing"):
        add_profile(bundle, pair[0], pinned, EXAMPLES, "task", False, lambda *_: None)
