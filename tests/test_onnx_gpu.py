"""Float16 graphs against the oracle on the processor; a fake GPU's bookkeeping; the GPU itself."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

import lime_edge
from lime_edge.checks.verify import verify_bundle
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.runtimes.onnx.places import CUDA, TO_DEVICE, TO_HOST, Device
from lime_edge.session.decoder import Session
from lime_edge.targets.devices import DEVICES, find_device
from lime_edge.targets.entries import OnnxOptions

Make = Callable[..., Path]
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 90, 17)]


def write_half(tiny_model: Make, tiny_adapter: Make, output: Path, quant: str = "int4", **adapter: Any) -> Path:
    """A float16 bundle, as for a Jetson, that any provider opens."""
    model = tiny_model()
    options = ExportOptions(target_options={"onnx": OnnxOptions("float16")})
    compiling = CompileOptions(quant=quant, rounding="nearest")
    export_bundle(model, tiny_adapter(model, **adapter), output, compiling, find_device("jetson"), options)
    return output


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_float16_answers_are_the_oracles(tiny_model: Make, tiny_adapter: Make, tmp_path: Path, quant: str) -> None:
    bundle = write_half(tiny_model, tiny_adapter, tmp_path / "half.lime", quant, routing={"top_k": 2})
    report = verify_bundle(bundle)
    assert report.computes == {"onnx": "float16"}
    assert report.checks and not report.missed, report.missed


def test_a_float16_graph_holds_float16_and_the_same_integers(
    tiny_model: Make, tiny_adapter: Make, tmp_path: Path, tiny_bundle: Make
) -> None:
    half = onnx.load(write_half(tiny_model, tiny_adapter, tmp_path / "half.lime") / "onnx/model.onnx")
    full = onnx.load(tiny_bundle(quant="int4", rounding="nearest") / "onnx/model.onnx")
    kinds = {tensor.data_type for tensor in half.graph.initializer}
    assert TensorProto.FLOAT16 in kinds and TensorProto.FLOAT not in kinds
    wide = [value.name for value in half.graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    assert wide == ["expert"], "the vectors that a switch writes are float32 for every device"
    codes = [
        {t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer if ".codes" in t.name} for m in (half, full)
    ]
    assert codes[0].keys() == codes[1].keys() and codes[0]
    assert all(np.array_equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_a_jetson_gets_float16() -> None:
    assert DEVICES["jetson"].activations == "float16" and DEVICES["jetson"].providers[0] == CUDA
    assert {device.activations for device in DEVICES.values() if device.name != "jetson"} == {"float32"}
    with pytest.raises(LimeEdgeError, match="`activations`: expected float32 or float16, found 'bfloat16'"):
        OnnxOptions("bfloat16")


class FakeDevice(Device):
    """Memory that only copies reach, as a GPU's: addresses from ONNX Runtime's own allocator, every copy counted."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.copies: list[int] = []

    def copy(self, target: int, source: int, size: int, kind: int) -> None:
        """memmove."""
        self.copies.append(kind)
        ctypes.memmove(target, source, size)

    def pin(self, array: np.ndarray) -> None:
        """Nothing to pin."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Every session opened from now on has its buffers on one fake device."""
    device = FakeDevice()
    monkeypatch.setattr("lime_edge.runtimes.onnx.decoder.choose_place", lambda provider: device)
    return device


def walk(session: Session) -> list[np.ndarray]:
    """Logits along prompts, steps, switches with and without a kept cache, and back."""
    found = []
    for selection in ("expert0", {"expert1": 0.5, "expert2": 0.5}, None, "expert3", "expert0"):
        session.use(selection)
        found.append(session.logits(IDS).copy())
        found += [session.extend([token]).copy() for token in IDS[:3]]
        session.use("expert1", keep_cache=True)
        found += [session.extend([token]).copy() for token in IDS[:2]]
    return found


def test_the_place_of_buffers_changes_no_answer(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle(quant="none")
    expected = walk(lime_edge.open_decoder(bundle))
    device = FakeDevice()
    monkeypatch.setattr("lime_edge.runtimes.onnx.decoder.choose_place", lambda provider: device)
    for one, other in zip(expected, walk(lime_edge.open_decoder(bundle)), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-5)
    assert {TO_DEVICE, TO_HOST} <= set(device.copies)


def test_a_switch_on_a_device_is_one_copy(tiny_bundle: Make, fake: FakeDevice) -> None:
    session = lime_edge.open_decoder(tiny_bundle(quant="none"))
    session.logits(IDS)
    session.extend(IDS[:1])
    fake.copies.clear()
    session.use("expert2", keep_cache=True)
    assert fake.copies == [TO_DEVICE]


def test_rows_on_a_device_answer_as_on_the_processor(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows start, change experts and end; places are exchanged, prefixes saved and restored, on the device."""

    def answer() -> list[np.ndarray]:
        session: Any = lime_edge.open_decoder(tiny_bundle(quant="none"))
        bank, rows = session._bank, session._engine.open_rows(3, 48)
        taken = [rows.start(bank.residual(name)) for name in ("expert0", "expert1", "expert2")]
        found = [rows.feed(row, np.array(IDS[: 5 + row]), 1).copy() for row in taken]
        found += [one.copy() for one in rows.step(taken, [1, 2, 3])]
        prefix = rows.save(taken[1], 4)
        rows.stop(taken[0])
        found += [one.copy() for one in rows.step(taken[1:], [4, 5])]
        rows.set_expert(taken[2], bank.residual("expert3"))
        late = rows.start(bank.residual("expert0"), prefix)
        return found + [one.copy() for one in rows.step([taken[2], late, taken[1]], [6, 7, 8])]

    expected = answer()
    device = FakeDevice()
    monkeypatch.setattr("lime_edge.runtimes.onnx.decoder.choose_place", lambda provider: device)
    for one, other in zip(expected, answer(), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-5)


@pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers(), reason="NO GPU HERE: tools/gpu_proof.py is its proof"
)
def test_on_the_gpu(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    bundle = write_half(tiny_model, tiny_adapter, tmp_path / "half.lime", routing={"top_k": 2})
    assert lime_edge.open_decoder(bundle).provider == CUDA
    report = verify_bundle(bundle)
    assert report.checks and not report.missed, report.missed
