"""Encoders and vision models in Core ML, run by the interpreter, against the torch oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import ask_encoder, draw_inputs
from test_coreml_export import EXACT, NATIVE, measure
from test_coreml_interpreter import check_arithmetic, collect
from test_encoder import FIXTURES

from lime_edge.bundle.bundle import Bundle
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.hyper import ImportOptions
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.encoder import CompiledEncoder
from lime_edge.compiler.model.encoder_layers import StoredProduct, StoredTable
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.exporters.coreml.encoder import write_encoder
from lime_edge.exporters.padded import choose_lengths
from lime_edge.runtimes.coreml.interpreter import Interpreter
from lime_edge.runtimes.coreml.program import Constant, read_package
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.engines import SessionOptions
from lime_edge.session.open import open_encoder
from lime_edge.targets.devices import find_device
from lime_edge.targets.entries import CoremlOptions

pytestmark = pytest.mark.check
QUANTS = {"bert-lora-cls": "int8", "vit-lora-cls": "int4"}


@pytest.fixture(scope="module", params=QUANTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompiledEncoder]:
    """A bundle, and the oracle with every float of the package rounded to float16."""
    directory = tmp_path_factory.mktemp("coreml") / request.param
    import_checkpoint(FIXTURES / request.param, directory, ImportOptions())
    paths, how = (directory / "backbone", directory / "adapter"), CompileOptions(quant=QUANTS[request.param])
    output = directory / "x.lime"
    export_bundle(*paths, output, how, find_device("cpu"), ExportOptions(("coreml",), tokenizer=False))
    compiled = compile_checkpoint(read_checkpoint(*paths), how)
    round_floats(compiled)
    return output, compiled


def round_floats(compiled: CompiledEncoder) -> None:
    """Round what the package stores as float16, in place; the integers and their scales stay."""
    quantized = {
        id(part.weight)
        for part in compiled.module.modules()
        if isinstance(part, (StoredProduct, StoredTable)) and isinstance(part.stored, QuantizedTensor)
    }
    for tensor in [*compiled.module.parameters(), *compiled.module.buffers()]:
        if id(tensor) not in quantized and tensor.is_floating_point():
            tensor.data.copy_(tensor.data.half().float())


def open_on(path: Path, provider: str) -> EncoderSession:
    return open_encoder(Bundle.open(path), "coreml", SessionOptions(providers=(provider,)))


def test_every_selection_equals_the_oracle(made: tuple[Path, CompiledEncoder]) -> None:
    """Exact: every expert, a blend, none, routed; a batch of lengths that are not enumerated."""
    path, compiled = made
    session, seen = open_on(path, EXACT), []
    first, second = session.experts[:2]
    for selection in (*session.experts, {first: 0.3, second: 0.7}, None, "routed"):
        session.use(selection)
        for batch, length in ((2, 11), (1, 40)):
            inputs = draw_inputs(session, batch, length, half=True)
            wanted = ask_encoder(compiled, session, inputs, selection, half=True)
            error = measure(session.run(**inputs)["logits"], wanted)
            assert error < 1e-4, f"{path.parent.name}, {selection}, {length}: error {error:.3g}"
        seen.append(wanted)
    assert min(np.abs(one - two).max() for one, two in zip(seen, seen[1:], strict=False)) > 1e-3


def test_rounded_to_float16(made: tuple[Path, CompiledEncoder]) -> None:
    path, compiled = made
    session = open_on(path, NATIVE)
    for selection in (session.experts[1], "routed"):
        session.use(selection)
        inputs = draw_inputs(session, 2, 19, half=True)
        error = measure(session.run(**inputs)["logits"], ask_encoder(compiled, session, inputs, selection, half=True))
        assert error < 2e-2, f"{path.parent.name}, {selection}: error {error:.3g}"


def test_the_package_holds_the_compilers_integers(made: tuple[Path, CompiledEncoder]) -> None:
    """Codes and scales bit for bit, in both functions; nothing else is an integer matrix."""
    path, compiled = made
    wanted = {
        stored.codes.numpy().tobytes(): stored
        for stored in compiled.weights.values()
        if isinstance(stored, QuantizedTensor)
    }
    package = read_package(path / "coreml/model.mlpackage")
    for name, function in package.functions.items():
        left = dict(wanted)
        for op in function.operations:
            if op.kind != "constexpr_blockwise_shift_scale":
                continue
            data, scale = op.inputs["data"][0], op.inputs["scale"][0]
            assert isinstance(data, Constant) and isinstance(scale, Constant)
            stored = left.pop(data.array.tobytes())
            assert data.type == f"int{stored.bits}" and scale.type == "fp16"
            assert np.array_equal(scale.array, stored.scales.numpy()), name
        assert not left, f"{name}: {len(left)} matrices are not in the package"
    facts = Bundle.open(path).manifest.targets["coreml"]  # test_encoder.py says the same of ONNX
    assert facts.weight_hash == compiled.weight_hash()
    assert set(package.functions) == {"main", "routed"}


def test_every_operation_equals_coremltools(made: tuple[Path, CompiledEncoder]) -> None:
    """What coremltools makes of torch's program: other operations than our own decoder has."""
    path, _ = made
    session, package = open_on(path, EXACT), read_package(path / "coreml/model.mlpackage")
    interpreters, inputs = [], []
    for name, function in package.functions.items():
        given = {
            k: x.astype(np.int32) if x.dtype == np.int64 else x
            for k, x in draw_inputs(session, 1, 32, half=True).items()
        }
        if "expert" in function.inputs:
            given["expert"] = (
                np.random.default_rng(0).normal(0, 0.5, session.bundle.manifest.sites.total).astype(np.float64)
            )
        interpreters.append(Interpreter(package, name))
        inputs.append(given)
    seen = collect(interpreters, inputs)
    check_arithmetic(seen, {"layer_norm", "gelu", "softmax", "linear", "conv" if "pixel_values" in given else "gather"})


