"""The canonical integers: scales both formats hold, codes from rounded scales, searches that pay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_adapter, make_model

from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths.quantize import (
    SMALLEST_SCALE,
    QuantizedTensor,
    encode,
    group_for,
    quantize,
    round_scales,
)
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.options import CompileOptions
from lime_edge.compiler.rounding.calibrate import (
    Calibration,
    Sample,
    built_in_calibration,
    read_calibration,
    render_exchange,
    vocabulary_words,
)
from lime_edge.compiler.rounding.grams import Grams, collect_grams
from lime_edge.compiler.rounding.model import list_narrow, list_units, round_by_gram, round_model, split_rows
from lime_edge.errors import LimeEdgeError


def draw(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """(rows, columns) heavy-tailed weights: a clipping search has something to gain."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=random) * torch.randn(rows, columns, generator=random).abs()


def squared(weight: torch.Tensor, tensor: QuantizedTensor) -> torch.Tensor:
    """Squared error per output row, (N,) float64."""
    return (tensor.dequantize().double() - weight.double()).square().sum(1)


def test_scales_survive_bfloat16_and_float16_bit_for_bit() -> None:
    """Over the whole range that weights can have, zero included."""
    scales = round_scales(torch.cat([torch.logspace(-12, 4.8, 4001), torch.zeros(1)]))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(scales.to(dtype).float(), scales), dtype
    assert scales.min() == SMALLEST_SCALE == torch.finfo(torch.float16).tiny


def test_scales_are_the_nearest_bfloat16() -> None:
    """Independent of torch's cast: no neighbouring 8-bit mantissa is nearer."""
    wanted = torch.logspace(-3, 3, 501)
    spacing = torch.exp2(torch.floor(torch.log2(wanted)) - 7)
    assert bool(((round_scales(wanted) - wanted).abs() <= spacing / 2).all())


def test_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(LimeEdgeError, match="beyond float16"):
        round_scales(torch.tensor([70000.0]))


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_come_from_the_rounded_scales(bits: int) -> None:
    """Every code is the best integer for the stored scale: no neighbour is nearer, unless clamped."""
    weight, (low, high) = draw(24, 64), {4: (-8, 7), 8: (-128, 127)}[bits]
    tensor = quantize(weight, bits, 32)
    assert tensor.codes.dtype == torch.int8 and tensor.codes.min() >= low and tensor.codes.max() <= high
    steps = tensor.scales.repeat_interleave(tensor.group, 1)
    error = (tensor.codes * steps - weight).abs()
    clamped = (tensor.codes == low) | (tensor.codes == high)
    assert bool((clamped | (error <= steps / 2 * (1 + 1e-6))).all())
    assert torch.equal(tensor.dequantize(), tensor.codes.float() * steps)


def test_zero_groups_have_the_smallest_scale_and_zero_codes() -> None:
    weight = draw(4, 64)
    weight[:, 32:] = 0
    for search in (False, True):
        tensor = quantize(weight, 4, 32, search=search)
        assert bool((tensor.scales[:, 1] == SMALLEST_SCALE).all())
        assert not tensor.codes[:, 32:].any() and not tensor.dequantize()[:, 32:].any()


def test_tiny_weights_keep_the_smallest_scale() -> None:
    """Below 2^-14 the scale stays and the codes shrink: no denormal is ever stored."""
    tensor = quantize(torch.full((2, 32), 2.0**-14), 4, 32)
    assert bool((tensor.scales == SMALLEST_SCALE).all()) and bool((tensor.codes == 1).all())


