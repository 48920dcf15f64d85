"""Checkpoints that are quantized already are refused in one sentence, before anything is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import Cli

from lime_edge.compiler.formats.decoder import read_decoder_backbone
from lime_edge.compiler.formats.encoder import read_encoder_backbone
from lime_edge.compiler.formats.prequantized import refuse_prequantized
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.targets.devices import find_device

Make = Callable[..., Path]
# What these tools write into config.json, shortened
CLAIMS: dict[str, dict[str, Any]] = {
    "GPTQ, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "AWQ, 4 bits": {"quant_method": "awq", "bits": 4, "zero_point": True},
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    "FP8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    return Cli(capsys, monkeypatch)


def refuse(lime: Cli, model: Path, adapter: Path, tmp_path: Path) -> str:
    error = lime.refuse("export", model, "--adapter", adapter, "-o", tmp_path / "x.lime")
    assert "take the original checkpoint of the same model" in error and not (tmp_path / "x.lime").exists()
    return error


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_config_claims(lime: Cli, name: str, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": CLAIMS[name]}
    (model / "config.json").write_text(json.dumps(config))
    assert f"its weights are quantized already ({name});" in refuse(lime, model, tiny_adapter(), tmp_path)


def test_what_the_tensors_show(lime: Cli, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    eight = tensors | {name: tensors[name].to(torch.float8_e4m3fn)}
    save_file(eight, model / "model.safetensors")
    assert "quantized already (FP8)" in refuse(lime, model, tiny_adapter(), tmp_path)
    packed = tensors | {name.replace("weight", "qweight"): torch.zeros(8, 64, dtype=torch.int32)}
    save_file(packed, model / "model.safetensors")
    assert "quantized already (GPTQ or AWQ)" in refuse(lime, model, tiny_adapter(), tmp_path)


def test_the_library_refuses_as_the_command_line_does(tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    """Who calls the library gets the same sentence, from every function that reads a model, and nothing is written."""
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    out, adapter = tmp_path / "x.lime", tmp_path / "no adapter: the model is refused before anything is read"
    for call in (
        lambda: export_bundle(model, adapter, out, CompileOptions(), find_device("cpu"), ExportOptions()),
        lambda: read_checkpoint(model, tiny_adapter()),
        lambda: read_decoder_backbone(model),
        lambda: read_encoder_backbone(model),
    ):
        with pytest.raises(LimeEdgeError, match=r"its weights are quantized already \(FP8\); the adapter is folded"):
            call()
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_float_checkpoints_pass(tiny_model: Make, tmp_path: Path) -> None:
    refuse_prequantized(tiny_model())
    refuse_prequantized(tmp_path / "none.gguf")
    (tmp_path / "model.safetensors").write_bytes(np.arange(3).tobytes())
    (tmp_path / "config.json").write_text("[1]")
    refuse_prequantized(tmp_path)
