"""The ExecuTorch export against `transformers` with unfolded layers, and what one program promises.

Lowering takes seconds, so that few programs prove many things at once: each model below is picked for what it adds.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Make
from manifests import reseal
from models import ALL_LINEARS, CASES, Case, draw_ids
from test_onnx_export import NEW, SELECTIONS, assert_close, excess, to_mode, unfold
from test_variants import IDS, check_session, make_prompt_adapter, prompt_logits

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.cli.export import report_delegation
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths import prompt_tuning
from lime_edge.compiler.maths.prompt_tuning import CONDITIONING
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.exporters.executorch.decoder import choose_sizes, write_decoder, write_stock
from lime_edge.exporters.executorch.prompt import summarize
from lime_edge.runtimes.executorch.decoder import check_provider
from lime_edge.session.decoder import Session
from lime_edge.session.generate import GenerationOptions
from lime_edge.targets.devices import find_device
from lime_edge.targets.entries import ExecutorchOptions

pytestmark = pytest.mark.check
LENGTH = 41  # more rows than one call gives, and beyond every window
SMALL: dict[str, Any] = {"num_hidden_layers": 1}
MODELS: dict[str, Case] = {
    "windows, norms of heads, biases": Case("qwen3", CASES["qwen3-sliding"].changes, ALL_LINEARS),
    "a layer without RoPE, tied, gaps between sites, gelu": Case(
        "smollm3",
        {
            **CASES["smollm3"].changes,
            "no_rope_layers": [1, 0],
            "num_hidden_layers": 2,
            "mlp_bias": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
        ("q_proj", "v_proj", "up_proj"),
        shared=True,
    ),
}


def open_session(bundle: Path) -> Session:
    return lime_edge.open_decoder(bundle, target="executorch", threads=1)


def draw_residual(session: Session, seed: int) -> np.ndarray:
    """d of an expert drawn from N(1, 0.5)."""
    drawn = np.random.default_rng(seed).normal(1, 0.5, session.bundle.manifest.sites.total).astype(np.float32)
    return drawn - session.bundle.read_reference()


@pytest.mark.parametrize("name", MODELS)
def test_float32_equals_the_unfolded_model(name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """Every expert, random ones, a blend and none: all rows, the last row, greedy; and the branch matters."""
    case = MODELS[name]
    model = tiny_model(case.family, **case.changes)
    adapter = tiny_adapter(model, targets=case.targets, shared=case.shared)
    session = open_session(tiny_bundle(model, adapter, targets=("executorch",)))
    unfolded, ids = unfold(model, adapter), draw_ids(LENGTH, 4)
    for selection in SELECTIONS:
        unfolded.use(to_mode(selection))
        session.use(selection)
        wanted = unfolded.logits({"input_ids": ids})[0].numpy()
        assert_close(session.logits(ids[0].tolist()), wanted, f"{name}, {selection}")
        assert_close(session.logits(ids[0].tolist(), keep=1), wanted[-1:], f"{name}, {selection}, last row")
        tokens = unfolded.generate(ids[:, :20], NEW)[0, 20:].tolist()
        found = session.generate_ids(ids[0, :20].tolist(), GenerationOptions(NEW, ignore_eos=True))
        assert list(found) == tokens, f"{name}, {selection}"
    oracle = DecoderModule(compile_checkpoint(read_checkpoint(model, adapter), CompileOptions(quant="none")))
    for seed in range(3):
        d = draw_residual(session, seed)
        wanted = oracle(ids, torch.from_numpy(d))[0].numpy()
        session._engine.set_expert(d)
        assert_close(session.logits(ids[0].tolist()), wanted, f"{name}, random expert {seed}")
        session._engine.set_expert(np.zeros_like(d))
        assert excess(session.logits(ids[0].tolist()), wanted) > 100, f"{name}: the branch is not heard"


@pytest.mark.parametrize("variant", ["dora", "slicefine"])
def test_variants_pinned_and_routed(variant: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """On the embedding or on linears with biases; two methods on one cache and one set of weights."""
    model, dora = tiny_model("qwen2", **SMALL), variant == "dora"
    routing = {"top_k": 2, "n_gram": 3} if dora else {"top_k": 2, "sparse_mode": True, "auto_topk": True}
    adapter = tiny_adapter(
        model,
        variant=variant,
        rank=6,
        experts=5,
        shared=True,
        routing=routing,
        targets=("embed_tokens", "q_proj") if dora else ("k_proj", "v_proj"),
    )
    session = open_session(tiny_bundle(model, adapter, targets=("executorch",)))
    check_session(session, unfold(model, adapter), variant)
    wanted: dict[str, np.ndarray] = {}
    for selection in ("routed", "expert1", "routed", "expert1"):
        session.use(selection)
        assert session.cache == ()
        assert np.array_equal(session.logits(IDS), wanted.setdefault(selection, session.logits(IDS).copy()))
    session.use("routed")
    session.logits(IDS)
    with pytest.raises(LimeEdgeError, match="routed: 2 tokens after a cache of 13"):
        session.extend([5, 6])


def test_prompt_tuning(tiny_model: Make, tmp_path: Path, tiny_bundle: Make) -> None:
    model = tiny_model("llama", **SMALL)
    adapter = make_prompt_adapter(
        tmp_path / "adapter",
        model,
        routing="auto_topk",
        auto_topk=True,
        sparse_mode=False,
        input_conditioned=True,
        input_conditioning_mode="attention",
    )
    session = open_session(tiny_bundle(model, adapter, targets=("executorch",)))
    assert session.max_length == 64 - 5
    for selection, mode in (("expert3", 3), ("routed", "routed"), ("expert0", 0)):
        session.use(selection)
        wanted = prompt_logits(model, adapter, mode)
        assert_close(session.logits(IDS), wanted, f"prompt tuning, {selection}")
    parts = [session.logits(IDS[:5])[-1].copy(), *(session.extend([token])[-1].copy() for token in IDS[5:])]
    assert_close(np.stack(parts), wanted[4:], "token by token")


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_summaries_leave_virtual_tokens_out(conditioning: str) -> None:
    """As the compiler's, which sees the prompt alone; and a decode step, which has no virtual tokens."""
    random = torch.Generator().manual_seed(0)
    for virtual, count in ((5, 9), (5, 1), (0, 1)):
        prompt = torch.randn(1, count, 16, generator=random)
        whole = torch.cat([100 * torch.randn(1, virtual, 16, generator=random), prompt], 1)
        real = (torch.arange(virtual + count) >= virtual)[None, :, None].float()
        wanted = prompt_tuning.summarize(prompt, None, conditioning)
        torch.testing.assert_close(summarize(conditioning, whole, real)[:, 0], wanted)


