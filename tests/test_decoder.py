"""Our own decoder against `transformers`, family by family, with and without the adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import Make
from models import ALL_LINEARS, ATTENTION, CASES, Case, draw_ids, load_model, load_sites
from torch import Tensor, nn
from torch.nn import functional as F

from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.architecture import read_decoder
from lime_edge.compiler.formats.decoder import read_decoder_backbone
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths.layers import Mode
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.model.decoder import Cache, DecoderModule
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError

DOUBLE = 1e-9  # both sides in float64, tables of cos and sin in float32 on both
SINGLE = 1e-4  # float32, absolute and relative
LENGTH, NEW = 20, 24  # every window and every original RoPE context lies inside
MODES: tuple[Mode, ...] = (None, 0, 1, 2, 3, {0: 0.7, 2: 0.5, 3: -0.2})
TARGETS = {
    "qkvo": ATTENTION,
    "qv": ("q_proj", "v_proj"),
    "k": ("k_proj",),
    "all": ALL_LINEARS,
    "gate": ("gate_proj",),
    "up-down": ("up_proj", "down_proj"),
}


def build(case: Case, tiny_model: Make, tiny_adapter: Make) -> tuple[Path, Path]:
    """The model and the adapter of a case."""
    model = tiny_model(case.family, **case.changes)
    return model, tiny_adapter(model, targets=case.targets, shared=case.shared)


def compile_plain(model: Path, adapter: Path, fold: str = "none") -> CompiledModel:
    """Compile without quantization."""
    return compile_checkpoint(read_checkpoint(model, adapter), CompileOptions(quant="none", fold=fold))


def load_double(directory: Path) -> nn.Module:
    """The `transformers` model in float64 throughout: its own norms round to float32 on the way."""
    model = load_model(directory, torch.float64)

    def normalise(norm: nn.Module, x: Tensor) -> Tensor:
        weight = norm.get_parameter("weight")
        return F.rms_norm(x, weight.shape, weight, float(vars(norm)["variance_epsilon"]))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = normalise.__get__(module)
    return model


def residual(compiled: CompiledModel, sites: Mapping[str, Mapping[str, Tensor]], mode: Mode) -> Tensor:
    """d = p - p_ref in site order, from the adapter's own tensors."""
    pieces = []
    for site in compiled.sites:
        tensors = sites[site.name]
        if mode is None:
            pieces.append(torch.zeros(site.width, dtype=torch.float64))
            continue
        weights = {mode: 1.0} if isinstance(mode, int) else mode
        assert isinstance(weights, Mapping)
        p = torch.stack([weight * tensors["LiMEs"][e].double() for e, weight in weights.items()]).sum(0)
        if "LiME_shared" in tensors:
            p = p + tensors["gamma"].double() * tensors["LiME_shared"].double()
        pieces.append(p)
    return torch.cat(pieces) - compiled.reference.double()


def excess(found: Tensor, wanted: Tensor, tolerance: float) -> float:
    """Worst |found - wanted| / (tolerance + tolerance |wanted|): above 1 is a failure."""
    assert found.shape == wanted.shape
    return float(((found - wanted).abs() / (tolerance * (1 + wanted.abs()))).max())


@pytest.mark.parametrize("name", CASES)
def test_backbone_equals_transformers_in_float64(name: str, tiny_model: Make, tiny_adapter: Make) -> None:
    directory, adapter = build(CASES[name], tiny_model, tiny_adapter)
    compiled, ids = compile_plain(directory, adapter), draw_ids(LENGTH + NEW)
    with torch.no_grad():
        wanted = load_double(directory)(ids).logits
    module = DecoderModule(compiled).double()
    found = module(ids, torch.zeros(compiled.sites.total, dtype=torch.float64))
    error = (found - wanted).abs().flatten(0, 1).amax(-1)
    assert error.max() < DOUBLE, f"{name}: {error.max():.3g}, worst at position {int(error.argmax())}"
    assert wanted.std() > 1, "logits too flat to prove anything"


