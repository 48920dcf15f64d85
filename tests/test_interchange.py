"""Pinned experts as plain LoRAs: loaded by `peft`, and read back from GGUF, against the unfolded model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import typer
from torch import nn
from typer.testing import CliRunner

from lime_edge.cli import interchange as cli_interchange
from lime_edge.compiler.formats.adapter import Adapter, read_adapter, write_adapter
from lime_edge.compiler.formats.decoder import read_decoder_backbone
from lime_edge.compiler.formats.hyper import ImportOptions
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.formats.interchange import export_expert, pin_expert
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.errors import LimeEdgeError

FIXTURES = Path(__file__).parent / "fixtures/conformance/models"
LIMIT = 1e-4
FAMILIES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "smollm3": "SmolLM3Config",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "granite": "GraniteConfig",
    "seed_oss": "SeedOssConfig",
}
GGUF_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
NAMES = ("red", "green", "blue")
BLEND = {"red": 0.6, "blue": 0.4}


def make_base(directory: Path, family: str = "llama") -> nn.Module:
    """A tiny model with SmolLM2's ratio of heads: three query heads share one key head."""
    torch.manual_seed(1)
    config = getattr(transformers, FAMILIES[family])(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(directory)
    return model


def make_adapter(directory: Path, model: nn.Module, leaves: tuple[str, ...], shared: bool = True) -> Adapter:
    """A random LoRA with experts from N(1, 0.5), far enough from 1 that forgetting them shows."""
    random = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in leaves and isinstance(module, nn.Linear):
            tensors[f"{name}.A"] = torch.randn(4, module.in_features, generator=random) * 0.2
            tensors[f"{name}.B"] = torch.randn(module.out_features, 4, generator=random) * 0.2
            tensors[f"{name}.LiMEs"] = 1 + 0.5 * torch.randn(3, module.out_features, generator=random)
            if shared:
                tensors[f"{name}.LiME_shared"] = torch.randn(module.out_features, generator=random)
                tensors[f"{name}.gamma"] = torch.tensor([0.3])
    config = {
        "peft_type": "LIME",
        "variant": "lora_fa",
        "target_modules": list(leaves),
        "r": 4,
        "lora_alpha": 6.5,
        "num_experts": 3,
        "expert_names": list(NAMES),
        "use_shared_lime": shared,
    }
    directory.mkdir()
    return write_adapter(directory, config, tensors)


def unfold(base: Path, adapter: Adapter, mode: int | dict[int, float] | None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    sites = {name: site.tensors() for name, site in adapter.sites.items()}
    unfolded = UnfoldedModel(model, sites, adapter.hyper())
    unfolded.use(mode)
    return unfolded.logits({"input_ids": IDS})


IDS = torch.arange(1, 14).unsqueeze(0)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path, Adapter]:
    model = make_base(tmp_path / "base", request.param)
    adapter = make_adapter(tmp_path / "adapter", model, tuple(GGUF_NAMES))
    return request.param, tmp_path / "base", tmp_path / "adapter", adapter


def load_peft(base: Path, directory: Path) -> torch.Tensor:
    import peft

    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), directory)
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("selection", ["green", BLEND], ids=["pinned", "blend"])
def test_peft_loads_the_export_and_gives_our_logits(
    family: tuple[str, Path, Path, Adapter], selection: str | dict[str, float], tmp_path: Path
) -> None:
    _, base, directory, adapter = family
    export_expert(directory, selection, "peft", tmp_path / "lora", base)
    found = load_peft(base, tmp_path / "lora")
    mode = 1 if selection == "green" else {0: 0.6, 2: 0.4}
    error = float((unfold(base, adapter, mode) - found).abs().max())
    assert error <= LIMIT
    assert float((unfold(base, adapter, 0) - found).abs().max()) > 100 * LIMIT, "another expert must differ"
    assert float((unfold(base, adapter, None) - found).abs().max()) > 100 * LIMIT, "no expert must differ"


def test_forgetting_the_expert_would_be_noticed(family: tuple[str, Path, Path, Adapter], tmp_path: Path) -> None:
    """The same export with p = 1 in place of the expert gives other logits: the test above can fail."""
    _, base, directory, adapter = family
    config = json.loads((directory / "adapter_config.json").read_text()) | {"use_shared_lime": False}
    tensors = {
        f"{name}.{part}": torch.ones_like(t) if part == "LiMEs" else t
        for name, site in adapter.sites.items()
        for part, t in site.tensors().items()
        if part in ("A", "B", "LiMEs")
    }
    (tmp_path / "ones").mkdir()
    write_adapter(tmp_path / "ones", config, tensors)
    export_expert(tmp_path / "ones", "green", "peft", tmp_path / "lora", base)
    assert float((unfold(base, adapter, 1) - load_peft(base, tmp_path / "lora")).abs().max()) > 100 * LIMIT


