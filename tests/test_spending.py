"""Bits where they matter: the probe against whole models, the choice against all choices, and an export by size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_cli import Cli

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.fields import Spending
from lime_edge.compiler.compile import compile_checkpoint, fold_checkpoint
from lime_edge.compiler.kinds import kind_of, read_checkpoint
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.options import CompileOptions
from lime_edge.compiler.rounding.budget import Candidate, spend, spread, weigh_all
from lime_edge.compiler.rounding.calibrate import Calibration, Sample
from lime_edge.compiler.rounding.probe import HEAD, TABLE, Probe
from lime_edge.compiler.rounding.spending import Budget, choose_rows, spend_bits
from lime_edge.errors import LimeEdgeError
from lime_edge.export.size import weigh_folder

Make = Callable[..., Path]


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


def weigh(rows: int, columns: int, bits: int, group: int, table: bool) -> int:
    """A target that stores scales in two bytes."""
    return rows * columns * bits // 8 + 2 * rows * columns // group


def make_text(seed: int = 0) -> Calibration:
    """Random sequences of several lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 12, (12,), generator=draw).tolist()
    rows = [torch.randint(3, 60, (length,), generator=draw).tolist() for length in lengths]
    return Calibration(tuple(Sample(tuple(row)) for row in rows), "random")


def fold(model: Path, adapter: Path) -> CompiledModel:
    """Folded as for integers, weights float32."""
    checkpoint = read_checkpoint(model, adapter)
    folded = fold_checkpoint(kind_of(checkpoint.backbone), checkpoint, CompileOptions())
    assert isinstance(folded, CompiledModel)
    return folded


def test_the_choice_is_the_best_where_all_weigh_alike_and_never_too_large() -> None:
    draw = torch.Generator().manual_seed(1)
    losses = torch.rand(8, generator=draw).tolist()
    alike = [Candidate(str(index), 10, 17, loss) for index, loss in enumerate(losses)]
    for allowed in range(80, 140):
        chosen = spend(alike, allowed)
        assert weigh_all(alike, chosen) <= allowed
        fits = [set(c) for n in range(9) for c in itertools.combinations(range(8), n) if 80 + 7 * n <= allowed]
        best = max(sum(losses[i] for i in one) for one in fits)
        assert sum(losses[int(name)] for name in chosen) == pytest.approx(best), allowed
    mixed = [Candidate("large", 100, 200, 5.0), Candidate("small", 10, 20, 1.0), Candidate("fixed", 30, 30, 9.0)]
    assert spend(mixed, 160) == {"small"}  # the large one, though it loses more, does not fit; the fixed one is at int8
    assert spend(mixed, 240) == {"large"} or weigh_all(mixed, spend(mixed, 240)) <= 240
    assert spread(mixed, 3) == [140, 195, 250]


@pytest.mark.parametrize("tied", [False, True])
def test_the_probe_hears_what_a_whole_model_says(tied: bool, tiny_model: Make, tiny_adapter: Make) -> None:
    """Other weights from some layer on: the loss of whole models, expert by expert; nothing stays behind."""
    model = tiny_model(tie_word_embeddings=tied)
    folded = fold(model, tiny_adapter(model))
    ids, real, residuals = choose_rows(folded, make_text())
    module = DecoderModule(folded)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    probe = Probe(module, ids, real, residuals)
    silent = probe.listen({})
    assert silent.same == 1.0 and silent.loss == pytest.approx(0, abs=1e-6)
    draw = torch.Generator().manual_seed(2)
    last = max(key[0] for key in module.list_readers())
    changed = {
        place: weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=draw)
        for place, weight in (
            (TABLE, module.embedding.table),
            ((last, "o"), module.list_readers()[last, "o"].get_buffer("weight")),
        )
    }
    if not tied:
        changed[HEAD] = 1.1 * module.head
    for places in [[place] for place in changed] + [list(changed)]:
        heard = probe.listen({place: changed[place] for place in places})
        other = DecoderModule(folded)
        for place in places:
            if place == TABLE:
                other.embedding.register_buffer("table", changed[place])
            if place == HEAD or (place == TABLE and tied):
                other.register_buffer("head", changed[place])
            if isinstance(place, tuple):
                other.list_readers()[place].register_buffer("weight", changed[place])
        losses, same = [], []
        for row, mask, residual in zip(ids, real, residuals, strict=True):
            exact, found = (one(row[mask][None], residual)[0].log_softmax(-1) for one in (DecoderModule(folded), other))
            losses.append((exact.exp() * (exact - found)).sum(-1))
            same.append(exact.argmax(-1) == found.argmax(-1))
        assert heard.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-3), places
        assert heard.same == pytest.approx(float(torch.cat(same).float().mean())) and heard.loss > 1e-4, places
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    assert probe.listen({}).loss == pytest.approx(0, abs=1e-6)