@pytest.mark.parametrize("name", CASES)
def test_backbone_equals_transformers_in_float32(name: str, tiny_model: Make, tiny_adapter: Make) -> None:
    directory, adapter = build(CASES[name], tiny_model, tiny_adapter)
    compiled, ids = compile_plain(directory, adapter), draw_ids(LENGTH + NEW, seed=1)
    with torch.no_grad():
        wanted = load_model(directory)(ids).logits
    found = DecoderModule(compiled)(ids, torch.zeros(compiled.sites.total))
    assert excess(found, wanted, SINGLE) < 1, f"{name}: {(found - wanted).abs().max():.3g}"


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_and_cache_equal_transformers(name: str, tiny_model: Make, tiny_adapter: Make) -> None:
    """The prompt in one call, then one token a call, well beyond every sliding window."""
    directory, adapter = build(CASES[name], tiny_model, tiny_adapter)
    compiled, ids = compile_plain(directory, adapter), draw_ids(LENGTH, seed=2)
    module, none = DecoderModule(compiled), torch.zeros(compiled.sites.total)
    wanted = UnfoldedModel(load_model(directory), {}, {"variant": "lora"}).generate(ids, NEW)
    found = module.greedy(ids, none, NEW)
    assert found == wanted[0, LENGTH:].tolist(), name
    cache = Cache()
    pieces = [module(piece, none, cache) for piece in (wanted[:, :7], wanted[:, 7:19])]
    pieces += [module(wanted[:, i : i + 1], none, cache) for i in range(19, LENGTH + NEW)]
    whole, stepped = module(wanted, none), torch.cat(pieces, dim=1)
    assert cache.length == LENGTH + NEW
    assert excess(stepped, whole, SINGLE) < 1, f"{name}: {(stepped - whole).abs().max():.3g}"


@pytest.mark.parametrize("fold", ["shared", "none", "expert2"])
@pytest.mark.parametrize("name", CASES)
def test_adapter_equals_unfolded_model(name: str, fold: str, tiny_model: Make, tiny_adapter: Make) -> None:
    directory, adapter = build(CASES[name], tiny_model, tiny_adapter)
    check_adapter(f"{name}, fold {fold}", directory, adapter, fold)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_every_choice_of_sites(name: str, targets: str, tiny_model: Make, tiny_adapter: Make) -> None:
    directory = tiny_model(CASES[name].family, **CASES[name].changes)
    adapter = tiny_adapter(directory, targets=TARGETS[targets], shared=True, experts=3, seed=1)
    check_adapter(f"{name}, sites {targets}", directory, adapter, "shared")


def check_adapter(what: str, directory: Path, adapter: Path, fold: str) -> None:
    """Every expert, a blend and none against the unfolded layers, and that the branch is not silent."""
    sites, hyper = load_sites(adapter)
    compiled, ids = compile_plain(directory, adapter, fold), draw_ids(LENGTH, seed=3)
    module, unfolded = DecoderModule(compiled), UnfoldedModel(load_model(directory), sites, hyper)
    count = len(compiled.experts)
    for mode in (m for m in MODES if not isinstance(m, int) or m < count):
        if isinstance(mode, Mapping):
            mode = {index % count: weight for index, weight in mode.items() if index < count}
            mode[1] = 1.0 - sum(weight for index, weight in mode.items() if index != 1)
        unfolded.use(mode)
        wanted = unfolded.logits({"input_ids": ids})
        d = residual(compiled, sites, mode).float()
        found = module(ids, d)
        worst = (found - wanted).abs().max()
        assert excess(found, wanted, SINGLE) < 1, f"{what}, mode {mode}: {worst:.3g}"
        if d.abs().max() > 1e-5:  # else this expert is the folded one
            silent = module(ids, torch.zeros_like(d))
            assert excess(silent, wanted, SINGLE) > 100, f"{what}, mode {mode}: the branch changes too little"
    unfolded.restore()