def test_a_model_that_coremltools_refuses(made: tuple[Path, CompiledEncoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """One message: which model, why, and which target takes it; the layers are as they were."""

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("Unsupported fx node")

    _, compiled = made
    before = {name: layer.product for name, layer in compiled.module.layers.items()}
    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(LimeEdgeError, match="ForImageClassification|BertFor.*cannot be converted: Unsupported fx node"):
        write_encoder(compiled, made[0] / "nowhere", CoremlOptions(), lambda *_: None)
    assert {name: layer.product for name, layer in compiled.module.layers.items()} == before


def test_lengths_end_with_the_context(made: tuple[Path, CompiledEncoder]) -> None:
    path, compiled = made
    lengths = choose_lengths(compiled, (16, 64, 4096))
    assert lengths == (() if "vit" in str(path.parent) else (16, 64, 128))


@pytest.mark.parametrize("made", ["bert-lora-cls"], indirect=True)  # pixels have no lengths
def test_one_enumerated_length_is_a_fixed_shape(made: tuple[Path, CompiledEncoder], tmp_path: Path) -> None:
    """Lengths beyond the context leave the context alone: padded to it, the text says what the oracle says."""
    path, compiled = made
    options = CoremlOptions(prompt_lengths=(4096,))
    facts = write_encoder(compiled, tmp_path, options, lambda *_: None)
    package = read_package(tmp_path / "model.mlpackage")
    assert facts["lengths"] == [128] and package.functions["main"].inputs["input_ids"].shape == (1, 128)
    session = open_on(path, EXACT)  # for its bank
    session.use(session.experts[1])
    inputs = draw_inputs(session, 1, 19, half=True)
    wanted = ask_encoder(compiled, session, inputs, session.experts[1], half=True)
    padded = {name: np.pad(x, ((0, 0), (0, 128 - 19))).astype(np.int32) for name, x in inputs.items()}
    runner = Interpreter(package)
    d = session._bank.residual(session.experts[1])
    assert measure(runner.run(padded | {"expert": d}, runner.make_state())["logits"], wanted) < 1e-4
