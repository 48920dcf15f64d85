"""The tiny bundles: every variant, fold, precision and kind of model that a phone may be given."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from encoder_conformance import export_fixture  # noqa: E402
from models import make_adapter, make_model  # noqa: E402

from lime_edge.bundle.manifest import SEAL, seal_of  # noqa: E402
from lime_edge.compiler.options import CompileOptions  # noqa: E402
from lime_edge.export.pipeline import ExportOptions, export_bundle  # noqa: E402
from lime_edge.targets.devices import find_device  # noqa: E402

FIXTURES = REPOSITORY / "tests" / "fixtures" / "conformance" / "models"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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
}
FAMILIES = {"qwen3": "qwen3", "smollm3": "smollm3"}
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
        export_decoder(
            model, make_adapter(work / f"{name}-adapter", model, **adapter), folder / f"{name}.lime", options
        )
    for name, family in FAMILIES.items():
        changes = {"no_rope_layers": [1, 0]} if family == "smollm3" else {"head_dim": 32}
        own = make_model(work / family, family, **changes)
        export_decoder(own, make_adapter(work / f"{name}-adapter", own), folder / f"{name}.lime", {"quant": "none"})
    other = make_adapter(work / "foreign-adapter", model, seed=7)  # the same sites, another shared adapter
    export_decoder(model, other, folder / "foreign.lime", {"quant": "none"})
    for name, fixture in ENCODERS.items():
        export_fixture(FIXTURES / fixture, work / name).rename(folder / f"{name}.lime")
    write_activated(folder / "lora-int4.lime", folder / "activated.lime")
    return [*DECODERS, *FAMILIES, "activated"], list(ENCODERS)


def write_activated(bundle: Path, output: Path) -> None:
    """A copy whose experts act from the generation prompt on: the original model reads what lies before it."""
    shutil.copytree(bundle, output)
    body = json.loads((output / "lime.json").read_text(encoding="utf-8"))
    body["activation"] = {"kind": "generation_prompt", "tokens": 5, "text": body["prompts"]["opening"]}
    (output / "lime.json").write_bytes(seal(body))


def seal(body: dict[str, Any]) -> bytes:
    """The bytes of a lime.json whose own hash fits."""
    data = json.dumps(body, indent=1).encode()
    return SEAL.sub(lambda found: found[1] + seal_of(data).encode() + found[3], data, count=1)


def export_decoder(model: Path, adapter: Path, output: Path, options: dict[str, Any]) -> None:
    """One bundle with the ONNX target."""
    export_bundle(model, adapter, output, CompileOptions(**options), find_device("cpu"), ExportOptions(("onnx",)))
