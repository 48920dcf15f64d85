"""Folding against the unfolded layer: any variant, any reference vector, any expert, any mode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lime_edge.compiler.maths.fold import run_folded, run_folded_embedding
from lime_edge.compiler.maths.layers import LimeLayer
from lime_edge.compiler.maths.route import route
from lime_edge.compiler.maths.variants import LAYER_VARIANTS, find_variant
from lime_edge.errors import LimeEdgeError

Site = dict[str, torch.Tensor]
Drawn = tuple[str, Site, float, bool]  # variant, its site, scale, on an embedding
TOLERANCE = 1e-4  # float32, relative to the largest output: p_ref * delta cancels
ROUTED_TOLERANCE = 1e-3  # the logits divide by max|h|, which a draw can make small


def make_site(
    variant: str,
    seed: int,
    inputs: int,
    outputs: int,
    rank: int,
    experts: int,
    shared: bool,
    bias: bool,
    embedding: bool,
) -> Site:
    """A random site; for embeddings `inputs` is the vocabulary and `outputs` the width."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    site = {"LiMEs": draw(experts, outputs)}
    if shared:
        site |= {"LiME_shared": draw(outputs), "gamma": draw(1)}
    if bias and not embedding:
        site["bias"] = draw(outputs)
    if variant == "slicefine":
        axis = (inputs, rank, outputs - rank)
        shapes = ((axis[0], axis[1]), (axis[0], axis[2])) if embedding else (axis[1::-1], (axis[2], axis[0]))
        return site | {"part_T": draw(*shapes[0]), "part_F": draw(*shapes[1])}
    site["weight"] = draw(inputs, outputs) if embedding else draw(outputs, inputs)
    site["A"] = draw(rank, outputs if embedding else inputs)
    site["B"] = draw(inputs if embedding and variant != "lora" else outputs, rank)
    if variant == "dora":
        site["m"] = draw(outputs).abs() + 0.1
    return site


@st.composite
def sites(draw: st.DrawFn) -> Drawn:
    embedding = draw(st.booleans())
    variant = draw(st.sampled_from(LAYER_VARIANTS))
    outputs = draw(st.integers(5, 12))
    experts, rank = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    site = make_site(
        variant,
        draw(st.integers(0, 2**31)),
        draw(st.integers(2, 9)),
        outputs,
        rank,
        experts,
        draw(st.booleans()),
        draw(st.booleans()),
        embedding,
    )
    return variant, site, draw(st.floats(0.25, 4)), embedding


def split(site: Site) -> tuple[Site, Site]:
    """Tensors that fold and tensors that make p."""
    own = ("LiMEs", "LiME_shared", "gamma")
    return {k: v for k, v in site.items() if k not in own}, {k: v for k, v in site.items() if k in own}


def make_p(site: Site, weights: torch.Tensor) -> torch.Tensor:
    p = weights @ site["LiMEs"]
    return p + site["gamma"] * site["LiME_shared"] if "gamma" in site else p


