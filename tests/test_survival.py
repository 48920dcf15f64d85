"""Fold survival: the figures against the definition in full, and what export says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from models import EMBEDDING
from test_cli import Cli

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.fields import KindSurvival, Survival
from lime_edge.checks.inspect import find_losses
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths.quantize import quantize
from lime_edge.compiler.options import CompileOptions
from lime_edge.compiler.rounding.survival import measure_site

Make = Callable[..., Path]


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_gram", [False, True])
def test_figures_are_those_of_the_definition(with_gram: bool) -> None:
    """Expert by expert, on explicit inputs: ||(found - exact) x|| / ||exact x||."""
    original, product, p_ref = draw(24, 32), 0.1 * draw(24, 32, seed=1), 1 + draw(24, seed=2)
    experts = {"one": 1 + draw(24, seed=3), "two": draw(24, seed=4)}
    folded = original + p_ref[:, None] * product
    stored = quantize(folded, 4, 32).dequantize() - quantize(original, 4, 32).dequantize()
    x = draw(32, 200, seed=5) * torch.linspace(0.1, 3, 32)[:, None] if with_gram else torch.eye(32)
    residuals = {name: p - p_ref for name, p in experts.items()}
    gram = x @ x.t() if with_gram else None
    error, kept = measure_site(stored, original, folded, product, residuals, gram)
    for name, p in experts.items():
        exact = p[:, None] * product @ x
        found = (stored + residuals[name][:, None] * product) @ x
        assert error[name] == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-3)
        assert kept[name] == pytest.approx(float((found * exact).sum() / exact.square().sum()), rel=1e-3)
    assert error["one"] > 0.05  # the comparison above was not between zeros


def test_exact_weights_lose_nothing_and_lost_ones_everything() -> None:
    original, product = draw(8, 16), draw(8, 16, seed=1)
    folded, d = original + product, {"e": torch.zeros(8)}
    error, kept = measure_site(folded - original, original, folded, product, d)
    assert error["e"] == pytest.approx(0, abs=1e-3) and kept["e"] == pytest.approx(1)
    error, kept = measure_site(torch.zeros(8, 16), original, folded, product, d)
    assert error["e"] == pytest.approx(1) and kept["e"] == pytest.approx(0, abs=1e-6)
    assert measure_site(folded - original, original, original, product, d) == ({}, {})  # no effect, no figure


def read_survival(path: Path) -> Survival:
    """What lime.json says of it."""
    found = Bundle.open(path).manifest.quantization.survival
    assert found is not None
    return found


def test_export_writes_it_down(tiny_bundle: Make) -> None:
    def kinds(**options: object) -> dict[str, KindSurvival]:
        return read_survival(tiny_bundle(**options)).kinds

    coarse, fine = kinds(quant="int4", rounding="search", keep_int8=()), kinds(quant="int8")
    assert set(coarse) == set(fine) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for kind in coarse:
        assert 0 < fine[kind].error < coarse[kind].error <= coarse[kind].worst_error, kind
        assert fine[kind].kept == pytest.approx(1, abs=0.02), kind
    unfolded = kinds(quant="int4", rounding="search", fold="none")
    assert all(facts.error == pytest.approx(0, abs=1e-3) for facts in unfolded.values())
    assert Bundle.open(tiny_bundle(quant="none")).manifest.quantization.survival is None


def test_export_shows_it_and_warns(
    lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("export", tiny_model(), "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime", "--force")
    done = lime(*words, "--rounding", "search", "--keep-int8", "none", "--sites")
    survival = read_survival(tmp_path / "x.lime")
    site = "model.layers.1.self_attn.k_proj"
    row = next(line for line in done.out.splitlines() if site in line)
    assert f"{survival.sites[site].error:.2f}" in row and survival.sites[site].expert in row
    row = next(line for line in done.out.splitlines() if "k_proj" in line and "int4" in line)
    assert f"{survival.kinds['k_proj'].error:.2f}" in row
    assert "warning" not in done.err
    monkeypatch.setattr("lime_edge.checks.inspect.LOUD", survival.kinds["k_proj"].error - 1e-6)
    done = lime(*words, "--rounding", "search", "--keep-int8", "none", "--json")
    assert done.code == 0 and "k_proj (int4): the rounding is" in done.err and "hint: " in done.err
    assert json.loads(done.out)["quantization"]["survival"] == json.loads(msgspec.json.encode(survival))


def test_losses_are_named_where_they_are() -> None:
    def facts(error: float, kept: float) -> KindSurvival:
        return KindSurvival(
            sites=1, bits=(4,), error=error, worst_error=error, worst_site="x", kept=kept, worst_kept=kept
        )

    kinds = {"q_proj": facts(1.5, 0.9), "k_proj": facts(0.5, 0.99), "v_proj": facts(0.8, 0.5)}
    found = find_losses(Survival(kinds=kinds, sites={}))
    assert len(found) == 2
    assert found[0].startswith("q_proj (int4): the rounding is 1.5 times") and "50%" in found[1]
    assert find_losses(None) == []


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_table_is_measured_column_by_column(
    variant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """An adapted embedding in a quantized bundle: every id an input of its own, the outputs those of its row."""
    model = tiny_model(tie_word_embeddings=True)
    adapter = tiny_adapter(model, targets=("embed_tokens", "q_proj"), variant=variant)
    exact, off = (
        compile_checkpoint(read_checkpoint(model, adapter), CompileOptions(quant=quant)) for quant in ("none", "int8")
    )
    table = f"{EMBEDDING}.weight"
    noise = off.weight(table) - exact.weight(table) - (off.weight("lm_head.weight") - exact.weight("lm_head.weight"))
    worst = 0.0
    branch = exact.branches[EMBEDDING]
    assert branch.a is not None and branch.b is not None
    site = exact.sites.find(EMBEDDING)
    assert site is not None
    for vector in exact.experts.values():
        p_ref, p = (flat[site.offset : site.offset + site.width] for flat in (exact.reference, vector))
        moved = exact.weight(table) - exact.weight("lm_head.weight") + (p - p_ref) * (branch.a @ branch.b.t())
        worst = max(worst, float(noise.norm() / moved.norm()))
    found = read_survival(tiny_bundle(model, adapter, quant="int8"))
    assert found.sites[EMBEDDING].error == pytest.approx(worst, rel=0.02)
    assert found.kinds["embed_tokens"].sites == 1
