"""The Core ML package, run by the interpreter, against the torch oracle that holds the same rounded tensors."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Make
from manifests import reseal
from models import ALL_LINEARS, CASES, CONTEXT, draw_ids
from oracles import QUANTS, follow_decoder, read_residual
from test_onnx_export import BLEND, QUANTIZED, assert_integers_equal, build, compile_again, stored
from test_variants import ROUTINGS, VARIANTS, make_prompt_adapter

from lime_edge.bundle.bundle import Bundle
from lime_edge.cli.export import warn_of_overflow
from lime_edge.compiler.formats.adapter_checks import name_selection
from lime_edge.compiler.maths.routing import RoutingConfig
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.model.decoder import Cache, DecoderModule, Prefix
from lime_edge.compiler.model.multiplier import Multiplier
from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.coreml.decoder import write_decoder
from lime_edge.exporters.coreml.entry import check_options
from lime_edge.exporters.half import LIMIT, find_peak, store_as_half
from lime_edge.runtimes.coreml.interpreter import Interpreter
from lime_edge.runtimes.coreml.program import WEIGHTS, Constant, read_package
from lime_edge.runtimes.padded import plan_calls
from lime_edge.session.decoder import Session
from lime_edge.session.engines import SessionOptions
from lime_edge.session.open import open_decoder
from lime_edge.targets.entries import CoremlFacts, CoremlOptions

pytestmark = pytest.mark.check
EXACT, NATIVE = "interpreter", "interpreter-fp16"
LIMITS = {EXACT: 1e-4, NATIVE: 2e-2}  # of the largest logit, at least of 1
SELECTIONS = (None, "expert0", "expert1", "expert2", "expert3", BLEND)
LENGTH, STEPS = 37, 11  # one full enumerated length and a padded one
# every family and every turn of the graph once; each with one way of quantizing
DECODERS = {
    "llama-tied": "int4",
    "llama-yarn": "int8",
    "llama-biases": "all int4",
    "llama-head-dim": "none",
    "llama-one-kv-head": "int8",
    "llama-gelu": "none",
    "llama-gelu-tanh": "int4",
    "mistral-window-2": "int8",
    "qwen2-sliding": "int4",
    "qwen3": "int8",
    "smollm2": "all int4",
    "smollm3-sliding": "none",
    "granite": "int8",
}


def open_on(path: Path, provider: str) -> Session:
    return open_decoder(Bundle.open(path), "coreml", SessionOptions(providers=(provider,)))


def make_oracle(compiled: CompiledModel) -> DecoderModule:
    """The oracle with every float of the package rounded to float16; integers and scales are as they are."""
    module = DecoderModule(store_as_half(compiled, "Core ML"))
    for part in module.modules():
        held = [*part.banks, *part.references] if isinstance(part, Multiplier) else []
        for tensor in held + ([part.bank] if isinstance(part, Prefix) else []):
            tensor.copy_(tensor.half().float())
    return module


def residual_of(session: Session, selection: Any) -> torch.Tensor | None:
    """What the package is given for a selection; None routes."""
    return None if selection == "routed" else read_residual(session, selection).half().float()


def measure(found: np.ndarray, wanted: np.ndarray) -> float:
    """Worst difference, of the largest logit where that is above 1."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))


def check_selection(session: Session, oracle: DecoderModule, selection: Any, what: str) -> np.ndarray:
    """See follow_decoder; a routed prompt in one call."""
    ids = draw_ids(LENGTH, seed=3)[:, : 29 if selection == "routed" else LENGTH]

    def note(found: np.ndarray, wanted: np.ndarray, fed: str) -> None:
        compare(found, wanted, session.provider, f"{what}, {fed}")

    return follow_decoder(session, oracle, selection, residual_of(session, selection), ids, STEPS, note)


def compare(found: np.ndarray, wanted: np.ndarray, provider: str, what: str) -> None:
    error = measure(found, wanted)
    assert error < LIMITS[provider], f"{what}: error {error:.3g}, limit {LIMITS[provider]:g} on {provider}"