def draw_input(site: Site, embedding: bool, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    weight = site["weight"] if "weight" in site else site["part_T"]
    if embedding:
        return torch.randint(0, weight.shape[0], (2, 6), generator=random)
    return torch.randn(2, 6, weight.shape[1], generator=random)


def fold_and_evaluate(
    variant: str,
    site: Site,
    scale: float,
    embedding: bool,
    p_ref: torch.Tensor,
    x: torch.Tensor,
    p: torch.Tensor,
    pad: int | None = None,
) -> torch.Tensor:
    tensors, residual = split(site)[0], p - find_variant(variant).reference_of(p_ref)
    if embedding:
        return run_folded_embedding(find_variant(variant).fold_embedding(tensors, p_ref, scale, pad), x, residual)
    return run_folded(find_variant(variant).fold_linear(tensors, p_ref, scale), x, residual)


def check(found: torch.Tensor, expected: torch.Tensor, where: object, tolerance: float = TOLERANCE) -> None:
    error = ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()
    assert error < tolerance, f"{where}: worst output off by {error:.3g} of the largest"


@settings(max_examples=200, deadline=None)
@given(sites(), st.integers(0, 2**31))
def test_any_fold_and_any_blend_equal_the_unfolded_layer(drawn: Drawn, seed: int) -> None:
    variant, site, scale, embedding = drawn
    layer = LimeLayer(find_variant(variant), site, scale, find_variant(variant).read_routing({"top_k": 1}), embedding)
    random = torch.Generator().manual_seed(seed)
    x = draw_input(site, embedding, seed)
    p_ref = torch.randn(site["LiMEs"].shape[1], generator=random)
    raw = torch.randn(site["LiMEs"].shape[0], generator=random).softmax(0)
    layer.use(dict(enumerate(raw.tolist())))
    found = fold_and_evaluate(variant, site, scale, embedding, p_ref, x, make_p(site, raw))
    check(found, layer(x), (variant, "embedding" if embedding else "linear"))


@settings(max_examples=150, deadline=None)
@given(sites(), st.integers(0, 2**31), st.integers(1, 3), st.booleans())
def test_routing_on_a_folded_layer_equals_the_unfolded_layer(drawn: Drawn, seed: int, n_gram: int, auto: bool) -> None:
    variant, site, scale, embedding = drawn
    routing = find_variant(variant).read_routing({"top_k": 1, "n_gram": n_gram, "auto_topk": auto})
    x = draw_input(site, embedding, seed)
    p_ref = torch.randn(site["LiMEs"].shape[1], generator=torch.Generator().manual_seed(seed))
    tensors, width = split(site)[0], site["LiMEs"].shape[1]
    one, zero = torch.ones(width), torch.zeros(width)
    if embedding:
        table = find_variant(variant).fold_embedding(tensors, p_ref, scale)
        start = run_folded_embedding(table, x, one if variant == "slicefine" else zero)
        delta = run_folded_embedding(table, x, one) - start
    else:
        folded = find_variant(variant).fold_linear(tensors, p_ref, scale)
        bare = replace(folded, bias=None) if variant == "slicefine" else folded
        start = run_folded(bare, x, one if variant == "slicefine" else zero)
        delta = run_folded(bare, x, one) - start
    operands = find_variant(variant).recover_routing(start, delta, p_ref, site["LiMEs"].shape[0])
    weights = route(*operands, routing)
    found = fold_and_evaluate(variant, site, scale, embedding, p_ref, x, make_p(site, weights))
    check(found, LimeLayer(find_variant(variant), site, scale, routing, embedding)(x), variant, ROUTED_TOLERANCE)


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("variant", LAYER_VARIANTS)
def test_what_the_expert_moves_is_not_small(variant: str, embedding: bool) -> None:
    """A fold without its branch, or with another p_ref's residual, must be far from the layer."""
    site = make_site(variant, 3, 7, 9, 3, 4, True, True, embedding)
    layer = LimeLayer(find_variant(variant), site, 2.0, find_variant(variant).read_routing({}), embedding)
    layer.use(2)
    x, p_ref = draw_input(site, embedding, 5), torch.randn(9)
    p = make_p(site, torch.eye(4)[2])
    right = fold_and_evaluate(variant, site, 2.0, embedding, p_ref, x, p)
    check(right, layer(x), variant)
    neutral = torch.ones(9) if variant == "slicefine" else p_ref
    wrong = fold_and_evaluate(variant, site, 2.0, embedding, p_ref, x, neutral)
    assert (wrong - layer(x)).abs().max() > 0.1


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("variant", ["lora", "lora_fa"])
def test_original_of_gives_the_original_layer(variant: str, embedding: bool) -> None:
    site = make_site(variant, 11, 7, 9, 3, 4, True, True, embedding)
    x, p_ref = draw_input(site, embedding, 1), torch.randn(9)
    plain = (
        torch.nn.functional.embedding(x, site["weight"])
        if embedding
        else torch.nn.functional.linear(x, site["weight"], site["bias"])
    )
    found = fold_and_evaluate(variant, site, 2.0, embedding, p_ref, x, p_ref + find_variant(variant).original_of(p_ref))
    check(found, plain, variant)


@pytest.mark.parametrize("variant", ["dora", "slicefine"])
def test_no_original_where_none_exists(variant: str) -> None:
    with pytest.raises(LimeEdgeError, match=variant):
        find_variant(variant).original_of(torch.ones(4))


@pytest.mark.parametrize("variant", LAYER_VARIANTS)
def test_padding_id_is_out_of_every_experts_reach(variant: str) -> None:
    site = make_site(variant, 4, 7, 9, 3, 4, True, False, True)
    layer = LimeLayer(find_variant(variant), site, 2.0, find_variant(variant).read_routing({}), True, pad_token_id=2)
    ids, p_ref = torch.tensor([[2, 2, 0, 4, 6, 2]]), torch.randn(9)
    layer.use(1)
    p = make_p(site, torch.eye(4)[1])
    check(fold_and_evaluate(variant, site, 2.0, True, p_ref, ids, p, pad=2), layer(ids), variant)
    assert (fold_and_evaluate(variant, site, 2.0, True, p_ref, ids, p) - layer(ids)).abs().max() > 0.1


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "dora"])
def test_fold_at_the_reference_itself_needs_no_branch(variant: str) -> None:
    """d = 0 is exact in floats: the branch adds nothing at all."""
    site = make_site(variant, 8, 7, 9, 3, 4, True, True, False)
    folded = find_variant(variant).fold_linear(split(site)[0], make_p(site, torch.eye(4)[0]), 2.0)
    x = draw_input(site, False, 2)
    without = replace(folded, branch_a=None, branch_b=None)
    assert torch.equal(run_folded(folded, x, torch.zeros(9)), run_folded(without, x, torch.zeros(9)))


def test_faults_are_named_together() -> None:
    site = split(make_site("dora", 0, 7, 9, 3, 4, False, True, False))[0]
    with pytest.raises(LimeEdgeError) as fault:
        find_variant("dora").fold_linear(site | {"B": torch.ones(9, 2), "m": torch.ones(1)}, torch.ones(4), 1.0)
    for name in ("B: expected (9, 3), found (9, 2)", "m: ", "p_ref: "):
        assert name in fault.value.problem
    with pytest.raises(LimeEdgeError, match="missing: m"):
        find_variant("dora").fold_linear({k: v for k, v in site.items() if k != "m"}, torch.ones(9), 1.0)
    with pytest.raises(LimeEdgeError, match="variant"):
        find_variant("lokr").fold_linear(site, torch.ones(9), 1.0)
    with pytest.raises(LimeEdgeError, match=r"B: expected \(7, 3\)"):
        embedding = split(make_site("lora", 0, 7, 9, 3, 4, False, True, True))[0]
        find_variant("lora_fa").fold_embedding(embedding, torch.ones(9), 1.0)