def test_integers_are_those_of_the_widths_chosen(tiny_model: Make, tiny_adapter: Make) -> None:
    """Every matrix is the all-int4 model's or the all-int8 model's; a size in between keeps to it; more is nearer."""
    model = tiny_model()
    adapter, text = tiny_adapter(model), make_text()
    checkpoint = read_checkpoint(model, adapter)
    narrow = compile_checkpoint(checkpoint, CompileOptions(keep_int8=()), text).weights
    wide = compile_checkpoint(checkpoint, CompileOptions(quant="int8", rounding="search"), text).weights
    folded = fold(model, adapter)
    sizes = [sum(t.nbytes() for t in part.values() if isinstance(t, QuantizedTensor)) for part in (narrow, wide)]
    heard = []
    for share in (0.0, 0.4, 1.0):
        allowed = int(sizes[0] + share * (sizes[1] - sizes[0]))
        spent = spend_bits(folded, CompileOptions(size=1), text, Budget(allowed, weigh))
        total = sum(stored.nbytes() for stored in spent.weights.values())
        assert total <= allowed and total == spent.report["chosen"]
        assert list(spent.weights) == list(folded.weights)
        for name, stored in spent.weights.items():
            like = (wide if name in spent.report["int8"] or stored.bits == 8 else narrow)[name]
            assert isinstance(like, QuantizedTensor)
            if name == folded.head_name and stored.bits == 4:  # by what the head reads, which no other export sums
                assert stored.group == like.group and not torch.equal(stored.codes, like.codes)
                continue
            assert torch.equal(stored.codes, like.codes) and torch.equal(stored.scales, like.scales), name
        assert (
            (share > 0) == bool(spent.report["int8"])
            and 0 < share < 1
            or len(set(spent.report["int8"]))
            in (
                0,
                len(folded.weights),
            )
        )
        heard.append(next(p["loss"] for p in spent.report["curve"] if p["bytes"] == total))
        assert all(a["bytes"] < b["bytes"] for a, b in itertools.pairwise(spent.report["curve"]))
    assert heard[0] > heard[1] > heard[2]
    bits = spend_bits(folded, CompileOptions(bits=6.0), text, Budget(None, weigh)).report["bits"]
    assert 5 < bits <= 6


def read_spending(path: Path) -> Spending:
    """What lime.json says of it."""
    found = Bundle.open(path).manifest.quantization.spending
    assert found is not None
    return found


def test_an_export_keeps_to_its_size_and_shows_the_curve(
    lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path
) -> None:
    words = ("export", tiny_model(), "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime", "--force")
    least = lime.refuse(*words, "--size", "1kB")
    assert "--size" in least and not (tmp_path / "x.lime").exists()
    size = next(word for word in least.split() if word.endswith("MB"))
    done = lime(*words, "--size", size)
    assert done.code == 0, done
    spending = read_spending(tmp_path / "x.lime")
    assert weigh_folder(tmp_path / "x.lime") <= spending.chosen <= float(size[:-2]) * 1e6
    row = next(line for line in (done.out + done.err).splitlines() if line.startswith(">"))
    assert f"{spending.chosen / 1e6:.1f} MB" in row and "#" in row
    counts = {}
    for bits in ("5.5", "7"):
        assert lime(*words, "--bits", bits).code == 0
        more = read_spending(tmp_path / "x.lime")
        counts[bits] = len(more.int8)
        assert float(bits) - 1 < more.bits <= float(bits)
    assert 0 < counts["5.5"] < counts["7"]
    matrices = Bundle.open(tmp_path / "x.lime").manifest.quantization.matrices
    assert matrices["int8"] == len(more.int8) and matrices["int4"] > 0
    assert lime("verify", tmp_path / "x.lime").code == 0


def test_what_goes_with_no_size_is_refused(lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    words = ("export", tiny_model(), "--adapter", tiny_adapter(), "-o", tmp_path / "x.lime")
    for more, expected in {
        ("--size", "9MB", "--bits", "5"): "--size and --bits",
        ("--size", "9MB", "--quant", "int8"): "--quant int4",
        ("--bits", "5", "--keep-int8", "head"): "--bits and --keep-int8",
        ("--bits", "-1"): "more than 0",
        ("--bits", "3"): "at least",
        ("--size", "small"): "expected bytes, kB, MB or GB",
        ("--size", "9MB", "--no-tokenizer"): "tokenizer",
    }.items():
        assert expected in lime.refuse(*words, *more), more
        assert not (tmp_path / "x.lime").exists(), more
    with pytest.raises(LimeEdgeError, match="language model"):
        spend_bits(fold(tiny_model(), tiny_adapter()), CompileOptions(size=9), None, Budget(9, weigh))