@pytest.mark.parametrize("name", ["llama-tied", "mistral-window", "qwen2-sliding", "smollm3-sliding"])
def test_greedy_tokens_with_the_adapter(name: str, tiny_model: Make, tiny_adapter: Make) -> None:
    directory, adapter = build(CASES[name], tiny_model, tiny_adapter)
    sites, hyper = load_sites(adapter)
    compiled, ids = compile_plain(directory, adapter, "shared"), draw_ids(LENGTH, seed=4)
    module, unfolded = DecoderModule(compiled), UnfoldedModel(load_model(directory), sites, hyper)
    texts = set()
    for mode in MODES:
        unfolded.use(mode)
        wanted = unfolded.generate(ids, NEW)[0, LENGTH:].tolist()
        assert module.greedy(ids, residual(compiled, sites, mode).float(), NEW) == wanted, f"{name}, mode {mode}"
        texts.add(tuple(wanted))
    assert len(texts) == len(MODES), "experts too alike to tell apart"


def test_greedy_stops_at_an_end_token(tiny_model: Make, tiny_adapter: Make) -> None:
    directory, adapter = build(CASES["llama"], tiny_model, tiny_adapter)
    compiled, ids = compile_plain(directory, adapter), draw_ids(LENGTH, seed=2)
    module, none = DecoderModule(compiled), torch.zeros(compiled.sites.total)
    tokens = module.greedy(ids, none, NEW)
    end = tokens[5]
    assert module.greedy(ids, none, NEW, eos=(end,)) == tokens[: tokens.index(end)]


def test_window_and_rope_are_heard(tiny_model: Make, tiny_adapter: Make) -> None:
    """Each option changes the logits: a case that ignored it would fail above."""
    ids = draw_ids(LENGTH + NEW)
    pairs = [
        ("mistral", {"head_dim": 32}, {"sliding_window": 5}, {"sliding_window": 6}),
        ("llama", {}, CASES["llama-yarn"].changes, CASES["llama-yarn-factor"].changes),
        ("llama", {}, CASES["llama-linear"].changes, CASES["llama-llama3"].changes),
        ("smollm3", {"num_hidden_layers": 3}, {"no_rope_layers": [1, 0, 1]}, {"no_rope_layers": [1, 1, 1]}),
    ]
    for family, common, first, second in pairs:
        logits = []
        for changes in (first, second):
            directory = tiny_model(family, **{**common, **changes})
            compiled = compile_plain(directory, tiny_adapter(directory))
            logits.append(DecoderModule(compiled)(ids, torch.zeros(compiled.sites.total)))
        difference = excess(logits[0], logits[1], SINGLE)
        assert difference > 1000, f"{family}: {first} and {second} give the same logits"


@pytest.mark.parametrize("name", ["llama", "llama-llama3", "llama-yarn-factor", "qwen2-sliding", "smollm3-sliding"])
def test_config_in_the_older_spelling(name: str, tiny_model: Make, tmp_path: Path) -> None:
    """rope_theta and rope_scaling beside each other, no layer_types: as most published models have it."""
    directory = Path(shutil.copytree(tiny_model(CASES[name].family, **CASES[name].changes), tmp_path / "old"))
    wanted = read_decoder_backbone(directory).decoder
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config.pop("layer_types", None)
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert read_decoder_backbone(directory).decoder == wanted


def test_unsupported_options_are_refused_together() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", hidden_act="relu", num_attention_heads=4, num_key_value_heads=3)
    config.rope_parameters = {"rope_type": "proportional", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(LimeEdgeError) as caught:
        read_decoder(config, "model")
    for part in ("rope_type", "proportional", "hidden_act", "relu", "num_key_value_heads"):
        assert part in str(caught.value), f"{part} is not named in: {caught.value}"
