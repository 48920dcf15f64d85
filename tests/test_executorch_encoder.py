"""Encoders and vision models on ExecuTorch: the authors' fixtures, batches, integers, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import check_model, read_model
from encoder_conformance import ONNX_MODEL_LIMIT, OnnxEncoderEngine, export_fixture
from test_encoder import FIXTURES, draw_text
from test_executorch_integers import Matrix as Canonical
from test_executorch_integers import assert_same, list_products, read_program, read_table

from lime_edge.bundle import Bundle
from lime_edge.compiler.compile import CompileOptions
from lime_edge.compiler.encoder import read_encoder_checkpoint
from lime_edge.compiler.encoder_compile import compile_encoder
from lime_edge.compiler.quantize import QuantizedTensor
from lime_edge.encoder_session import EncoderSession, open_encoder_session
from lime_edge.errors import LimeEdgeError

Exported = Callable[..., Path]
TARGET = "executorch"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """exported(fixture, quant): its bundle for both targets; `imported` lies beside it."""
    root, made = tmp_path_factory.mktemp("encoders"), {}

    def get(name: str, quant: str = "none") -> Path:
        if (name, quant) not in made:
            made[name, quant] = export_fixture(FIXTURES / name, root / name, ("onnx", TARGET), quant=quant)
        return made[name, quant]

    return get


def open_bundle(path: Path) -> EncoderSession:
    return open_encoder_session(Bundle.open(path, verify=True), TARGET)


@pytest.mark.parametrize("name", ["bert-lora-cls", "vit-lora-cls"])
def test_fixtures(name: str, exported: Exported) -> None:
    """Pinned and routed, padding and all, as the authors' code computes them."""
    engine: Any = OnnxEncoderEngine(open_bundle(exported(name)))
    checks = list(check_model(read_model(FIXTURES / name), engine, ONNX_MODEL_LIMIT))
    failures = [check for check in checks if not check.ok]
    assert len(checks) >= 5 and not failures, failures


def test_both_targets_answer_alike(exported: Exported) -> None:
    """Other sizes than the traced ones, a batch beyond the planned one, every kind of selection."""
    bundle = exported("bert-lora-cls")
    sessions = [open_encoder_session(Bundle.open(bundle), target) for target in ("onnx", TARGET)]
    first, second = sessions[0].experts[:2]
    for batch, length in ((1, 1), (3, 20), (19, 5)):
        inputs = {k: v.numpy() for k, v in draw_text(batch, length, sessions[0].bundle.manifest.model["vocab"]).items()}
        for selection in (first, second, {first: 0.3, second: 0.7}, None, *(["routed"] if batch < 8 else [])):
            for session in sessions:
                session.use(selection)
            wanted, found = (session.run(**inputs)["logits"] for session in sessions)
            assert np.abs(found - wanted).max() < 1e-4, (batch, length, selection)
    session = sessions[1]
    session.use("routed")
    with pytest.raises(LimeEdgeError, match="routed batch: expected at most 8, found 19"):
        session.run(**inputs)
    engine: Any = session._engine
    with pytest.raises(LimeEdgeError, match="expert: expected"):
        engine.set_expert(np.zeros(3, np.float32))


def test_the_integers_are_the_compilers(exported: Exported) -> None:
    """Codes and scales in the .pte; a decision stays what the float model's oracle says with rounded weights."""
    bundle = exported("bert-lora-cls", "int8")
    imported = bundle.parent / "imported"
    checkpoint = read_encoder_checkpoint(imported / "backbone", imported / "adapter")
    compiled = compile_encoder(checkpoint, CompileOptions(quant="int8"))
    pte = read_program(bundle / "executorch/model.pte")
    wanted = {n: Canonical(t.codes.numpy(), t.scales.numpy()) for n, t in compiled.weights.items()
              if isinstance(t, QuantizedTensor)}  # fmt: skip
    tables = [name for name in wanted if "embeddings" in name]
    assert_same(read_table(pte), wanted[tables[0]], tables[0])
    found = list(list_products(pte))
    left = {name: matrix for name, matrix in wanted.items() if name not in tables}
    assert len(found) == len(left)
    for matrix in found:
        name = next(n for n, m in left.items() if m.codes.shape == matrix.codes.shape
                    and np.array_equal(m.codes, matrix.codes))  # fmt: skip
        assert_same(matrix, left.pop(name), name)
    session = open_bundle(bundle)
    inputs = draw_text(4, 12, session.bundle.manifest.model["vocab"])
    for name in session.experts[:2]:
        session.use(name)
        oracle = compiled.run(inputs, compiled.experts[name])["logits"].numpy()
        answer = session.run(**{key: tensor.numpy() for key, tensor in inputs.items()})["logits"]
        assert np.abs(answer - oracle).max() < 0.05 * np.abs(oracle).max() + 0.02, name
