"""The authors' fixtures through the Core ML path: imported, exported, interpreted.

`tests/conformance.py --target coreml` takes `check_fixtures`. A package holds float16: rounding the fixtures' weights
moves their logits by up to 0.1, in torch as well as here. So decoders are compared with the torch oracle on the rounded
tensors; in float32 that oracle is tied to the fixtures by `--target onnx`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conformance import BundleEngine, Check, check_model, compare, guard, list_models, read_model
from encoder_conformance import OnnxEncoderEngine, export_fixture, is_encoder_fixture
from test_coreml_export import make_oracle, residual_of

from lime_edge.bundle.bundle import Bundle
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.options import CompileOptions
from lime_edge.session.open import open_encoder

pytestmark = pytest.mark.check
FIXTURES = Path(__file__).parent / "fixtures" / "conformance"
DECODER_LIMIT = 1e-4
ENCODER_LIMIT = 2e-2  # against the fixture itself, float16 weights and all


def check_fixtures(directory: Path) -> Iterator[Check]:
    """All models of a directory of fixtures."""
    for path in list_models(directory):
        check = check_encoder if is_encoder_fixture(read_model(path).hyper) else check_decoder
        yield from guard(f"models/{path.name}", check(path))


def check_decoder(path: Path) -> Iterator[Check]:
    """Every logits tensor that the fixture expects, and its tokens, from the interpreter and from the oracle."""
    fixture = read_model(path)
    with tempfile.TemporaryDirectory() as folder:
        engine = BundleEngine(fixture, Path(folder), "coreml")
        imported, session, ids = Path(folder) / "imported", engine.session, fixture.inputs["input_ids"]
        checkpoint = read_checkpoint(imported / "backbone", imported / "adapter")
        oracle = make_oracle(compile_checkpoint(checkpoint, CompileOptions(quant="none")))
        for key in sorted(fixture.expected):
            if key.startswith("in.") or "generated" in key:
                continue
            index = key.partition(".")[2]
            selection = session.experts[int(index)] if index else "routed"
            session.use(selection)
            d = residual_of(session, selection)
            wanted = torch.stack([oracle(row[None], d)[0] for row in ids])
            found = torch.stack([torch.from_numpy(session.logits(row.tolist()).copy()) for row in ids])
            yield compare(fixture.name, key, wanted, found, DECODER_LIMIT)


def check_encoder(path: Path) -> Iterator[Check]:
    """Every tensor that the fixture expects, as it is in the fixture."""
    with tempfile.TemporaryDirectory() as directory:
        session = open_encoder(Bundle.open(export_fixture(path, Path(directory), ("coreml",)), verify=True))
        engine = OnnxEncoderEngine(session)
        yield from check_model(read_model(path), engine, ENCODER_LIMIT)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama-dora-ngram", "llama-lora-sparse"])
def test_a_fixture_runs(name: str) -> None:
    checks = list(check_decoder(FIXTURES / "models" / name))
    assert len(checks) == 5
    for check in checks:
        assert check.ok, check
