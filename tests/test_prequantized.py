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
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

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


FP8: dict[str, dict[str, Any]] = {
    "blocks": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    "odd blocks": {"quant_method": "fp8", "weight_block_size": [48, 32]},
    "rows": {"quant_method": "fbgemm_fp8"},
    "whole": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


@pytest.mark.parametrize("kind", FP8)
def test_fp8_is_read(kind: str, tiny_model: Make, tmp_path: Path) -> None:
    """A weight is its codes times their scale; blocks that do not divide it included."""
    model = Path(shutil.copytree(tiny_model("qwen3", head_dim=16), tmp_path / "model"))
    plain, stored, wanted = load_file(model / "model.safetensors"), {}, {}
    for name, weight in plain.items():
        if not name.endswith("proj.weight"):
            stored[name] = wanted[name] = weight
            continue
        whole = (1, weight.shape[1]) if kind == "rows" else weight.shape
        rows, columns = FP8[kind].get("weight_block_size", whole)
        scale = torch.stack([
            torch.stack([part.abs().max() / 448 for part in band.split(columns, 1)]) for band in weight.split(rows)
        ])  # fmt: skip
        spread = scale.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
        stored[name] = (weight / spread).to(torch.float8_e4m3fn)
        stored[name + ("_scale_inv" if "blocks" in kind else "_scale")] = scale if kind != "whole" else scale.flatten()
        wanted[name] = stored[name].float() * spread
        assert 0 < (wanted[name] - weight).abs().max() < 0.1 * weight.abs().max()
    save_file(stored, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": FP8[kind]}
    (model / "config.json").write_text(json.dumps(config))
    found = read_decoder_backbone(model).tensors
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    if kind == "blocks":
        how = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=how).state_dict()
        assert all(torch.equal(found[name], theirs[name]) for name in found)
    name = next(name for name in stored if "_scale" in name)
    save_file(stored | {name: torch.ones(3, 5)}, model / "model.safetensors")
    with pytest.raises(LimeEdgeError, match=r"its scale: expected one, one a row or one a block, found \(3, 5\)"):
        read_decoder_backbone(model)
