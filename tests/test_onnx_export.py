"""The ONNX export against `transformers` and the unfolded layers, and its integers against the compiler's."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import Make
from manifests import reseal
from models import ALL_LINEARS, CASES, CONTEXT, Case, draw_ids, load_model, load_sites
from onnx import numpy_helper

import lime_edge
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths.layers import Mode
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.compiled import CompiledModel
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.calibration import find_calibration
from lime_edge.exporters.onnx.weights import unpack_codes
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions

TOLERANCE = 1e-4  # absolute and relative
LENGTH, NEW = 20, 24  # beyond every window of CASES
BLEND = {"expert0": 0.7, "expert2": 0.5, "expert3": -0.2}
SELECTIONS = (None, "expert0", "expert1", "expert2", "expert3", BLEND)
FOLDS = ("shared", "none", "expert2")
QUANTIZED = {
    "llama-biases": CASES["llama-biases"],
    "llama-tied": CASES["llama-tied"],
    "qwen2": CASES["qwen2"],
    "qwen2-tied": CASES["qwen2-tied"],
    "qwen3": CASES["qwen3"],
    "smollm3-sliding": CASES["smollm3-sliding"],
    "group-does-not-divide": Case(
        "llama", {"hidden_size": 80, "head_dim": 16, "tie_word_embeddings": True}, ALL_LINEARS
    ),
    "no-block-divides": Case(
        "llama",
        {"hidden_size": 72, "head_dim": 16, "intermediate_size": 100, "tie_word_embeddings": True, "vocab_size": 311},
        ALL_LINEARS,
    ),
    "no-block-divides-untied": Case("qwen2", {"hidden_size": 72, "head_dim": 16, "vocab_size": 301}),
}


def build(case: Case, tiny_model: Make, tiny_adapter: Make) -> tuple[Path, Path]:
    """The model and the adapter of a case."""
    model = tiny_model(case.family, **case.changes)
    return model, tiny_adapter(model, targets=case.targets, shared=case.shared)


def open_session(bundle: Path) -> Session:
    return lime_edge.open_decoder(bundle, threads=1)


def to_mode(selection: Any) -> Mode:
    """A session's selection as the unfolded reference takes it."""
    if selection is None:
        return None
    if isinstance(selection, str):
        return int(selection.removeprefix("expert"))
    return {int(name.removeprefix("expert")): weight for name, weight in selection.items()}


@cache
def unfold(model: Path, adapter: Path) -> UnfoldedModel:
    """`transformers` with unfolded LiME layers; None gives the original model."""
    sites, hyper = load_sites(adapter)
    return UnfoldedModel(load_model(model), sites, hyper)


@cache
def reference_logits(model: Path, adapter: Path, selection: str | None, seed: int) -> np.ndarray:
    """(LENGTH, V) logits of the unfolded reference; `selection` as text so that it can be remembered."""
    unfolded = unfold(model, adapter)
    unfolded.use(to_mode(BLEND if selection == "blend" else selection))
    return unfolded.logits({"input_ids": draw_ids(LENGTH, seed)})[0].numpy()


def wanted_logits(model: Path, adapter: Path, selection: Any, seed: int = 0) -> np.ndarray:
    return reference_logits(model, adapter, "blend" if isinstance(selection, Mapping) else selection, seed)


def excess(found: np.ndarray, wanted: np.ndarray) -> float:
    """Worst |found - wanted| / (TOLERANCE + TOLERANCE |wanted|): above 1 is a failure."""
    assert found.shape == wanted.shape
    return float((np.abs(found - wanted) / (TOLERANCE * (1 + np.abs(wanted)))).max())