@pytest.mark.parametrize("name", DECODERS)
def test_logits_equal_the_oracle(name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """Every expert, a blend and none; prompt, padded prompt, decode with state; both modes."""
    model, adapter = build(CASES[name], tiny_model, tiny_adapter)
    how = QUANTS[DECODERS[name]]
    path = tiny_bundle(model, adapter, targets=("coreml",), **how)
    oracle = make_oracle(compile_again(model, adapter, **how))
    exact = open_on(path, EXACT)
    seen = [check_selection(exact, oracle, selection, name) for selection in SELECTIONS]
    assert min(np.abs(one - two).max() for one, two in zip(seen, seen[1:], strict=False)) > 0.1
    check_selection(open_on(path, NATIVE), oracle, "expert1", name)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_equals_the_oracle(routing: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model = tiny_model("qwen2")
    variant = VARIANTS[list(ROUTINGS).index(routing) % len(VARIANTS)]
    adapter = tiny_adapter(
        model,
        rank=6,
        experts=5,
        shared=True,
        variant=variant,
        routing=ROUTINGS[routing],
        targets=("q_proj", "v_proj", "o_proj", "up_proj"),
    )
    path = tiny_bundle(model, adapter, targets=("coreml",))
    oracle, session = make_oracle(compile_again(model, adapter, quant="none")), open_on(path, EXACT)
    routed = check_selection(session, oracle, "routed", f"{variant}, {routing}")
    pinned = check_selection(session, oracle, "expert3", f"{variant}, {routing}")
    assert np.abs(routed[:18] - pinned[:18]).max() > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_embedding_sites(variant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """The table folds, and its branch is looked up; a tied head keeps the old one."""
    model = tiny_model("llama", tie_word_embeddings=True)
    adapter = tiny_adapter(
        model,
        variant=variant,
        routing=ROUTINGS["soft"],
        rank=6,
        shared=True,
        targets=("embed_tokens", "q_proj", "o_proj"),
    )
    path = tiny_bundle(model, adapter, targets=("coreml",), fold="expert1")
    oracle = make_oracle(compile_again(model, adapter, quant="none", fold="expert1"))
    session = open_on(path, EXACT)
    for selection in ("routed", "expert0", "expert1"):
        check_selection(session, oracle, selection, variant)


@pytest.mark.parametrize("conditioning", ["static", "mean", "first", "last", "attention"])
def test_prompt_tuning(conditioning: str, tiny_model: Make, tmp_path: Path, tiny_bundle: Make) -> None:
    model = tiny_model("llama")
    hyper: dict[str, Any] = {"sparse_mode": False} | ROUTINGS["windows" if conditioning == "mean" else "auto"]
    how: dict[str, Any] = {"input_conditioned": conditioning != "static"}
    how |= {"input_conditioning_mode": conditioning} if conditioning != "static" else {}
    name = name_selection(RoutingConfig(**hyper))
    adapter = make_prompt_adapter(tmp_path / "adapter", model, routing=name, **hyper, **how)
    session = open_on(tiny_bundle(model, adapter, targets=("coreml",)), EXACT)
    assert session.max_length == CONTEXT - 5
    oracle, seen = make_oracle(compile_again(model, adapter, quant="none")), []
    for selection in ("routed", "expert0", {"expert0": 0.5, "expert2": 0.5}):
        seen.append(check_selection(session, oracle, selection, conditioning))
    assert min(np.abs(seen[0][:18] - seen[1][:18]).max(), np.abs(seen[1] - seen[2]).max()) > 0.01


@pytest.mark.small
@pytest.mark.parametrize("variant", ["lora", "slicefine"])
def test_a_single_expert_has_no_branch(variant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model = tiny_model("llama", attention_bias=True)
    adapter = tiny_adapter(model, targets=ALL_LINEARS, variant=variant)
    how: dict[str, Any] = {"fold": "expert1", "single": True, "quant": "int8"}
    path = tiny_bundle(model, adapter, targets=("coreml",), **how)
    assert not Bundle.open(path).manifest.targets["coreml"].expert_input
    check_selection(open_on(path, EXACT), make_oracle(compile_again(model, adapter, **how)), "expert1", variant)
    function = read_package(path / "coreml/model.mlpackage").functions["main"]
    assert "expert" not in function.inputs
    assert not [name for op in function.operations for name, _ in op.outputs if "lime" in name]


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_decisions_on_fifty_prompts(quant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """Exact: the likeliest token is the oracle's. Native: it is, wherever the oracle's lead is above the error."""
    model, adapter = build(CASES["llama-tied"], tiny_model, tiny_adapter)
    path = tiny_bundle(model, adapter, targets=("coreml",), quant=quant)
    oracle = make_oracle(compile_again(model, adapter, quant=quant))
    sessions = [open_on(path, provider) for provider in LIMITS]
    for seed in range(50):
        ids, selection = draw_ids(5 + seed % 30, seed), SELECTIONS[seed % len(SELECTIONS)]
        wanted = oracle(ids, residual_of(sessions[0], selection))[0].numpy()
        top = np.sort(wanted, -1)
        lead = top[:, -1] - top[:, -2]
        for session in sessions:
            session.use(selection)
            found = session.logits(ids[0].tolist())
            compare(found, wanted, session.provider, f"{quant}, prompt {seed}, {selection}")
            clear = lead > 2 * np.abs(found - wanted).max() if session.provider == NATIVE else lead >= 0
            wrong = (found.argmax(-1) != wanted.argmax(-1)) & clear
            where = f"{quant}, prompt {seed}, {selection}, {session.provider}"
            assert not wrong.any(), f"{where}: at {np.flatnonzero(wrong)}"
        assert clear.mean() > 0.5


def stacks_of(compiled: CompiledModel) -> dict[str, list[str]]:
    """Every matrix of the package by its name there -> the weights stacked in it."""
    stacks = [[compiled.head_name], ["model.embed_tokens.weight"]]
    for layer in range(len(compiled.decoder.layers)):
        for key, group in compiled.groups(layer).items():
            names = [f"{name}.weight" for name in group.names]
            alone = key == "gate_up" and compiled.group_branch(group) is None
            stacks += [[name] for name in names] if alone else [names]
    return {"_".join(names).replace(".", "_"): names for names in stacks}


@pytest.mark.parametrize(
    "name,quant",
    [
        ("llama-biases", "int4"),
        ("qwen3", "all int4"),
        ("no-block-divides", "int4"),
        ("qwen2-tied", "int8"),
        ("smollm3-sliding", "all int4"),
    ],
)
def test_the_package_holds_the_integers_of_onnx(
    name: str, quant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """Bit for bit, scales too; what the experts touch is float16, and nothing else is."""
    model, adapter = build(QUANTIZED[name], tiny_model, tiny_adapter)
    path = tiny_bundle(model, adapter, targets=("onnx", "coreml"), **QUANTS[quant])
    compiled = compile_again(model, adapter, **QUANTS[quant])
    assert_integers_equal(path, compiled, f"{name}, {quant}, onnx")
    operations = read_package(path / "coreml/model.mlpackage").functions["main"].operations
    stacks, plain = stacks_of(compiled), {}
    for op in operations:
        if op.kind == "constexpr_blockwise_shift_scale":
            wanted = [stored(compiled, part) for part in stacks.pop(op.outputs[0][0])]
            data, scale = op.inputs["data"][0], op.inputs["scale"][0]
            assert isinstance(data, Constant) and isinstance(scale, Constant) and "offset" not in op.inputs
            assert data.type == f"int{wanted[0].bits}"
            assert np.array_equal(data.array, torch.cat([t.codes for t in wanted]).numpy()), op.outputs[0][0]
            assert np.array_equal(scale.array, torch.cat([t.scales for t in wanted]).numpy()), op.outputs[0][0]
        elif op.value is not None and isinstance(op.value.array, np.ndarray):
            plain[op.outputs[0][0]] = op.value
    assert not stacks, f"not in the package: {sorted(stacks)}"
    branches = {key for key in plain if "_lime_" in key}
    assert len(branches) == 2 * len(compiled.all_branches()) and {plain[key].type for key in branches} == {"fp16"}
    targets = Bundle.open(path).manifest.targets
    assert targets["onnx"].weight_hash == targets["coreml"].weight_hash == compiled.weight_hash()


@pytest.mark.small
def test_mixed_precision_is_kept(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """int4 with the sensitive matrices at int8: each in its own width."""
    model, adapter = build(CASES["llama"], tiny_model, tiny_adapter)
    path = tiny_bundle(model, adapter, targets=("coreml",), quant="int4")
    kinds = {}
    for op in read_package(path / "coreml/model.mlpackage").functions["main"].operations:
        if op.kind == "constexpr_blockwise_shift_scale":
            (data,) = op.inputs["data"]
            assert isinstance(data, Constant)
            kinds[op.outputs[0][0]] = data.type
    assert kinds["lm_head_weight"] == "int8" and kinds["model_layers_0_self_attn_o_proj_weight"] == "int4"


# the package


def test_metadata_sizes_and_lengths(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    path = tiny_bundle(*build(CASES["llama"], tiny_model, tiny_adapter), targets=("coreml",), quant="int8")
    manifest = Bundle.open(path).manifest
    facts, package = manifest.facts_of(CoremlFacts), read_package(path / "coreml/model.mlpackage")
    files = {name: entry for name, entry in manifest.files.items() if name.startswith("coreml/")}
    assert facts.report["bytes"] == sum(entry.size for entry in files.values()) and facts.report["seconds"] > 0
    assert facts.providers == ("CoreML", "interpreter") and facts.lengths == (1, 32)
    assert package.metadata["author"] == "lime_edge" and package.metadata["license"]
    assert package.metadata["lime_edge.experts"] == ",".join(manifest.experts)
    assert package.metadata["lime_edge.fingerprint"] == manifest.backbone.fingerprint
    main = package.functions["main"]
    assert main.shapes == {"input_ids": {(1, 1), (1, 32)}}
    assert {name: kind.shape for name, kind in main.states.items()} == {
        f"{kind}_{layer}": (1, 2, CONTEXT, 16) for kind in ("keys", "values") for layer in range(2)
    }
    assert all(kind.name == "fp16" for kind in main.states.values())
    assert main.inputs["expert"].name == "fp16" and main.inputs["expert"].shape == (manifest.sites.total,)
    kinds = {op.kind for op in main.operations}
    assert not {kind for kind in kinds if "scatter" in kind}, "the cache is written without scatter"
    assert max(len(kind.shape) for op in main.operations for _, kind in op.outputs) <= 4


def test_names_are_what_core_ml_takes(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """coremltools' own sanitizer, which does not run on our programs, would change none: valid, unique, free."""
    from coremltools.converters.mil.mil.passes.defs.preprocess import NameSanitizer

    model = tiny_model("llama")
    path = tiny_bundle(model, tiny_adapter(model, routing=ROUTINGS["soft"]), targets=("coreml",))
    for function in read_package(path / "coreml/model.mlpackage").functions.values():
        sanitizer = NameSanitizer()
        names = [*function.inputs, *(name for op in function.operations for name, _ in op.outputs)]
        assert [sanitizer.sanitize_name(name) for name in names] == names, function.name


def test_the_routed_function_shares_the_weights(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model = tiny_model("llama")
    routed, plain = (tiny_adapter(model, routing=how) for how in (ROUTINGS["auto"], None))
    bundles = [tiny_bundle(model, adapter, targets=("coreml",), quant="int8") for adapter in (routed, plain)]
    sizes = [(bundle / f"coreml/model.mlpackage/{WEIGHTS}").stat().st_size for bundle in bundles]
    assert sizes[0] - sizes[1] < 0.25 * sizes[1], f"only the bank is new: {sizes}"


def test_what_the_target_cannot_hold(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    model = tiny_model("llama")
    compiled = compile_again(model, tiny_adapter(model), quant="none")
    loud = dict(compiled.vectors) | {"model.norm.weight": compiled.vectors["model.norm.weight"] * 1e6}
    with pytest.raises(LimeEdgeError, match="model.norm.weight: expected at most 65504"):
        write_decoder(replace(compiled, vectors=loud), tmp_path, CoremlOptions(), lambda *_: None)


@pytest.mark.small
@pytest.mark.parametrize(
    "options,problem,hint",
    [
        (
            CoremlOptions(compute_units="banana"),
            "`compute_units`: expected all or .* or cpu_only, found 'banana'",
            "all",
        ),
        (CoremlOptions(minimum_os="iOS17"), "`minimum_os`: expected iOS18 or macOS15, found 'iOS17'", "older ones"),
        (
            CoremlOptions(minimum_os="iOS19"),
            "`minimum_os`: expected iOS18 or macOS15, found 'iOS19'",
            "newer systems run",
        ),
        (CoremlOptions(prompt_lengths=(0, 32)), "`prompt_lengths`: expected positive integers, found '0,32'", "32,128"),
        (CoremlOptions(prompt_lengths=()), "`prompt_lengths`: expected positive integers, found ''", "32,128"),
        (CoremlOptions(max_seq_len=0), "`max_seq_len`: for Core ML expected at least 1, found 0", "1024"),
    ],
)
def test_options_are_refused_before_compiling(options: CoremlOptions, problem: str, hint: str) -> None:
    """Encoders refuse the same, but for the cache's length: they have none."""
    check_options("decoder", CoremlOptions(), "int4", 32)
    with pytest.raises(LimeEdgeError, match=problem) as caught:
        check_options("decoder", options, "int4", 32)
    assert hint in caught.value.hint and caught.value.exit_code == 2
    if options.max_seq_len < 1:
        check_options("encoder", options, "int4", 32)
        return
    with pytest.raises(LimeEdgeError, match=problem):
        check_options("encoder", options, "int4", 32)


def test_one_enumerated_length_is_a_fixed_shape(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    """--prompt-lengths 1: both functions take one token; with the cache they say what the oracle says."""
    model = tiny_model("llama")
    compiled = compile_again(model, tiny_adapter(model, routing=ROUTINGS["soft"]), quant="int8")
    options = CoremlOptions(prompt_lengths=(1,))
    assert write_decoder(compiled, tmp_path, options, lambda *_: None)["lengths"] == [1]
    package = read_package(tmp_path / "model.mlpackage")
    assert all(function.inputs["input_ids"].shape == (1, 1) for function in package.functions.values())
    runner = Interpreter(package)
    d = 0.5 * torch.randn(compiled.sites.total, generator=torch.Generator().manual_seed(1)).half().float()
    ids, state, found = draw_ids(5), runner.make_state(), []
    for place, token in enumerate(ids[0].tolist()):
        given = {"input_ids": np.array([[token]]), "position": np.array([place]), "length": np.array([1])}
        inputs = {name: x.astype(np.int32) for name, x in given.items()} | {"expert": d.numpy()}
        found.append(runner.run(inputs, state)["logits"][0])
    wanted = make_oracle(compiled)(ids, d, Cache())[0].numpy()
    compare(np.concatenate(found), wanted, EXACT, "one length")


def test_a_session_beyond_the_cache_names_the_option(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    path = tiny_bundle(*build(CASES["llama-tied"], tiny_model, tiny_adapter), targets=("coreml",), **QUANTS["int4"])
    with pytest.raises(LimeEdgeError, match=f"max_length: expected 1..{CONTEXT}, found 5000") as caught:
        open_decoder(Bundle.open(path), "coreml", SessionOptions(max_length=5000))
    assert "`max_seq_len` at export" in caught.value.hint


def test_a_routed_prompt_longer_than_every_length(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model = tiny_model("llama")
    session = open_on(tiny_bundle(model, tiny_adapter(model, routing=ROUTINGS["soft"]), targets=("coreml",)), EXACT)
    session.use("routed")
    with pytest.raises(LimeEdgeError, match="takes prompts of up to 32 tokens in one call, found 33"):
        session.logits(draw_ids(33)[0].tolist())
    session.use("expert0")
    assert session.logits(draw_ids(33)[0].tolist()).shape[0] == 33


@pytest.mark.parametrize(
    "count,plan",
    [
        (1, [1]),
        (2, [32]),
        (32, [32]),
        (33, [32, 1]),
        (40, [32, 32]),
        (70, [128]),
        (128, [128]),
        (300, [128, 128, 32, 32]),
    ],
)
def test_prompts_are_cut_into_enumerated_lengths(count: int, plan: list[int]) -> None:
    assert plan_calls(count, [1, 32, 128]) == plan


# float16's limit


def test_what_comes_near_the_limit_is_told(
    tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oracle's loudest place by name; and what `lime-edge export` says when it is beyond half of the limit."""
    model, adapter = build(CASES["llama"], tiny_model, tiny_adapter)
    compiled = compile_again(model, adapter, quant="none")
    quiet = find_peak(compiled, model)
    assert 1 < quiet.value < 1000
    weights = dict(compiled.weights)
    loud = weights["model.layers.1.self_attn.q_proj.weight"]
    assert isinstance(loud, torch.Tensor)
    weights["model.layers.1.self_attn.q_proj.weight"] = 1e5 * loud
    found = find_peak(replace(compiled, weights=weights), model)
    assert found.value > LIMIT and found.site == "layers.1.qkv output"
    path = Path(shutil.copytree(tiny_bundle(model, adapter, targets=("coreml",)), tmp_path / "x.lime"))
    warn_of_overflow(path)
    assert "warning" not in capsys.readouterr().err
    peak = {"value": 50000.0, "site": "layers.1.qkv output", "limit": LIMIT}
    reseal(path, lambda body: body["targets"][0]["report"].update(peak=peak))
    warn_of_overflow(path)
    assert "coreml: layers.1.qkv output reaches 50000, float16 ends at 65504" in capsys.readouterr().err
