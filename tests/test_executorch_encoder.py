"""Encoders and vision models on ExecuTorch: the authors' fixtures, batches, integers, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import check_model, read_model
from encoder_conformance import ONNX_MODEL_LIMIT, OnnxEncoderEngine, export_fixture
from test_encoder import FIXTURES, draw_text
from test_executorch_integers import Matrix, assert_same, list_products, read_program

from lime_edge.bundle.bundle import Bundle
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.maths.quantize import QuantizedTensor
from lime_edge.compiler.model.encoder import CompiledEncoder
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.executorch.encoder import EncoderMethod, pack_product
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.engines import SessionOptions
from lime_edge.session.open import open_encoder

pytestmark = pytest.mark.check
TARGET = "executorch"


@pytest.fixture(scope="module")
def bert(encoder_bundle: Callable[..., Path]) -> Path:
    """The text fixture's float32 bundle, pinned and routed; `imported` lies beside it."""
    return encoder_bundle("bert-lora-cls", targets=(TARGET,))


def open_bundle(path: Path) -> EncoderSession:
    return open_encoder(Bundle.open(path, verify=True), TARGET, SessionOptions(threads=1))


def compile_again(bundle: Path, **options: Any) -> CompiledEncoder:
    imported = bundle.parent / "imported"
    checkpoint = read_checkpoint(imported / "backbone", imported / "adapter")
    return compile_checkpoint(checkpoint, CompileOptions(**options))


def test_the_text_fixture(bert: Path) -> None:
    """Pinned and routed, padding and all, as the authors' code computes them."""
    engine: Any = OnnxEncoderEngine(open_bundle(bert))
    checks = list(check_model(read_model(FIXTURES / "bert-lora-cls"), engine, ONNX_MODEL_LIMIT))
    failures = [check for check in checks if not check.ok]
    assert len(checks) >= 5 and not failures, failures


def test_other_sizes_and_selections(bert: Path) -> None:
    """Sizes that were not traced, a batch beyond the planned one, blends, none and routed."""
    session, compiled = open_bundle(bert), compile_again(bert, quant="none")
    first, second = (compiled.experts[name].float() for name in session.experts[:2])
    vectors: list[tuple[Any, torch.Tensor | None]] = [
        (session.experts[0], first),
        ({session.experts[0]: 0.3, session.experts[1]: 0.7}, 0.3 * first + 0.7 * second),
        (None, torch.zeros_like(first)),
        ("routed", None),
    ]
    for batch, length in ((1, 1), (3, 20), (19, 5)):
        inputs = draw_text(batch, length, session.bundle.manifest.backbone.vocab)
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        for selection, vector in vectors:
            session.use(selection)
            if selection == "routed" and batch > 8:
                with pytest.raises(LimeEdgeError, match="routed batch: expected at most 8, found 19"):
                    session.run(**arrays)
                continue
            wanted = compiled.run(inputs, vector)["logits"].numpy()
            assert np.abs(session.run(**arrays)["logits"] - wanted).max() < 1e-4, (batch, length, selection)
    engine: Any = session._engine
    with pytest.raises(LimeEdgeError, match="expert: expected"):
        engine.set_expert(np.zeros(3, np.float32))


def test_a_vision_model_in_int8(tmp_path: Path) -> None:
    """Codes and scales in the .pte are the compiler's, and it computes what they say; one expert, no branch."""
    options: dict[str, Any] = {"quant": "int8", "fold": "expert_1", "single": True}
    bundle = export_fixture(FIXTURES / "vit-lora-cls", tmp_path, (TARGET,), **options)
    compiled = compile_again(bundle, **options)
    left = {
        n: Matrix(t.codes.numpy(), t.scales.numpy())
        for n, t in compiled.weights.items()
        if isinstance(t, QuantizedTensor)
    }
    found = list(list_products(read_program(bundle / "executorch/model.pte")))
    assert len(found) == len(left)
    for matrix in found:
        name = next(n for n, m in left.items() if np.array_equal(m.codes, matrix.codes))
        assert_same(matrix, left.pop(name), name)
    session = open_bundle(bundle)
    shape = map(int, session.bundle.manifest.targets[TARGET].inputs[0].shape[1:])
    pixels = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), compiled.module.replace_products(pack_product):  # activations rounded to int8 in torch too
        wanted = EncoderMethod(compiled.module, False, False)(pixels)[0].numpy()
    error = np.abs(session.run(pixel_values=pixels.numpy())["logits"] - wanted)
    assert np.median(error) < 1e-3 * np.abs(wanted).max() and error.max() < 0.05 * np.abs(wanted).max(), error.max()