def assert_close(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    worst = np.unravel_index(np.abs(found - wanted).argmax(), wanted.shape)
    assert excess(found, wanted) < 1, f"{what}: {found[worst]:.6g}, expected {wanted[worst]:.6g} at {worst}"


def ids_of(count: int, seed: int = 0) -> list[int]:
    return draw_ids(count, seed)[0].tolist()


# float32: the unfolded reference


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_unfolded_model(
    name: str, fold: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """Every expert, a blend and none; and without the branch the comparison fails."""
    model, adapter = build(CASES[name], tiny_model, tiny_adapter)
    session = open_session(tiny_bundle(model, adapter, fold=fold))
    for selection in SELECTIONS:
        wanted = wanted_logits(model, adapter, selection)
        session.use(selection)
        assert_close(session.logits(ids_of(LENGTH)), wanted, f"{name}, fold {fold}, {selection}")
        if selection != fold and (fold, selection) != ("none", None):
            silent = np.zeros(session.bundle.manifest.sites.total, np.float32)
            session._engine.set_expert(silent)
            gone = excess(session.logits(ids_of(LENGTH)), wanted)
            assert gone > 100, f"{name}, fold {fold}, {selection}: without the branch only {gone:.3g}"
            session.use(None if selection is not None else "expert0")  # binds anew


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3", "llama-gelu"])
def test_single_expert_has_no_branch(name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(CASES[name], tiny_model, tiny_adapter)
    bundle = tiny_bundle(model, adapter, fold="expert1", single=True)
    found = open_session(bundle).logits(ids_of(LENGTH))
    assert_close(found, wanted_logits(model, adapter, "expert1"), f"{name}, single")
    graph = onnx.load(bundle / "onnx/model.onnx", load_external_data=False).graph
    assert "expert" not in [value.name for value in graph.input]
    assert not [node.name for node in graph.node if "lime" in node.name]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj",), ("up_proj", "o_proj"), ("gate_proj",)])
@pytest.mark.parametrize("quant", ["none", "int4"])
def test_gaps_between_sites(
    targets: tuple[str, ...], quant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """A member of q, k, v or gate, up that is no site keeps its output, whatever the expert."""
    model = tiny_model("qwen2", **CASES["qwen2"].changes)
    adapter = tiny_adapter(model, targets=targets, shared=True, seed=2)
    bundle = tiny_bundle(model, adapter, quant=quant)
    if quant == "none":
        session = open_session(bundle)
        for selection in SELECTIONS:
            session.use(selection)
            wanted = wanted_logits(model, adapter, selection)
            assert_close(session.logits(ids_of(LENGTH)), wanted, f"{targets}, {selection}")
    else:
        compiled = compile_again(model, adapter, quant=quant)
        assert_integers_equal(bundle, compiled, f"{targets}")


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """With caches on both sides, past every window, for the original model and an expert."""
    model, adapter = build(CASES[name], tiny_model, tiny_adapter)
    session, options = open_session(tiny_bundle(model, adapter)), GenerationOptions(NEW, ignore_eos=True)
    unfolded, ids = unfold(model, adapter), draw_ids(LENGTH, seed=2)
    for selection in (None, "expert3", BLEND):
        unfolded.use(to_mode(selection))
        wanted = unfolded.generate(ids, NEW)[0, LENGTH:].tolist()
        session.use(selection)
        found = list(session.generate_ids(ids[0].tolist(), options))
        assert found == wanted, f"{name}, {selection}"


@pytest.mark.parametrize("name", CASES)
def test_decode_step_by_step_equals_one_call(
    name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """Prompt, then token by token to the end of the context: the reference sees it in one call."""
    model, adapter = build(CASES[name], tiny_model, tiny_adapter)
    ids, session = draw_ids(CONTEXT, seed=3), open_session(tiny_bundle(model, adapter))
    unfolded = unfold(model, adapter)
    unfolded.use(1)
    wanted = unfolded.logits({"input_ids": ids})[0].numpy()
    session.use("expert1")
    rows = [session.logits(ids[0, :9].tolist())]
    rows += [session.extend([int(token)]).copy() for token in ids[0, 9:]]
    assert_close(np.concatenate(rows), wanted, name)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "mistral-window-2", "qwen3-sliding", "smollm3-sliding"])
@pytest.mark.parametrize("chunk", [5, 19])
def test_prompt_in_chunks(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    model, adapter = build(CASES[name], tiny_model, tiny_adapter)
    session = open_session(tiny_bundle(model, adapter))
    session.use("expert0")
    monkeypatch.setattr("lime_edge.session.chunks.CHUNK", chunk)
    wanted = wanted_logits(model, adapter, "expert0")
    assert_close(session.logits(ids_of(LENGTH)), wanted, f"{name}, chunks of {chunk}")
    assert_close(session.logits(ids_of(LENGTH), keep=1), wanted[-1:], f"{name}, chunks of {chunk}, last row")


@pytest.mark.parametrize("keep", [1, 2, 7, LENGTH])
def test_last_positions_only(keep: int, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(CASES["llama"], tiny_model, tiny_adapter)
    session = open_session(tiny_bundle(model, adapter))
    session.use("expert0")
    wanted = wanted_logits(model, adapter, "expert0")[-keep:]
    assert_close(session.logits(ids_of(LENGTH), keep=keep), wanted, f"keep {keep}")


def test_last_positions_across_chunks(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    model, adapter = build(CASES["llama"], tiny_model, tiny_adapter)
    session = open_session(tiny_bundle(model, adapter))
    session.use("expert0")
    monkeypatch.setattr("lime_edge.session.chunks.CHUNK", 6)
    wanted = wanted_logits(model, adapter, "expert0")[-9:]
    assert_close(session.logits(ids_of(LENGTH), keep=9), wanted, "keep 9, chunks of 6")


def test_one_site_alone(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """The whole expert input is one slice."""
    model = tiny_model("llama")
    adapter = tiny_adapter(model, targets=("model.layers.1.mlp.down_proj",))
    session = open_session(tiny_bundle(model, adapter))
    for selection in SELECTIONS:
        session.use(selection)
        assert_close(session.logits(ids_of(LENGTH)), wanted_logits(model, adapter, selection), str(selection))


@pytest.mark.parametrize("name", ["llama-yarn", "mistral-window"])
def test_long_prompt(name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """Longer than a chunk and than attention's tiles, with a window that starts inside both."""
    changes = {**CASES[name].changes, "max_position_embeddings": 1024}
    if "sliding_window" in changes:
        changes["sliding_window"] = 137
    model = tiny_model(CASES[name].family, **changes)
    adapter, ids = tiny_adapter(model), draw_ids(700, seed=8)
    unfolded, session = unfold(model, adapter), open_session(tiny_bundle(model, adapter))
    unfolded.use(1)
    session.use("expert1")
    wanted = unfolded.logits({"input_ids": ids})[0].numpy()
    found = session.logits(ids[0, :690].tolist())
    rows = [session.extend([int(token)]).copy() for token in ids[0, 690:]]
    assert_close(np.concatenate([found, *rows]), wanted, name)


# head widths that the fused rotation refuses: the rotation is an operator of its own


WIDE = {"hidden_size": 96, "max_position_embeddings": CONTEXT}
ROTATED_APART = {
    "llama-24": Case("llama", {**WIDE, "head_dim": 24, "num_key_value_heads": 1}, ALL_LINEARS, shared=True),
    "mistral-window-40": Case("mistral", {**WIDE, "head_dim": 40, "sliding_window": 5}),
    "qwen3-8": Case("qwen3", {**WIDE, "head_dim": 8}, ALL_LINEARS),
    "smollm3-72": Case("smollm3", {**WIDE, "head_dim": 72, "no_rope_layers": [1, 0, 1], "num_hidden_layers": 3}),
}


@pytest.mark.parametrize("name", ROTATED_APART)
def test_rotation_as_an_operator_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """Whole prompt, prompt in chunks, and token by token to the end of the context."""
    case = ROTATED_APART[name]
    model, adapter = build(case, tiny_model, tiny_adapter)
    bundle, ids = tiny_bundle(model, adapter), draw_ids(CONTEXT, seed=3)
    session, unfolded = open_session(bundle), unfold(model, adapter)
    unfolded.use(1)
    session.use("expert1")
    wanted = unfolded.logits({"input_ids": ids})[0].numpy()
    assert_close(session.logits(ids[0].tolist()), wanted, f"{name}, whole")
    rows = [session.logits(ids[0, :9].tolist())]
    rows += [session.extend([int(token)]).copy() for token in ids[0, 9:]]
    assert_close(np.concatenate(rows), wanted, f"{name}, token by token")
    monkeypatch.setattr("lime_edge.session.chunks.CHUNK", 7)
    assert_close(session.logits(ids[0].tolist()), wanted, f"{name}, in chunks")
    found, _ = count_operators(bundle)
    layers = case.changes.get("num_hidden_layers", 2)
    turned = sum(case.changes.get("no_rope_layers", [1] * layers))
    assert (found["RotaryEmbedding"], found["GroupQueryAttention"]) == (2 * turned, layers)


def test_rotation_of_its_own_in_a_batch_padded_on_the_right(
    tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """As another program runs it: prompts of two lengths, and a step after them at the places that follow each."""
    model, adapter = build(ROTATED_APART["llama-24"], tiny_model, tiny_adapter)
    engine = ort.InferenceSession(
        tiny_bundle(model, adapter, fold="expert2") / "onnx/model.onnx", providers=["CPUExecutionProvider"]
    )
    unfolded, lengths, room = unfold(model, adapter), (12, 7), 13
    unfolded.use(2)
    rows = [draw_ids(length + 1, seed) for seed, length in enumerate(lengths)]
    wanted = [unfolded.logits({"input_ids": row})[0].numpy() for row in rows]
    prompt, mask = np.zeros((2, max(lengths)), np.int64), np.zeros((2, max(lengths)), np.int64)
    for index, length in enumerate(lengths):
        prompt[index, :length], mask[index, :length] = rows[index][0, :length], 1
    state = {
        value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
        for value in engine.get_inputs()
        if value.name.startswith("past_key_values")
    }
    names = [value.name for value in engine.get_outputs()]
    ours = give_defaults(engine)
    feeds = {"input_ids": prompt, "attention_mask": mask} | ours | state
    outputs = dict(zip(names, engine.run(None, feeds), strict=True))
    for index, length in enumerate(lengths):
        assert_close(outputs["logits"][index, :length], wanted[index][:length], f"prompt of {length}")
    state = {
        name.replace("present", "past_key_values"): np.pad(value, ((0, 0), (0, 0), (0, room - value.shape[2]), (0, 0)))
        for name, value in outputs.items()
        if name != "logits"
    }
    step = np.array([[int(row[0, -1])] for row in rows])
    mask = np.array([[1] * (length + 1) + [0] * (room - length - 1) for length in lengths])
    (logits, *_) = engine.run(["logits"], {"input_ids": step, "attention_mask": mask} | ours | state)
    for index, length in enumerate(lengths):
        assert_close(logits[index], wanted[index][length:], f"step after {length}")


def give_defaults(engine: ort.InferenceSession) -> dict[str, np.ndarray]:
    """The inputs of ours: the folded expert, all logits."""
    sizes = {value.name: value.shape for value in engine.get_inputs()}
    return {"expert": np.zeros((1, sizes["expert"][1]), np.float32), "logits_to_keep": np.zeros(1, np.int64)}


# the graph


@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3-sliding"])
@pytest.mark.parametrize("quant", ["none", "int4"])
def test_names_are_those_of_onnxruntime_genai(
    name: str, quant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """What its decoder-only pipeline binds, and two inputs more, which both have a default in its graph only."""
    bundle = tiny_bundle(*build(CASES[name], tiny_model, tiny_adapter), quant=quant, companions=("genai",))
    pinned = onnx.load(bundle / "onnx/model.onnx", load_external_data=False).graph
    assert not {value.name for value in pinned.input} & {tensor.name for tensor in pinned.initializer}
    graph = onnx.load(bundle / "onnx/genai.onnx", load_external_data=False).graph
    assert [value.name for value in graph.input] == [value.name for value in pinned.input]
    layers = range(CASES[name].changes.get("num_hidden_layers", 2))
    past = {f"past_key_values.{layer}.{kind}" for layer in layers for kind in ("key", "value")}
    defaults = {tensor.name for tensor in graph.initializer}
    needed = [value.name for value in graph.input if value.name not in defaults]
    assert sorted(needed) == sorted({"input_ids", "attention_mask"} | past)
    assert {value.name for value in graph.input} - set(needed) == {"expert", "logits_to_keep"}
    present = {name.replace("past_key_values", "present") for name in past}
    assert sorted(value.name for value in graph.output) == sorted({"logits"} | present)


def test_without_the_runtime_caches_that_grow_and_a_batch(
    tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """As another program runs it: two rows, separate past and present."""
    model, adapter = build(CASES["qwen2-sliding"], tiny_model, tiny_adapter)
    engine = ort.InferenceSession(
        tiny_bundle(model, adapter, fold="expert2") / "onnx/model.onnx", providers=["CPUExecutionProvider"]
    )
    ids = torch.cat([draw_ids(LENGTH, 5), draw_ids(LENGTH, 6)])
    unfolded = unfold(model, adapter)
    unfolded.use(2)  # the folded expert: what a zero residual means
    wanted = unfolded.logits({"input_ids": ids}).numpy()
    names = [value.name for value in engine.get_outputs()]
    state = {
        value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
        for value in engine.get_inputs()
        if value.name.startswith("past_key_values")
    }
    parts, done = [], 0
    for count in (8, *[1] * (LENGTH - 8)):
        inputs = {
            "input_ids": ids[:, done : done + count].numpy(),
            "attention_mask": np.ones((2, done + count), np.int64),
        }
        outputs = dict(zip(names, engine.run(None, inputs | give_defaults(engine) | state), strict=True))
        parts.append(outputs.pop("logits"))
        state = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        done += count
    assert_close(np.concatenate(parts, axis=1), wanted, "batch of two")


@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("name", CASES)
def test_fused_operators(name: str, quant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """One attention and two fused norms a layer; one product and one branch for each shared input.

    A branch is one call of a function, and those after attention and the gated layer take the norm with them.
    """
    case = CASES[name]
    model, adapter = build(case, tiny_model, tiny_adapter)
    found, inside = count_operators(tiny_bundle(model, adapter, quant=quant, keep_int8=()))
    layers = case.changes.get("num_hidden_layers", 2)
    groups = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"o_proj"}, {"down_proj"}]
    whole = [layers * (group <= set(case.targets)) for group in groups]
    gapped = sum(layers * bool(group & set(case.targets)) for group in groups) - sum(whole)
    branches = {
        "ExpertRowsBranch": sum(whole[:2]),
        "GappedExpertRowsBranch": gapped,
        "ExpertRowsBranchNorm": sum(whole[2:]),
    }
    silu = "hidden_act" not in case.changes
    products, norms = 4 * layers + 1, 1 + (2 * layers if case.family == "qwen3" else 0)
    wanted = branches | {
        "GroupQueryAttention": layers,
        "SwiGLU": layers * silu,
        "Gelu": layers * (not silu),
        "QuickGelu": 0,
        "SkipSimplifiedLayerNormalization": 2 * layers - branches["ExpertRowsBranchNorm"],
        "SimplifiedLayerNormalization": norms,
    }
    tied = case.changes.get("tie_word_embeddings", False)
    if quant == "none":
        wanted |= {"MatMulNBits": 0, "FusedMatMul": int(tied), "MatMul": products - tied}
    else:
        wanted |= {"MatMulNBits": products, "FusedMatMul": 0, "MatMul": 0, "GatherBlockQuantized": 1}
    wrong = {op: (found[op], count) for op, count in wanted.items() if found[op] != count}
    assert not wrong, f"{name}, {quant}: operator: (found, expected): {wrong}"
    called = {op for op, count in (branches | {"SwiGLU": silu}).items() if count}
    assert set(inside) == called, f"{name}, {quant}: functions {set(inside)}, called {called}"
    for op, nodes in inside.items():
        assert nodes["MatMul"] == 2 * (op != "SwiGLU"), f"{op}: {nodes}"
        assert nodes["SkipSimplifiedLayerNormalization"] == (op == "ExpertRowsBranchNorm"), f"{op}: {nodes}"


def count_operators(bundle: Path) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Nodes by type: of the graph, and of each function in the file."""
    model = onnx.load(bundle / "onnx/model.onnx", load_external_data=False)
    inside = {function.name: Counter(node.op_type for node in function.node) for function in model.functions}
    return Counter(node.op_type for node in model.graph.node), inside


# quantized: the compiler's integers and the torch oracle


QUANTS: dict[str, dict[str, Any]] = {
    "int4": {"quant": "int4"},
    "all int4": {"quant": "int4", "keep_int8": ()},
    "int8": {"quant": "int8"},
}


def compile_again(model: Path, adapter: Path, **changes: Any) -> CompiledModel:
    """What the export compiled, calibration included."""
    checkpoint, options = read_checkpoint(model, adapter), CompileOptions(**changes)
    return compile_checkpoint(checkpoint, options, find_calibration(checkpoint, options, None, model))


def stored(compiled: CompiledModel, name: str) -> QuantizedTensor:
    tensor = compiled.weights[name]
    assert isinstance(tensor, QuantizedTensor), f"{name} is not quantized"
    return tensor


def products_of(compiled: CompiledModel) -> dict[str, list[str]]:
    """Every product's node by name -> the weights stacked in it."""
    products = {"/lm_head/MatMulNBits": [compiled.head_name]}
    for index in range(len(compiled.decoder.layers)):
        path = f"/model/layers.{index}"
        nodes = {"qkv": "attn/qkv_proj", "o": "attn/o_proj", "gate_up": "mlp/gate_up_proj", "down": "mlp/down_proj"}
        groups = compiled.groups(index)
        for key, group in groups.items():
            products[f"{path}/{nodes[key]}/MatMulNBits"] = [f"{name}.weight" for name in group.names]
        for name in groups["gate_up"].names:
            products[f"{path}/mlp/{name.rsplit('.', 1)[-1]}/MatMulNBits"] = [f"{name}.weight"]
    return products


def assert_integers_equal(bundle: Path, compiled: CompiledModel, what: str) -> None:
    """Codes and scales of every matrix in the file, bit for bit."""
    proto = onnx.load(bundle / "onnx/model.onnx")
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}

    def read(name: str) -> np.ndarray:
        return numpy_helper.to_array(tensors[name])

    products, seen = products_of(compiled), {"model.embed_tokens.weight"}
    for node in (node for node in proto.graph.node if node.op_type == "MatMulNBits"):
        wanted = [stored(compiled, name) for name in products[node.name]]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        bits, columns, block = attributes["bits"], attributes["K"], attributes["block_size"]
        codes = unpack_codes(read(node.input[1]), bits, columns)
        expected = torch.cat([tensor.codes for tensor in wanted]).numpy()
        assert np.array_equal(codes, expected), f"{what}: codes of {node.name} differ"
        # a scale per element: block scales on one side, group scales on the other
        scales = np.repeat(read(node.input[2]).reshape(len(expected), -1), block, axis=1)[:, :columns]
        groups = torch.cat([tensor.scales for tensor in wanted]).numpy()
        assert np.array_equal(scales, np.repeat(groups, columns // groups.shape[1], axis=1)), node.name
        assert {tensor.bits for tensor in wanted} == {bits}, node.name
        seen.update(products[node.name])
    missing = {name for name, value in compiled.weights.items() if isinstance(value, QuantizedTensor)} - seen
    assert not missing, f"{what}: not in the file: {sorted(missing)}"
    table = stored(compiled, "model.embed_tokens.weight")
    codes = unpack_codes(read("model.embed_tokens.weight.codes"), table.bits, table.codes.shape[1])
    assert np.array_equal(codes, table.codes.numpy()), f"{what}: codes of the embedding differ"
    kind = "scales" if table.bits == 4 else "row_scales"
    scales = read(f"model.embed_tokens.weight.{kind}")
    assert np.array_equal(scales.reshape(table.scales.shape), table.scales.numpy()), "scales of the embedding"


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_file_holds_the_compilers_integers(
    name: str, quant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    model, adapter = build(QUANTIZED[name], tiny_model, tiny_adapter)
    bundle, compiled = tiny_bundle(model, adapter, **QUANTS[quant]), compile_again(model, adapter, **QUANTS[quant])
    assert_integers_equal(bundle, compiled, f"{name}, {quant}")
    kinds = Counter(t.bits for t in compiled.weights.values() if isinstance(t, QuantizedTensor))
    odd = QUANTIZED[name].changes.get("hidden_size", 64) % 32
    assert (
        kinds[8] == sum(kinds.values())
        or (quant == "int4" and kinds[4] and kinds[8])
        or (quant == "all int4" and bool(kinds[8]) == bool(odd))
    ), kinds


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_logits_equal_the_oracle(
    name: str, quant: str, tmp_path: Path, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make
) -> None:
    """With float32 activations the artifact and the oracle compute the same sums."""
    model, adapter = build(QUANTIZED[name], tiny_model, tiny_adapter)
    bundle, compiled = tiny_bundle(model, adapter, **QUANTS[quant]), compile_again(model, adapter, **QUANTS[quant])
    exact = shutil.copytree(bundle, tmp_path / "exact.lime")
    use_float_activations(exact / "onnx/model.onnx")
    reseal(exact)
    module, ids = DecoderModule(compiled), draw_ids(LENGTH, seed=7)
    precise, shipped = open_session(exact), open_session(bundle)
    for selection in (None, "expert1", BLEND):
        d = torch.from_numpy(precise._bank.residual(selection).copy())
        wanted = module(ids, d)[0].numpy()
        precise.use(selection)
        found = precise.logits(ids[0].tolist())
        assert_close(found, wanted, f"{name}, {quant}, {selection}")
        precise.logits(ids[0, :9].tolist())
        rows = [precise.extend([int(token)]).copy() for token in ids[0, 9:]]
        assert_close(np.concatenate(rows), wanted[9:], f"{name}, {quant}, {selection}, token by token")
        shipped.use(selection)
        drift = np.abs(shipped.logits(ids[0].tolist()) - wanted).std() / wanted.std()
        assert drift < 0.05, f"{name}, {quant}, {selection}: int8 activations move logits by {drift:.3g}"


def use_float_activations(file: Path) -> None:
    """Set accuracy_level 1 (float32) in place of 4 (int8 activations); the file keeps its size."""
    proto, size = onnx.load(file, load_external_data=False), file.stat().st_size
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    file.write_bytes(proto.SerializeToString())
    assert file.stat().st_size == size


@pytest.mark.parametrize("group", [16, 64, 256])
def test_other_group_sizes(group: int, tmp_path: Path, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model = tiny_model("llama", hidden_size=256, intermediate_size=320, num_hidden_layers=1)
    adapter = tiny_adapter(model)
    compiled = compile_again(model, adapter, quant="int4", group=group)
    bundle = tiny_bundle(model, adapter, quant="int4", group=group)
    assert_integers_equal(bundle, compiled, f"group {group}")
    exact = shutil.copytree(bundle, tmp_path / "exact.lime")
    use_float_activations(exact / "onnx/model.onnx")
    reseal(exact)
    session, ids = open_session(exact), draw_ids(LENGTH, seed=7)
    session.use("expert1")
    wanted = DecoderModule(compiled)(ids, torch.from_numpy(session._bank.residual("expert1").copy()))[0].numpy()
    assert_close(session.logits(ids[0].tolist()), wanted, f"group {group}")


def test_sizes_that_the_operators_do_not_take(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model = tiny_model("llama", head_dim=20, hidden_size=512, num_hidden_layers=1)
    adapter = tiny_adapter(model)
    with pytest.raises(LimeEdgeError, match="head_dim: expected a multiple of 8, found 20"):
        tiny_bundle(model, adapter, quant="int4")
    with pytest.raises(LimeEdgeError, match="`group`: expected a power of two from 16 to 256, found 512"):
        tiny_bundle(model, adapter, quant="int4", group=512)