@pytest.mark.parametrize("name", ["llama-lora-auto", "llama-lora-sparse", "llama-lora_fa", "qwen2-lora-soft"])
def test_fixtures_through_peft_give_the_pinned_logits(name: str, tmp_path: Path) -> None:
    """From the authors' checkpoint through our adapter to `peft`, against the authors' own logits."""
    import peft
    from safetensors.torch import load_file

    expected = load_file(FIXTURES / name / "expected.safetensors")
    import_checkpoint(FIXTURES / name, tmp_path / "in", ImportOptions())
    for expert in range(4):
        export_expert(tmp_path / "in/adapter", f"expert_{expert}", "peft", tmp_path / f"lora{expert}")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in/backbone", dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, tmp_path / f"lora{expert}").eval()
        with torch.no_grad():
            found = model(expected["in.input_ids"]).logits
        # adding gamma p_shared before multiplying moves llama-lora-auto by some 1e-5 (layers.compose)
        assert float((found - expected[f"pinned_logits.{expert}"]).abs().max()) <= LIMIT, (name, expert)


def pair_rows(rows: int, heads: int) -> list[int]:
    """For each row of a GGUF llama's q or k, the row of the transformers weight: written out, by hand."""
    order = []
    width = rows // heads
    for head in range(heads):
        for pair in range(width // 2):
            order += [head * width + pair, head * width + pair + width // 2]
    return order


def test_gguf_holds_a_and_b_in_the_rows_of_its_architecture(
    family: tuple[str, Path, Path, Adapter], tmp_path: Path
) -> None:
    import gguf

    name, base, directory, adapter = family
    export_expert(directory, BLEND, "gguf", tmp_path / "mix.gguf", base)
    reader = gguf.GGUFReader(tmp_path / "mix.gguf")
    fields = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF.")}
    architecture = "llama" if name == "mistral" else name
    assert fields["general.architecture"] == architecture
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == 6.5
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 2 * len(adapter.sites) == 2 * 4 * 7
    for site, found in adapter.sites.items():
        layer, leaf = site.split(".")[2], site.rsplit(".", 1)[-1]
        target = f"blk.{layer}.{GGUF_NAMES[leaf]}.weight"
        assert found.a is not None and found.b is not None
        p = 0.6 * found.vectors()[0] + 0.4 * found.vectors()[2]
        expected = (p[:, None] * found.b).numpy()
        if leaf in ("q_proj", "k_proj") and name in ("llama", "mistral", "smollm3", "granite"):
            expected = expected[pair_rows(len(expected), 6 if leaf == "q_proj" else 2)]
        assert np.array_equal(tensors[f"{target}.lora_a"], found.a.numpy()), site
        assert np.allclose(tensors[f"{target}.lora_b"], expected, rtol=0, atol=1e-6), site


def write_gguf_model(
    path: Path, base: Path, adapter: dict[str, np.ndarray], alpha: float, quant: str | None = None
) -> None:
    """A GGUF llama, its rows ordered by `pair_rows`, with the adapter merged as llama.cpp applies it.

    Args:
        quant: of matrices (Q8_0, Q4_0, ...); None leaves them float32.
    """
    import gguf

    config = transformers.AutoConfig.from_pretrained(base)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for name, tensor in model.state_dict().items():
        target = names.get_name(name, try_suffixes=(".weight",))
        weight = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight[pair_rows(len(weight), heads)]
        if f"{target}.lora_a" in adapter:
            a, b = adapter[f"{target}.lora_a"], adapter[f"{target}.lora_b"]
            weight = weight + alpha / a.shape[0] * (b @ a)
        weight = np.ascontiguousarray(weight)
        if quant is None or weight.ndim != 2:
            writer.add_tensor(target, weight)
            continue
        kind = getattr(gguf.GGMLQuantizationType, quant)
        writer.add_tensor(target, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("apply", [True, False])
def test_gguf_adapter_merged_into_a_gguf_model_gives_our_logits(apply: bool, tmp_path: Path) -> None:
    """Merge in GGUF's row order, then let transformers' own GGUF reader undo the order."""
    import gguf

    model = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", model, tuple(GGUF_NAMES))
    export_expert(tmp_path / "adapter", "blue", "gguf", tmp_path / "blue.gguf", tmp_path / "base")
    reader = gguf.GGUFReader(tmp_path / "blue.gguf")
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    (tmp_path / "merged").mkdir()
    write_gguf_model(tmp_path / "merged/model.gguf", tmp_path / "base", tensors if apply else {}, alpha)
    merged = read_decoder_backbone(tmp_path / "merged").tensors
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_state_dict(merged, strict=False)
    with torch.no_grad():
        error = float((loaded(IDS).logits - unfold(tmp_path / "base", adapter, 2)).abs().max())
    assert error <= LIMIT if apply else error > 100 * LIMIT


@pytest.mark.parametrize(
    ("selection", "wanted"),
    [
        ("pink", "unknown expert 'pink'"),
        ({"red": 0.5, "pink": 0.5}, "unknown expert 'pink'"),
        ({"red": 0.5, "blue": 0.4}, "sum to 0.9"),
        (None, "unknown expert none"),
        ({"red": float("nan")}, "sum to nan"),
    ],
)
def test_bad_selections(selection: object, wanted: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"), ("q_proj",))
    with pytest.raises(LimeEdgeError, match=wanted):
        pin_expert(adapter, selection)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "reason"), [("llama-dora-ngram", "magnitude"), ("llama-slicefine", "multiplies")])
def test_other_variants_are_refused_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    import_checkpoint(FIXTURES / name, tmp_path / "in", ImportOptions())
    for form in ("peft", "gguf"):
        with pytest.raises(LimeEdgeError, match=reason):
            export_expert(tmp_path / "in/adapter", "expert_0", form, tmp_path / "out", tmp_path / "in/backbone")
    assert not (tmp_path / "out").exists()


def test_encoders_go_to_peft_only(tmp_path: Path) -> None:
    import_checkpoint(FIXTURES / "bert-lora-cls", tmp_path / "in", ImportOptions())
    adapter, base = tmp_path / "in/adapter", tmp_path / "in/backbone"
    export_expert(adapter, "expert_2", "peft", tmp_path / "lora")
    with pytest.raises(LimeEdgeError, match="model_type"):
        export_expert(adapter, "expert_2", "gguf", tmp_path / "x.gguf", base)
    import peft
    from safetensors.torch import load_file

    expected = load_file(FIXTURES / "bert-lora-cls/expected.safetensors")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    with torch.no_grad():
        inputs = {key.removeprefix("in."): t for key, t in expected.items() if key.startswith("in.")}
        found = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()(**inputs).logits
    assert float((found - expected["pinned_logits.2"]).abs().max()) <= LIMIT


def test_another_model_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"), ("q_proj",))
    make_base(tmp_path / "deep", "qwen3")
    import_checkpoint(FIXTURES / "llama-lora-auto", tmp_path / "in", ImportOptions())
    with pytest.raises(LimeEdgeError, match="does not fit"):
        export_expert(tmp_path / "adapter", "red", "gguf", tmp_path / "x.gguf", tmp_path / "in/backbone")
    with pytest.raises(LimeEdgeError, match="`model`: a gguf needs the base"):
        export_expert(tmp_path / "adapter", "red", "gguf", tmp_path / "x.gguf")
    with pytest.raises(LimeEdgeError, match="peft or gguf"):
        export_expert(tmp_path / "adapter", "red", "onnx", tmp_path / "x")
    assert not (tmp_path / "x.gguf").exists()


def test_command_line(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"), ("q_proj", "v_proj"))
    app = typer.Typer()
    app.callback()(lambda: None)
    cli_interchange.register(app)
    run = CliRunner()
    arguments = [
        "export",
        str(tmp_path / "adapter"),
        "red=0.5,blue=0.5",
        "--format",
        "gguf",
        "--json",
        "-o",
        str(tmp_path / "mix.gguf"),
        "--model",
        str(tmp_path / "base"),
    ]
    result = run.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert (report["sites"], report["bytes"]) == (8, (tmp_path / "mix.gguf").stat().st_size)
    before = (tmp_path / "mix.gguf").read_bytes()
    again = run.invoke(app, arguments)
    assert isinstance(again.exception, LimeEdgeError) and "already exists" in str(again.exception)
    assert (tmp_path / "mix.gguf").read_bytes() == before
    assert run.invoke(app, [*arguments, "--force"]).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "mix.gguf"]
    assert read_adapter(tmp_path / "adapter").expert_names == NAMES
