"""Every decoder family on every target against `transformers`, by the proofs of families.py."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Make
from families import FAMILY_CASES, KNOWN, LIMITS, PROOFS, list_cases, measure, unfold
from models import TINY, draw_ids, load_sites, redraw_weights, write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import lime_edge
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.adapter import read_adapter
from lime_edge.compiler.formats.decoder import read_decoder_backbone
from lime_edge.compiler.formats.families import FAMILIES, UNSUPPORTED, explain
from lime_edge.compiler.formats.interchange import export_expert
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.decoder import DecoderModule
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions

sys.path.append(str(Path(__file__).parent.parent / "tools"))
# each with what no other has: caps and norms on both sides; neighbours turned in a part, a product of gate and up;
# LayerNorm, parallel, norms of each head; a norm over all heads, norms behind; a norm after the rotation
LOWERED = ("gemma2", "glm4", "stablelm-parallel", "olmo2", "hunyuan")
GGUF_LEAVES = {
    **{"q": "attn_q", "k": "attn_k", "v": "attn_v", "qkv": "attn_qkv", "o": "attn_output"},
    **{"gate": "ffn_gate", "up": "ffn_up", "gate_up": "ffn_up", "down": "ffn_down"},
}
GGUF = {
    **{"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "olmo3": "olmo2"},
    **{"hunyuan": "hunyuan-dense", "ernie4_5": "ernie4_5", "exaone4": "exaone4", "arcee": "arcee"},
    **{"stablelm": "stablelm", "glm4": "glm4", "cohere": "command-r", "cohere2": "cohere2"},
}
ROUTED = {"phi3": "qkv_proj", "cohere2": "q_proj", "olmo2": "up_proj"}


def build(name: str, tiny_model: Make, tiny_adapter: Make) -> tuple[Path, Path]:
    case = FAMILY_CASES[name]
    model = tiny_model(case.family, **case.changes)
    return model, tiny_adapter(model, targets=case.targets, shared=case.shared)


def test_every_family_has_a_case() -> None:
    assert all(list_cases(family) for family in FAMILIES)
    assert {case.family for case in {**KNOWN, **FAMILY_CASES}.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_torch_and_onnx_equal_transformers(name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(name, tiny_model, tiny_adapter)
    bundle = tiny_bundle(model, adapter)
    for target in ("torch", "onnx"):
        error = PROOFS[target](model, adapter, bundle)
        assert error < LIMITS[target], f"{name}, {target}: {error:.3g}"


@pytest.mark.parametrize("name", ROUTED)
def test_routing(name: str, tiny_model: Make, tiny_bundle: Make, tiny_adapter: Make) -> None:
    """The first columns of a product that a checkpoint knows as one are what routing reads."""
    model = tiny_model(FAMILY_CASES[name].family, **FAMILY_CASES[name].changes)
    adapter = tiny_adapter(model, targets=(ROUTED[name],), routing={"top_k": 2, "n_gram": 3})
    session, unfolded, ids = (
        lime_edge.open_decoder(tiny_bundle(model, adapter), threads=1),
        unfold(model, adapter),
        draw_ids(29),
    )
    session.use("routed")
    wanted = unfolded.logits({"input_ids": ids})[0].numpy()
    assert measure(session.logits(ids[0].tolist()), wanted) < LIMITS["onnx"]
    unfolded.use(0)
    assert measure(unfolded.logits({"input_ids": ids})[0].numpy(), wanted) > 0.01, "routing changes too little"


@pytest.mark.parametrize("name", ["gemma3", "glm4", "stablelm-parallel"])
def test_integers(name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """int4: the graph gives what the oracle gives with the same integers."""
    model, adapter = build(name, tiny_model, tiny_adapter)
    how: dict[str, Any] = {"quant": "int4", "rounding": "nearest", "keep_int8": ()}
    session = lime_edge.open_decoder(tiny_bundle(model, adapter, **how), threads=1)
    module = DecoderModule(compile_checkpoint(read_checkpoint(model, adapter), CompileOptions(**how)))
    d, ids = session._bank.residual("expert1"), draw_ids(29)
    session.use("expert1")
    found, wanted = session.logits(ids[0].tolist()), module(ids, torch.from_numpy(d.copy()))[0].numpy()
    assert measure(found, wanted) < 0.1, "the runtime rounds activations to int8"
    assert np.mean(found.argmax(-1) == wanted.argmax(-1)) > 0.8


@pytest.mark.check
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_coreml_equals_the_oracle(name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(name, tiny_model, tiny_adapter)
    error = PROOFS["coreml"](model, adapter, tiny_bundle(model, adapter, targets=("coreml",)))
    assert error < LIMITS["coreml"], f"{name}: {error:.3g}"


@pytest.mark.check
@pytest.mark.parametrize("name", LOWERED)
def test_executorch_equals_transformers(name: str, tiny_model: Make, tiny_adapter: Make, tiny_bundle: Make) -> None:
    model, adapter = build(name, tiny_model, tiny_adapter)
    error = PROOFS["executorch"](model, adapter, tiny_bundle(model, adapter, targets=("executorch",)))
    assert error < LIMITS["executorch"], f"{name}: {error:.3g}"


def test_reasons_of_what_is_not_supported() -> None:
    named = [family for families in UNSUPPORTED.values() for family in families]
    assert len(named) == len(set(named)) and not set(named) & set(FAMILIES)
    assert "a mixture of experts" in explain("mixtral") and "nobody has written" in explain("unheard_of")


def test_models_page_is_of_this_code() -> None:
    """docs/models.md has a row for exactly the families in code, each proved on every target."""
    from model_table import PAGE, RESULTS, TITLES, render

    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [*rows] == [*FAMILIES], "run tools/model_table.py"
    for family, found in rows.items():
        assert found.keys() == TITLES.keys(), f"{family}: run tools/model_table.py"
        assert all(proof["error"] < LIMITS[target] for target, proof in found.items())
        assert found["onnx"]["cases"] == len(list_cases(family)), f"{family}: run tools/model_table.py"
    assert PAGE.read_text(encoding="utf-8") == render(rows), "run tools/model_table.py --render"


def test_text_of_a_multimodal_model(tmp_path: Path, tiny_adapter: Make, tiny_bundle: Make) -> None:
    """Gemma 3 with a tower: the decoder's names are the modules', those of an adapter that was trained on it too."""
    text = {**TINY, **FAMILY_CASES["gemma3"].changes}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**tower, "image_size": 28, "patch_size": 14}
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    redraw_weights(model, 0)
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model", TINY["vocab_size"])
    assert read_decoder_backbone(tmp_path / "model").decoder.stem == "model.language_model"
    named = {name: t.contiguous() for name, t in model.state_dict().items() if ".language_model." in name}
    (tmp_path / "named").mkdir()
    save_file({name: tensor.clone() for name, tensor in named.items()}, tmp_path / "named/model.safetensors")
    adapter = tiny_adapter(tmp_path / "named", targets=("q_proj", "up_proj"))
    session, ids = lime_edge.open_decoder(tiny_bundle(tmp_path / "model", adapter), threads=1), draw_ids(29)
    unfolded = UnfoldedModel(model, *load_sites(adapter))
    for selection, mode in ((None, None), ("expert1", 1)):
        session.use(selection)
        unfolded.use(mode)
        wanted = unfolded.logits({"input_ids": ids})[0].numpy()
        assert measure(session.logits(ids[0].tolist()), wanted) < LIMITS["onnx"], selection


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights(shards: int, tiny_model: Make, tmp_path: Path) -> None:
    """pytorch_model.bin, whole and in shards, gives the backbone that safetensors gives."""
    model = tiny_model("phi3")
    wanted, folder = read_decoder_backbone(model), tmp_path / "model"
    shutil.copytree(model, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-{index}.bin" for index in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    places = {name: names[index % shards] for index, name in enumerate(state)}
    for file in names:
        torch.save({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    found = read_decoder_backbone(folder)
    assert found.fingerprint == wanted.fingerprint and found.decoder == wanted.decoder


@pytest.mark.parametrize("name", GGUF)
def test_gguf_names(name: str, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    """llama.cpp's architecture and tensors; its rows are in the checkpoint's order but for those of Llama's kin."""
    import gguf

    model, adapter = build(name, tiny_model, tiny_adapter)
    export_expert(adapter, "expert1", "gguf", tmp_path / "one.gguf", model)
    reader, read = gguf.GGUFReader(tmp_path / "one.gguf"), read_adapter(adapter)
    assert reader.get_field("general.architecture").contents() == GGUF[name]
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(found) == 2 * len(read.sites)
    for site, tensors in read.sites.items():
        layer, leaf = site.split(".")[2], site.rsplit(".", 1)[-1].removesuffix("_proj")
        rows = found[f"blk.{layer}.{GGUF_LEAVES[leaf]}.weight.lora_b"]
        assert tensors.b is not None
        wanted = (tensors.vectors()[1][:, None] * tensors.b).numpy()
        moved = GGUF[name] == "arcee" and leaf in ("q", "k")
        assert np.allclose(rows, wanted, rtol=0, atol=1e-6) is not moved, site


@pytest.mark.parametrize("name", ["phi3", "gemma2"])
def test_gguf_models(name: str, tiny_model: Make, tmp_path: Path) -> None:
    """A GGUF file gives the backbone that safetensors gives: fused products, norms of 1 + w."""
    import gguf

    model = tiny_model(FAMILY_CASES[name].family, **FAMILY_CASES[name].changes)
    wanted, architecture = read_decoder_backbone(model), GGUF[name]
    config, c = AutoConfig.from_pretrained(model), wanted.decoder
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    names = gguf.get_tensor_name_map(kind, len(c.layers))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(len(c.layers))
    writer.add_feed_forward_length(c.intermediate)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    for tensor_name, tensor in wanted.tensors.items():  # norms as they multiply, which is how GGUF has them
        writer.add_tensor(names.get_name(tensor_name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_decoder_backbone(tmp_path / "model.gguf")
    assert found.decoder.block.norms == c.block.norms and found.decoder.block.fused == c.block.fused
    assert found.tensors.keys() == wanted.tensors.keys()
    worst = {name: float((found.tensors[name] - tensor).abs().max()) for name, tensor in wanted.tensors.items()}
    assert max(worst.values()) < 1e-6, worst