# the program


@pytest.mark.small
def test_one_bundle_two_targets(tiny_bundle: Make) -> None:
    """The same experts, the same weights, the same answers."""
    bundle = tiny_bundle(targets=("onnx", "executorch"))
    facts = Bundle.open(bundle).manifest.targets
    assert facts["onnx"].weight_hash == facts["executorch"].weight_hash
    sessions = [lime_edge.open_decoder(bundle, target=target, threads=1) for target in facts]
    for selection in SELECTIONS:
        for session in sessions:
            session.use(selection)
        first, second = (session.logits(IDS) for session in sessions)
        assert_close(second, first, str(selection))


def test_one_subgraph_between_attentions(tiny_bundle: Make) -> None:
    """Nothing that XNNPACK could take is left outside; rotations and the head are one subgraph each."""
    facts = Bundle.open(tiny_bundle(targets=("onnx", "executorch"))).manifest.targets["executorch"]
    forward = facts.report["delegation"]["forward"]
    assert forward["fallen"] == {}
    assert forward["subgraphs"] <= facts.layers + 3
    assert forward["delegated"] > 2 * forward["undelegated"]


def test_the_constant_methods_of_the_stock_runners(tiny_bundle: Make) -> None:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(tiny_bundle(targets=("onnx", "executorch")) / "executorch/model.pte")
    wanted = {
        "get_vocab_size": [300],
        "get_max_seq_len": [64],
        "get_max_context_len": [64],
        "get_bos_id": [1],
        "get_eos_ids": [2],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [True],
        "enable_dynamic_shape": [True],
        "get_n_layers": [2],
    }
    found = {name: list(program.load_method(name).execute([])) for name in wanted}
    assert found == wanted
    assert program.method_names == {"forward", *wanted}