@pytest.mark.parametrize(("columns", "bits", "found"), [(64, 4, (4, 32)), (48, 4, (8, 48)), (64, 8, (8, 64))])
def test_width_decides_bits_and_group(columns: int, bits: int, found: tuple[int, int]) -> None:
    assert group_for(columns, bits, 32) == found
    tensor = quantize(draw(6, columns), bits, 32)
    assert (tensor.bits, tensor.group) == found
    assert tensor.scales.shape == (6, columns // found[1])


def test_packed_size() -> None:
    assert quantize(draw(8, 64), 4, 32).nbytes() == 8 * 64 // 2 + 8 * 2 * 2
    assert quantize(draw(8, 64), 8, 32).nbytes() == 8 * 64 + 8 * 2


@pytest.mark.parametrize("bits", [4, 8])
def test_search_is_never_worse_than_plain_and_often_better(bits: int) -> None:
    weight = draw(64, 256)
    plain, searched = quantize(weight, bits, 32, search=False), quantize(weight, bits, 32)
    before, after = squared(weight, plain), squared(weight, searched)
    assert bool((after <= before * (1 + 1e-6)).all()), f"worst row {int((after - before).argmax())}"
    assert after.sum() < (0.95 if bits == 4 else 1.0) * before.sum()


def test_search_finds_a_grid_that_plain_rounding_misses() -> None:
    """Weights on a grid from -8 to 6: max|w| / 7 misses it, the search returns it exactly."""
    weight = (torch.arange(32) % 15 - 8).float().repeat(3, 1) * torch.tensor([[0.5], [0.25], [2.0]])
    assert torch.equal(quantize(weight, 4, 32).dequantize(), weight)
    assert not torch.equal(quantize(weight, 4, 32, search=False).dequantize(), weight)


def test_importance_moves_the_error_off_the_columns_that_matter() -> None:
    weight, importance = draw(64, 64), torch.ones(64)
    importance[::4] = 100.0
    plain, weighted = (quantize(weight, 4, 32, importance=i).dequantize() for i in (None, importance))
    assert (weighted - weight)[:, ::4].square().sum() < 0.8 * (plain - weight)[:, ::4].square().sum()


def correlated_inputs(tokens: int, columns: int, seed: int = 1) -> torch.Tensor:
    """(T, K) inputs with few directions and one loud column, as a transformer's are."""
    random = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns // 4, columns, generator=random)
    x = torch.randn(tokens, columns // 4, generator=random) @ basis
    x += 0.3 * torch.randn(tokens, columns, generator=random)
    x[:, 3] *= 20.0
    return x


def test_round_by_gram_keeps_outputs_better_than_plain_on_seen_and_unseen_inputs() -> None:
    weight, x = draw(48, 128), correlated_inputs(512, 128)
    tensor, searched = round_by_gram(weight, x.t() @ x, 32), quantize(weight, 4, 32)
    fresh = correlated_inputs(512, 128)[256:] + 0.1 * draw(256, 128, seed=5)
    for name, inputs in (("seen", x), ("unseen", fresh)):
        lost = [((t.dequantize() - weight) @ inputs.t()).square().sum() for t in (tensor, searched)]
        assert lost[0] < 0.5 * lost[1], f"{name}: {lost[0]:.3g} against {lost[1]:.3g}"


def test_round_by_gram_of_independent_inputs_is_the_search() -> None:
    """With a diagonal gram no column can make up for another: the codes are those of plain search."""
    weight = draw(16, 96)
    tensor, searched = round_by_gram(weight, torch.eye(96), 32), quantize(weight, 4, 32)
    assert torch.equal(tensor.scales, searched.scales) and torch.equal(tensor.codes, searched.codes)


def test_round_by_gram_undoes_its_column_order() -> None:
    """A loud last column reorders everything; a gram with falling power does not: both stay in place."""
    weight = draw(16, 96)
    for power in (torch.arange(1.0, 97.0), torch.arange(96.0, 0.0, -1.0), torch.zeros(96)):
        assert torch.equal(round_by_gram(weight, power.diag(), 32).codes, quantize(weight, 4, 32).codes)


def test_round_by_gram_obeys_the_canonical_scheme() -> None:
    x = correlated_inputs(40, 128)  # fewer tokens than columns: the gram is singular
    tensor = round_by_gram(draw(8, 128), x.t() @ x, 32)
    assert tensor.codes.dtype == torch.int8 and tensor.codes.min() >= -8 and tensor.codes.max() <= 7
    assert torch.equal(tensor.scales, round_scales(tensor.scales)) and tensor.scales.shape == (8, 4)


def test_split_rows_is_the_same_matrix() -> None:
    weight = draw(24, 64)
    parts = split_rows(quantize(weight, 4, 32), [8, 16])
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), quantize(weight, 4, 32).dequantize())


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """A tiny folded float model of two layers with experts; widths that 32 divides."""
    path = tmp_path_factory.mktemp("quantize")
    model = make_model(path / "model", "llama")
    checkpoint = read_checkpoint(model, make_adapter(path / "adapter", model))
    return compile_checkpoint(checkpoint, CompileOptions(quant="none"))


