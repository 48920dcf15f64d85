"""README's sizes and figures are what its commands give: held to the formats of today, without the real model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Make = Callable[..., Path]
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMOLLM2 = {  # SmolLM2-135M, but for the number of its layers
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    import sizes

    return sizes


@pytest.fixture(scope="module")
def told(tool: ModuleType) -> dict[str, Any]:
    """What `make sizes` wrote last."""
    read: dict[str, Any] = json.loads(tool.SIZES.read_text())
    return read


@pytest.mark.check
def test_the_sizes_are_those_of_todays_formats(
    tool: ModuleType, told: dict[str, Any], tiny_model: Make, tiny_adapter: Make, tmp_path: Path
) -> None:
    """One layer and two layers of these widths give what a layer takes; the real model has 30 of them."""
    for name, kept in tool.EXPORTS.items():
        facts = told["exports"][name]
        one, two = (
            tool.weigh(model, tiny_adapter(model, rank=8, experts=16), kept, tmp_path)
            for model in (tiny_model(num_hidden_layers=count, **SMOLLM2) for count in (1, 2))
        )
        for count, real in facts["total"].items():
            first, second = (it["total"][count] - it["tokenizer"] for it in (one, two))
            computed = first + (facts["layers"] - 1) * (second - first) + facts["tokenizer"]
            assert computed == pytest.approx(real, rel=0.005), f"{name}, {count} skills: run `make sizes`"
        assert facts["sum_h"] == facts["layers"] * two["sum_h"] / 2
        assert facts["expert"] - 2 * facts["sum_h"] == pytest.approx(two["expert"] - 2 * two["sum_h"], abs=16)


def test_readme_tells_them(tool: ModuleType, told: dict[str, Any]) -> None:
    assert tool.write_table(README, told) == README, "run `make sizes`"
    small = told["exports"]["--keep-int8 none"]
    text = " ".join(README.split())
    assert f"a skill is `sum_H` numbers ({small['sum_h']:,} for SmolLM2-135M: {small['expert'] / 1e3:.0f} kB" in text


def test_the_first_table_is_the_measured_one(told: dict[str, Any]) -> None:
    """Disk, memory and switch of 100 skills, and a decode step's time, as `make bench-peers` measured them; what it
    built its bundles with is what the commands give today."""
    measured = json.loads((ROOT / "docs" / "benchmarks-2-cores.json").read_text())
    (scaling,) = [run for run in measured["scaling"] if run["model"] == "smollm2"]
    rows = {(row["method"], row["experts"]): row for row in scaling["rows"]}
    for method, label in (("lime", "LiME experts, rank 8"), ("lora", "LoRA adapters, rank 64")):
        row = rows[method, 100]
        cells = f"{row['bytes'] / 1e6:,.0f} MB | {row['rss_bytes'] / 1e6:,.0f} MB | {row['switch_us']['p95']:.0f} us |"
        assert f"| {label} | {cells}" in README
    copies = rows["copies", 100]["bytes"] / 1e6
    assert f"| copies of the model | {copies:,.0f} MB |" in README
    assert rows["lime", 100]["bytes"] == pytest.approx(told["exports"]["--keep-int8 none"]["total"]["100"], rel=0.05)
    decoded = {run["threads"]: run["rows"] for run in measured["decode"] if run["model"] == "smollm2"}
    for label, own, base in (
        ("LiME, pinned", "ours-pinned", "ours-merged"),
        ("LiME, routed over 8 experts per token", "ours-routed", "ours-merged"),
        ("LoRA, rank 8, in llama.cpp", "llama-lora", "llama"),
        ("LoRA, rank 8, in ONNX Runtime GenAI", "genai-lora", "genai"),
    ):
        cells = " | ".join(
            f"{decoded[n][own]['decode_ms']:.2f} ms, {decoded[n][own]['decode_ms'] / decoded[n][base]['decode_ms']:.2f}"
            for n in (1, 2)
        )
        assert f"| {label} | {cells} |" in README, cells
