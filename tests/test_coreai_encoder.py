"""Encoders and vision models in Core AI, run by Apple's interpreter, against the torch oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles import ask_encoder, draw_inputs
from test_coreai_export import compare, read_functions, read_matrices, read_text
from test_encoder import FIXTURES

from lime_edge.bundle.bundle import Bundle
from lime_edge.checks.verify import verify_bundle
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.hyper import ImportOptions
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.encoder import CompiledEncoder
from lime_edge.compiler.options import CompileOptions
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.session.open import open_encoder
from lime_edge.targets.devices import find_device
from lime_edge.targets.entries import CoreaiOptions

pytestmark = pytest.mark.check
QUANTS = {"bert-lora-cls": "int8", "vit-lora-cls": "int4"}
LONG = 24


@pytest.fixture(scope="module", params=QUANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompileOptions]:
    """An imported checkpoint, and how it is rounded."""
    directory = tmp_path_factory.mktemp("coreai") / request.param
    import_checkpoint(FIXTURES / request.param, directory, ImportOptions())
    return directory, CompileOptions(quant=QUANTS[request.param])


def export(directory: Path, how: CompileOptions, activations: str) -> Path:
    output, told = directory / f"{activations}.lime", CoreaiOptions(prompt_lengths=(LONG,), activations=activations)
    wanted = ExportOptions(("coreai",), tokenizer=False, target_options={"coreai": told})
    export_bundle(directory / "backbone", directory / "adapter", output, how, find_device("cpu"), wanted)
    return output


@pytest.fixture(scope="module")
def made(checkpoint: tuple[Path, CompileOptions]) -> tuple[Path, CompiledEncoder]:
    """A bundle of float32 activations, and its oracle."""
    directory, how = checkpoint
    compiled = compile_checkpoint(read_checkpoint(directory / "backbone", directory / "adapter"), how)
    assert isinstance(compiled, CompiledEncoder)
    return export(directory, how, "float32"), compiled


def test_every_selection_equals_the_oracle(made: tuple[Path, CompiledEncoder]) -> None:
    """Every expert, a blend, none, routed; a batch, and lengths that the file does not have."""
    path, compiled = made
    session, seen = open_encoder(Bundle.open(path)), []
    assert session.provider == "CoreAI-interpreter"
    first, second = session.experts[:2]
    for selection in (*session.experts, {first: 0.3, second: 0.7}, None, "routed"):
        session.use(selection)
        for batch, length in ((2, 11), (1, 40)):
            inputs = draw_inputs(session, batch, length)
            wanted = ask_encoder(compiled, session, inputs, selection)
            compare(session.run(**inputs)["logits"], wanted, f"{path.parent.name}, {selection}, {length}")
        seen.append(wanted)
    assert min(np.abs(one - two).max() for one, two in zip(seen, seen[1:], strict=False)) > 1e-3
    report = verify_bundle(path)
    assert not report.missed, report.missed


def test_the_integers_are_the_compilers(made: tuple[Path, CompiledEncoder]) -> None:
    """Each quantized matrix that the functions read, codes and scales bit for bit."""
    path, compiled = made
    stored = [tensor for tensor in compiled.weights.values() if isinstance(tensor, QuantizedTensor)]
    matrices = read_matrices(read_text(path), next(iter(read_functions(path))))
    assert len(matrices) == len(stored) > 4
    for matrix in matrices:
        alike = [tensor for tensor in stored if np.array_equal(tensor.codes.numpy(), matrix.codes)]
        assert any(np.array_equal(tensor.scales.numpy(), matrix.scales) for tensor in alike), matrix.codes.shape


def test_functions(made: tuple[Path, CompiledEncoder]) -> None:
    """A text of every length, or one image; routed takes any batch."""
    path, compiled = made
    functions = read_functions(path)
    if compiled.context:
        assert set(functions) == {f"main_{LONG}", f"main_{compiled.context}", "routed"}
        assert functions[f"main_{LONG}"]["input_ids"] == f"NDArray (Int32, 1 × {LONG})"
    else:
        assert set(functions) == {"main", "routed"}
        assert functions["main"]["pixel_values"] == "NDArray (Float32, 1 × 3 × 32 × 32)"


def test_float16_as_shipped(checkpoint: tuple[Path, CompileOptions], made: tuple[Path, CompiledEncoder]) -> None:
    path, compiled = export(*checkpoint, "float16"), made[1]
    session = open_encoder(Bundle.open(path))
    for selection in (session.experts[1], "routed"):
        session.use(selection)
        inputs = draw_inputs(session, 1, 11)
        wanted = ask_encoder(compiled, session, inputs, selection)
        compare(session.run(**inputs)["logits"], wanted, f"{path.parent.name}, {selection}", "float16")
