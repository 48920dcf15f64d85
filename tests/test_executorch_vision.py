"""Vision-language models on ExecuTorch: what is seen and said is the authors' and the oracle's."""

from __future__ import annotations

from pathlib import Path

import pytest
import vision_conformance

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
