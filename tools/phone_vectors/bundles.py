"""The tiny bundles: every variant, fold, precision and kind of model that a phone may be given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from encoder_conformance import export_fixture  # noqa: E402
from models import make_adapter, make_model  # noqa: E402
from test_variants import make_prompt_adapter  # noqa: E402

from lime_edge.bundle.manifest import SEAL, seal_of  # noqa: E402
from lime_edge.compiler.options import CompileOptions  # noqa: E402
from lime_edge.export.pipeline import ExportOptions, export_bundle  # noqa: E402
from lime_edge.targets.devices import find_device  # noqa: E402

FIXTURES = REPOSITORY / "tests" / "fixtures" / "conformance" / "models"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADER = {"kind": "generation_prompt", "tokens": 5}
# name -> (adapter options, compile options); one llama model under all of them
DECODERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {"quant": "none"}),
    "lora-int4": ({"targets": LINEARS, "shared": True, "rank": 8}, {"quant": "int4"}),
    "lora-int8": ({"shared": True}, {"quant": "int8", "fold": "none"}),
    "lora-fold": ({}, {"quant": "none", "fold": "expert1"}),
    "lora-single": ({}, {"quant": "none", "fold": "expert0", "single": True}),
    "lora-fa": ({"variant": "lora_fa", "shared": True}, {"quant": "none"}),
    "dora": ({"variant": "dora"}, {"quant": "none"}),
    "slicefine": ({"variant": "slicefine"}, {"quant": "none"}),
    "soft": ({"targets": LINEARS, "routing": {"top_k": 2}}, {"quant": "none"}),
    "auto": ({"routing": {"auto_topk": True, "auto_topk_threshold": 0.6}}, {"quant": "int4"}),
    "activated": ({"targets": LINEARS, "activation": HEADER}, {"quant": "int4"}),
    "activated-soft": ({"activation": HEADER, "routing": {"top_k": 2}}, {"quant": "none"}),
}
DEFAULTS = {"lora-fold": "expert2", "lora-int8": "none", "auto": "routed"}  # what they open with; else the first expert
PROMPTED: dict[str, dict[str, Any]] = {
    "prompt": {"input_conditioned": False},
    "prompt-conditioned": {"input_conditioned": True, "input_conditioning_mode": "attention"},
}
FAMILIES = {"qwen3": "qwen3", "smollm3": "smollm3"}
PLAIN = {"quant": "none"}
ENCODERS = {"bert": "bert-lora-cls", "vit": "vit-lora-cls"}


def write_bundles(folder: Path, work: Path) -> tuple[list[str], list[str]]:
    """Export all of them.

    Args:
        folder: where NAME.lime come. work: for models and adapters on the way.
    Returns:
        Names of decoders and of encoders.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(work / "llama", "llama")
    for name, (adapter, options) in DECODERS.items():
        made = make_adapter(work / f"{name}-adapter", model, **adapter)
        export_decoder(model, made, folder / f"{name}.lime", options, DEFAULTS.get(name))
    for name, family in FAMILIES.items():
        changes = {"no_rope_layers": [1, 0]} if family == "smollm3" else {"head_dim": 32}
        own = make_model(work / family, family, **changes)
        export_decoder(own, make_adapter(work / f"{name}-adapter", own), folder / f"{name}.lime", PLAIN)
    other = make_adapter(work / "foreign-adapter", model, seed=7)  # the same sites, another shared adapter
    export_decoder(model, other, folder / "foreign.lime", PLAIN)
    for name, fixture in ENCODERS.items():
        export_fixture(FIXTURES / fixture, work / name).rename(folder / f"{name}.lime")
    for name, changes in PROMPTED.items():
        export_decoder(model, make_prompt_adapter(work / name, model, **changes), folder / f"{name}.lime", PLAIN)
    return [*DECODERS, *FAMILIES, *PROMPTED], list(ENCODERS)


def seal(body: dict[str, Any]) -> bytes:
    """The bytes of a lime.json whose own hash fits."""
    data = json.dumps(body, indent=1).encode()
    return SEAL.sub(lambda found: found[1] + seal_of(data).encode() + found[3], data, count=1)


def export_decoder(
    model: Path, adapter: Path, output: Path, options: dict[str, Any], default: str | None = None
) -> None:
    """One bundle with the ONNX target."""
    exporting = ExportOptions(("onnx",), default=default)
    export_bundle(model, adapter, output, CompileOptions(**options), find_device("cpu"), exporting)