def test_the_stock_runner_switches_experts(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    """`forward(tokens, pos)` and `set_expert(d)` on one buffer; before it, the folded model."""
    from executorch.runtime import Runtime

    model = tiny_model("llama", **SMALL)
    compiled = compile_checkpoint(read_checkpoint(model, tiny_adapter(model)), CompileOptions(quant="none"))
    count = write_stock(compiled, choose_sizes(compiled, 32), "xnnpack", {}, tmp_path / "stock.pte", lambda *_: None)
    assert count.subgraphs and not count.fallen
    program = Runtime.get().load_program(tmp_path / "stock.pte")
    forward, set_expert = program.load_method("forward"), program.load_method("set_expert")
    oracle, ids = DecoderModule(compiled), draw_ids(9, 1)
    residuals = [torch.zeros(compiled.sites.total)] + [torch.randn(compiled.sites.total) for _ in range(3)]
    for index, residual in enumerate([*residuals, *residuals]):
        if index:
            set_expert.execute([residual])
        wanted = oracle(ids, residual)[0].numpy()
        pieces = [(0, 6), (6, 7), (7, 8), (8, 9)]
        found = [forward.execute([ids[:, i:j].contiguous(), torch.tensor([i])])[0].numpy()[0, -1] for i, j in pieces]
        assert_close(np.stack(found), wanted[5:], f"expert {index}")


def test_without_a_delegate(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    """The same program on the portable kernels."""
    from executorch.runtime import Runtime

    model = tiny_model("llama", **SMALL)
    compiled = compile_checkpoint(read_checkpoint(model, tiny_adapter(model)), CompileOptions(quant="none"))
    facts = write_decoder(compiled, tmp_path, ExecutorchOptions(32, "portable"), lambda *_: None)
    assert facts["providers"] == ["portable"] and facts["delegation"]["forward"]["subgraphs"] == 0
    ids, d = draw_ids(9, 2), torch.randn(compiled.sites.total, generator=torch.Generator().manual_seed(1))
    method = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    found = method.execute([ids, torch.tensor([0]), torch.arange(9), d])[0].numpy()
    assert_close(found, DecoderModule(compiled)(ids, d).numpy(), "portable")


@pytest.mark.parametrize("keep", [0, 1, 6])
def test_a_prompt_in_pieces(keep: int, tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call takes more tokens or rows than were planned for; what comes out is the same."""
    session = open_session(tiny_bundle(targets=("onnx", "executorch")))
    ids = draw_ids(LENGTH, 4)[0].tolist()
    wanted = session.logits(ids, keep=keep).copy()
    engine: Any = session._engine
    call, sizes = engine._call, []

    def note(piece: np.ndarray, position: int, rows: np.ndarray) -> np.ndarray:
        sizes.append((piece.size, rows.size))
        return call(piece, position, rows)

    monkeypatch.setattr(engine, "_call", note)
    monkeypatch.setattr(engine, "_prompt", 9)
    monkeypatch.setattr(engine, "_rows", 4)
    assert_close(session.logits(ids, keep=keep), wanted, f"keep {keep}")
    assert max(size for size, _ in sizes) <= 9 and max(rows for _, rows in sizes) <= 4
    assert sum(size for size, _ in sizes) == LENGTH


def test_what_fell_off_the_delegate_is_said(
    tiny_bundle: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(tiny_bundle(targets=("onnx", "executorch")), tmp_path / "x.lime")
    report_delegation(bundle, as_json=False)
    told = capsys.readouterr()
    assert "operators in 5 subgraphs of XnnpackBackend" in told.out.replace("\n", " ") and not told.err
    fallen = {"mul.Tensor": 3}
    reseal(bundle, lambda body: body["targets"][1]["report"]["delegation"]["forward"].update(fallen=fallen))
    report_delegation(bundle, as_json=True)
    told = capsys.readouterr()
    assert not told.out and "not taken by XnnpackBackend: mul.Tensor (3)" in told.err.replace("\n", " ")


# what is refused


def test_backends_that_are_not_here_say_what_is_missing(tmp_path: Path) -> None:
    missing: Any = SimpleNamespace(quant="int4")  # nothing else of the model is looked at
    for name, code, match in (
        ("qnn", 4, "QNN SDK"),
        ("openvino", 4, "OpenVINO"),
        ("coreml", 4, "dynamic prompt"),
        ("vulkan", 4, "device with Vulkan"),
        ("tpu", 2, "expected xnnpack or"),
        ("portable", 2, "expected `quant=none`, found int4"),
    ):
        with pytest.raises(LimeEdgeError, match=match) as caught:
            write_decoder(missing, tmp_path, ExecutorchOptions(backend=name), print)
        assert caught.value.exit_code == code


def test_the_engine_is_never_asked_what_does_not_fit(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """ExecuTorch checks neither a negative position nor, in Python, what it writes beyond the cache."""
    session = open_session(tiny_bundle(targets=("onnx", "executorch")))
    engine: Any = session._engine
    session.logits(IDS)
    monkeypatch.setattr(engine, "_call", lambda *_: pytest.fail("the program was called"))
    for length in (-1, 64, 65):
        monkeypatch.setattr(engine, "length", length)
        with pytest.raises(LimeEdgeError, match="position"):
            engine.feed(np.array([5]), 1)
    monkeypatch.setattr(engine, "length", 63)
    with pytest.raises(LimeEdgeError, match="expected 1..1 tokens after 63, found 2"):
        engine.feed(np.array([5, 6]), 1)
    with pytest.raises(LimeEdgeError, match="position: expected 0..64, found -1"):
        engine.rewind(-1)
    total = session.bundle.manifest.sites.total
    for wrong in (np.zeros(total - 1, np.float32), np.zeros(total, np.float64), np.zeros((1, total), np.float32)):
        with pytest.raises(LimeEdgeError, match=f"expert: expected \\({total},\\) float32"):
            engine.set_expert(wrong)


def test_the_pool_of_threads_is_one_per_process(tiny_bundle: Make) -> None:
    bundle = tiny_bundle(targets=("onnx", "executorch"))
    open_session(bundle)
    with pytest.warns(RuntimeWarning, match="one pool of this process has .*, asked for 77"):
        lime_edge.open_decoder(bundle, target="executorch", threads=77)


def test_a_damaged_program_is_refused(tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle(targets=("onnx", "executorch")), tmp_path / "x.lime")
    file = bundle / "executorch/model.pte"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(LimeEdgeError, match="model.pte: sha256"):  # the engine might end the process
        open_session(bundle)
    reseal(bundle)
    with pytest.raises(LimeEdgeError, match="model.pte: ExecuTorch cannot load it"):
        open_session(bundle)


def test_a_backend_that_is_not_there_is_refused(tiny_bundle: Make, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle(targets=("onnx", "executorch")), tmp_path / "x.lime")
    reseal(bundle, lambda body: body["targets"][1].update(providers=["CoreMLBackend"]))
    with pytest.raises(LimeEdgeError, match="the backend CoreMLBackend is not available") as caught:
        open_session(bundle)
    assert caught.value.exit_code == 4
    with pytest.raises(LimeEdgeError, match="none of the execution providers CUDA is available"):
        check_provider(("XnnpackBackend",), ("CUDA",))


@pytest.mark.small
@pytest.mark.parametrize(
    "options, group, refusal",
    [
        (ExecutorchOptions(), 16, "`group`: for ExecuTorch expected a multiple of 32, found 16"),
        (ExecutorchOptions(max_seq_len=1), 32, "`max_seq_len`: for ExecuTorch expected at least 2, found 1"),
        (ExecutorchOptions(backend="banana"), 32, "`backend`: expected xnnpack or portable, found 'banana'"),
        (ExecutorchOptions(backend="portable"), 32, "`backend=portable`: expected `quant=none`, found int4"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(
    options: ExecutorchOptions, group: int, refusal: str, tmp_path: Path
) -> None:
    chosen = ExportOptions(targets=("onnx", "executorch"), target_options={"executorch": options})
    compiling = CompileOptions(quant="int4", group=group)
    nothing = tmp_path / "no-model"
    with pytest.raises(LimeEdgeError, match=re.escape(refusal)):
        export_bundle(nothing, nothing, tmp_path / "x.lime", compiling, find_device("cpu"), chosen)
    assert not list(tmp_path.iterdir())


def test_a_target_asked_for_twice_is_written_once(tmp_path: Path, tiny_model: Make, tiny_adapter: Make) -> None:
    model = tiny_model("llama", **SMALL)
    manifest = export_bundle(
        model,
        tiny_adapter(model),
        tmp_path / "x.lime",
        CompileOptions(quant="none"),
        find_device("cpu"),
        ExportOptions(targets=("onnx", "onnx")),
    )
    assert list(manifest.targets) == ["onnx"]
