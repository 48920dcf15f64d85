"""Vision-language models on ExecuTorch: what is seen and said is the authors' and the oracle's."""

from __future__ import annotations

from pathlib import Path

import pytest
import vision_conformance

from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.coreml.entry import WRITERS as COREML
from lime_edge.exporters.executorch.entry import check_options
from lime_edge.targets.entries import ExecutorchOptions
from lime_edge.targets.registry import load_exporters

FIXTURES = Path(__file__).parent / "fixtures" / "conformance"
pytestmark = pytest.mark.check


@pytest.mark.parametrize("name", ["smolvlm-slicefine-hard", "llava-lora-auto"])
def test_fixtures_of_the_authors(name: str) -> None:
    """Images, videos and texts, routed and every expert pinned: features, logits, greedy tokens."""
    path = FIXTURES / "vision" / "models" / name
    checks = list(vision_conformance.check_exported_vision(path, "executorch"))
    assert len(checks) > 20
    wrong = [f"{check.fixture} {check.what}: {check.error:.2g} {check.problem}" for check in checks if not check.ok]
    assert not wrong, wrong


@pytest.mark.small
def test_what_no_target_takes_yet_is_refused_by_name() -> None:
    with pytest.raises(LimeEdgeError, match="stock runners"):
        check_options("vision-language", ExecutorchOptions(stock_runner=True), "int8", 32)
    assert "vision-language" not in COREML
    for target, companions, words in (("coreml", (), "Core ML holds"), ("onnx", ("genai",), "GenAI runs language")):
        with pytest.raises(LimeEdgeError, match=words):
            load_exporters((target,), {}, "int8", 32, "vision-language", companions)
