"""The tool that measures many skills at once: every table, on a tiny model, and the page it writes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import many_skills

Make = Callable[..., Path]


def test_every_table(
    tiny_model: Make,
    tiny_adapter: Make,
    tiny_bundle: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model(max_position_embeddings=512)
    activation = {"kind": "generation_prompt", "tokens": 3}
    bundles = [tiny_bundle(model, tiny_adapter(model, activation=given)) for given in (None, activation)]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{many_skills.BEGIN}\nold\n{many_skills.END}\nafter\n")
    for name, value in (("PAGE", page), ("LONG", 240), ("NEW", 4), ("SIZES", (1, 2)), ("STEPS", 2)):
        monkeypatch.setattr(many_skills, name, value)
    words = ["many_skills.py", str(bundles[0]), "--activated", str(bundles[1]), "--threads", "1", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [*words, "--write"])
    many_skills.main()
    printed, written = capsys.readouterr().out, page.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert printed.strip() in written
    for line in ("| 2 | ", "| always acts, ", "| activated, 240 tokens, 1 thr. | prompts |", "| activated, 1 thr. |"):
        assert f"\n{line}" in printed, line


def test_one_prefill_is_read_once(tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """What is compared are the same answers: as many tokens of every skill, in one pass and alone."""
    import lime_edge

    session = lime_edge.open_decoder(tiny_bundle(), threads=1)
    for run in (many_skills.run_pass, many_skills.run_single):
        whole, prompts, steps = run(session, [5, 6, 7], 4)
        assert 0 < prompts + steps <= whole