def random_calibration(model: CompiledModel, seed: int, count: int = 24) -> Calibration:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 30, (count,), generator=random).tolist()
    vocab = model.decoder.vocab
    rows = [tuple(torch.randint(vocab, (length,), generator=random).tolist()) for length in lengths]
    return Calibration(tuple(Sample(row) for row in rows), "test")


def test_grams_are_those_of_one_sequence_at_a_time(folded: CompiledModel) -> None:
    """Padding and batching leave no trace: the sum equals unbatched runs of the same inputs."""
    names = list(folded.experts)
    samples = tuple(Sample(s.tokens, names[i % 2]) for i, s in enumerate(random_calibration(folded, 3, 7).samples))
    together = collect_grams(folded, DecoderModule(folded), Calibration(samples, "test"))
    apart = [collect_grams(folded, DecoderModule(folded), Calibration((sample,), "test")) for sample in samples]
    for key, gram in together.items():
        torch.testing.assert_close(gram, torch.stack([g[key] for g in apart]).sum(0), rtol=1e-4, atol=1e-3)
    assert len(together) == 4 * len(folded.decoder.layers)


def test_first_gram_is_the_embeddings(folded: CompiledModel) -> None:
    """Layer 0 reads normalised embeddings: computed here without the decoder."""
    tokens = (5, 9, 44)
    x = folded.weight("model.embed_tokens.weight")[list(tokens)]
    x = x / (x.square().mean(1, keepdim=True) + folded.decoder.norm_eps).sqrt()
    x = x * folded.vectors["model.layers.0.input_layernorm.weight"]
    found = collect_grams(folded, DecoderModule(folded), Calibration((Sample(tokens),), "test"))[0, "qkv"]
    torch.testing.assert_close(found, x.t() @ x)


def test_grams_are_taken_with_the_expert_active(folded: CompiledModel) -> None:
    one, other = (
        collect_grams(folded, DecoderModule(folded), Calibration((Sample((5, 9, 44, 7), name),), "test"))[1, "down"]
        for name in list(folded.experts)[:2]
    )
    assert (one - other).norm() > 0.01 * one.norm()


@pytest.mark.parametrize(("kinds", "share"), [(("head",), 0.95), (("head", "qkv", "down"), 0.8)])
def test_gptq_model_is_nearer_to_float_than_search(folded: CompiledModel, kinds: tuple[str, ...], share: float) -> None:
    """Logits on sequences that were not calibrated on; random q, k, v have nearly independent inputs."""
    probe = random_calibration(folded, 99, 6).samples
    calibration = random_calibration(folded, 7, 96)
    expert = torch.zeros(folded.sites.total)
    wanted = [DecoderModule(folded)(torch.tensor([s.tokens]), expert) for s in probe]
    lost = {}
    for rounding in ("nearest", "search", "gptq"):
        options, grams = CompileOptions(rounding=rounding, keep_int8=kinds), Grams()
        if rounding == "gptq":
            narrow = list_narrow(list_units(folded, options))
            grams = collect_grams(folded, DecoderModule(folded), calibration, narrow)
        weights = round_model(folded, options, grams)
        assert list(weights) == list(folded.weights)
        module = DecoderModule(replace(folded, weights=weights))
        lost[rounding] = sum(
            float((module(torch.tensor([s.tokens]), expert) - w).square().sum())
            for s, w in zip(probe, wanted, strict=True)
        )
    assert lost["gptq"] < share * lost["search"], lost


