"""Where a graph's nodes run: what the session and the command line say, and providers that are asked for by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from test_cli import Cli

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.errors import LimeEdgeError
from lime_edge.session.engines import SessionOptions
from lime_edge.session.open import open_any

FEW = ("--prompt-tokens", "4", "--gen-tokens", "2", "--repeat", "1")
ASKED = [("run", "hi"), ("verify", "--target", "onnx"), ("bench", *FEW)]
CPU = "CPUExecutionProvider"
Make = Callable[..., Path]


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


def test_a_session_tells_where_its_nodes_run(tiny_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle(quant="int4")
    graph = onnx.load(bundle / "onnx" / "model.onnx", load_external_data=False).graph
    products = sum(node.op_type == "MatMulNBits" for node in graph.node)
    calls = sum(node.domain == "lime_edge" for node in graph.node)
    placed = lime_edge.open(bundle, target="onnx").placement
    assert placed is not None and list(placed) == [CPU]
    assert placed[CPU]["MatMulNBits"] == products
    assert (
        sum(
            count
            for node, count in placed[CPU].items()
            if node in {n.op_type for n in graph.node if n.domain == "lime_edge"}
        )
        == calls
    )
    monkeypatch.setenv("LIME_EDGE_OPERATORS", "0")
    plain = lime_edge.open(bundle, target="onnx").placement
    assert plain is not None and sum(plain[CPU].values()) > sum(placed[CPU].values()), "the functions' own nodes"


def test_encoders_tell_it_too(encoder_bundle: Make) -> None:
    placed = lime_edge.open(encoder_bundle(), target="onnx").placement
    assert placed is not None and sum(placed[CPU].values()) > 10


def test_inspect_shows_it_and_bench_takes_a_provider(lime: Cli, tiny_bundle: Make) -> None:
    bundle = tiny_bundle(quant="int4")
    placed = lime_edge.open(bundle, target="onnx").placement
    assert json.loads(lime("inspect", bundle, "--placement", "--json").out)["placement"] == {"onnx": placed}
    assert "placement" not in json.loads(lime("inspect", bundle, "--json").out)
    text = lime("inspect", bundle, "--placement").out
    assert "where the nodes of onnx run here" in text and "MatMulNBits" in text
    words = ("--prompt-tokens", 4, "--gen-tokens", 2, "--repeat", 1, "--provider", "cpu", "--json", "--quiet")
    assert json.loads(lime("bench", bundle, *words).out)["provider"] == CPU


def test_a_provider_is_taken_by_its_short_name(tiny_bundle: Make, lime: Cli) -> None:
    bundle = tiny_bundle(quant="int4")
    for name in ("cpu", "CPU", CPU):
        assert open_any(Bundle.open(bundle), "onnx", SessionOptions(providers=(name,))).provider == CPU
    assert lime("run", bundle, "hi", "--provider", "cpu", "--max-new-tokens", 1).code == 0
    assert lime("verify", bundle, "--provider", "cpu").code == 0


@pytest.mark.parametrize("words", ASKED)
def test_one_that_is_not_here_names_its_package(tiny_bundle: Make, lime: Cli, words: tuple[str, ...]) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.fail("this test is for machines without CUDA: run it where CI does")
    done = lime(words[0], tiny_bundle(quant="int4"), *words[1:], "--provider", "cuda")
    assert done.code == 4, done.err
    assert "execution provider CUDAExecutionProvider is not available: this onnxruntime has" in done.err
    assert "onnxruntime-gpu" in done.err


def test_a_misspelled_one_is_refused_with_what_was_meant(tiny_bundle: Make) -> None:
    with pytest.raises(LimeEdgeError, match="execution provider cpuu is not available: this onnxruntime has") as caught:
        open_any(Bundle.open(tiny_bundle(quant="int4")), "onnx", SessionOptions(providers=("cpuu",)))
    assert "did you mean 'cpu'" in caught.value.hint