def test_sensitive_matrices_stay_int8(folded: CompiledModel) -> None:
    def search(**options: Any) -> dict[str, Any]:
        return round_model(folded, CompileOptions(rounding="search", **options), {})

    units = list_units(folded, CompileOptions())
    chosen = {name: unit.bits for unit in units for name in unit.names}
    assert chosen["model.embed_tokens.weight"] == chosen["lm_head.weight"] == 8
    for name, tensor in search().items():
        assert isinstance(tensor, QuantizedTensor) and tensor.bits == chosen[name], name
    shared = [set(unit.names) for unit in units]
    for layer in range(len(folded.decoder.layers)):
        for group in folded.groups(layer).values():  # one product, so one width of codes
            assert {f"{name}.weight" for name in group.names} in shared
    assert {t.bits for t in search(keep_int8=()).values()} == {4}
    narrow = search(keep_int8=("head",))
    assert {name for name, t in narrow.items() if t.bits == 8} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {t.bits for t in search(quant="int8").values()} == {8}
    assert list_narrow(list_units(folded, CompileOptions(quant="int8"))) == set()


def test_a_width_that_the_group_does_not_divide_is_no_narrow_unit(folded: CompiledModel) -> None:
    units = {unit.names[0]: unit for unit in list_units(folded, CompileOptions(group=64, keep_int8=()))}
    down, gate = (units[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("down", "gate"))
    assert (down.bits, gate.bits) == (8, 4)  # 96 and 64 wide
    assert (0, "down") not in list_narrow(list(units.values()))


def test_unknown_roundings_are_refused() -> None:
    with pytest.raises(LimeEdgeError, match="`rounding`: expected nearest, search, gptq, found 'best'"):
        CompileOptions(rounding="best")


def test_built_in_calibration_repeats_and_uses_the_words() -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    words = vocabulary_words({"\u0120zebra": 2, "\u0120the": 0, "apple": 1, "\u2581orange": 3, "\u0120a1b2": 4})
    assert words == ["zebra", "orange"]
    one, two = (built_in_calibration(encode, lambda u, a: f"{u}\n{a}", words, 8) for _ in range(2))
    assert one == two
    without = built_in_calibration(encode, lambda u, a: f"{u}\n{a}", [])
    assert len(one.samples) == len(without.samples) + 8
    assert all(b"zebra" in bytes(s.tokens) or b"orange" in bytes(s.tokens) for s in one.samples[-8:])


def test_exchanges_follow_the_chat_template_without_its_system_prompt() -> None:
    """A template that puts a system prompt of its own first, one that refuses such prompts, and none."""

    def default_system(messages: list[dict[str, str]]) -> str:
        first = "" if messages[0]["role"] == "system" else "<system>be kind\n"
        return first + "".join(f"<{m['role']}>{m['content']}\n" for m in messages)

    def refuses(messages: list[dict[str, str]]) -> str:
        if messages[0]["role"] == "system":
            raise ValueError("System role not supported")
        return default_system(messages).removeprefix("<system>be kind\n")

    for template in (default_system, refuses):
        assert render_exchange(template)("a", "b") == "<user>a\n<assistant>b\n"
    assert render_exchange(None)("a", "b") == "a\nb"


def test_user_calibration_is_read_or_refused_with_every_fault(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"prompt": "ab", "answer": "c", "expert": "x"}\n\n{"prompt": "d", "answer": "e"}\n')
    found = read_calibration(path, lambda t: list(t.encode()), ["x", "y"])
    assert found.samples == (Sample((97, 98, 99), "x"), Sample((100, 101))) and found.tokens == 5
    rows = ["{", json.dumps({"answer": "a"}), json.dumps({"prompt": "p", "expert": "z"}), "[]"]
    path.write_text("\n".join(rows))
    with pytest.raises(LimeEdgeError) as caught:
        read_calibration(path, lambda t: list(t.encode()), ["x", "y"])
    for part in ("line 1: not readable JSON", "line 2", "line 3: expert: expected one of x, y, found z", "line 4"):
        assert part in caught.value.problem, caught.value.problem
    path.write_text("\n")
    with pytest.raises(LimeEdgeError, match="at least one line"):
        read_calibration(path, lambda t: list(t.encode()), ["x"])


def test_encode_clamps() -> None:
    tensor = encode(torch.tensor([[100.0, -100.0] * 16]), torch.ones(1, 1), 4, 32)
    assert set(tensor.codes.flatten().tolist()) == {7, -8}
