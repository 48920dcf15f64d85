"""Import: the authors' checkpoints and PEFT directories, against the recorded logits and `peft` itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from typer.testing import CliRunner

from lime_edge.bundle.experts import Expert
from lime_edge.cli import import_adapter as cli_import
from lime_edge.compiler.formats.adapter import Adapter, read_adapter
from lime_edge.compiler.formats.adapter_checks import FIELDS
from lime_edge.compiler.formats.hyper import ImportOptions
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.errors import LimeEdgeError
from lime_edge.export.describe import identify

FIXTURES = Path(__file__).parent / "fixtures/conformance"
MODELS = sorted(path.name for path in (FIXTURES / "models").iterdir())
DECODERS = [name for name in MODELS if name.startswith(("llama", "qwen"))]
LIMIT = 1e-4


def load_model(directory: Path) -> nn.Module:
    """A transformers model straight from an imported backbone directory; its class is the config's."""
    config = json.loads((directory / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, report = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"], report
    assert not report["missing_keys"], report
    return model


def unfold(model: nn.Module, adapter: Adapter) -> UnfoldedModel:
    sites = {name: site.tensors() for name, site in adapter.sites.items()}
    return UnfoldedModel(model, sites, adapter.hyper())


def worst(expected: Tensor, found: Tensor) -> float:
    assert expected.shape == found.shape
    return float((expected.double() - found.double()).abs().max())


@pytest.fixture(scope="module", params=MODELS)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("import") / request.param
    import_checkpoint(FIXTURES / "models" / request.param, output, ImportOptions())
    return request.param, output


def test_every_fixture_reproduces_its_logits(imported: tuple[str, Path]) -> None:
    """Backbone and adapter, read back from our files alone: routed, and pinned to each expert."""
    name, output = imported
    expected = load_file(FIXTURES / "models" / name / "expected.safetensors")
    inputs = {key.removeprefix("in."): t for key, t in expected.items() if key.startswith("in.")}
    model = unfold(load_model(output / "backbone"), read_adapter(output / "adapter"))
    errors = {}
    for key in [key for key in expected if key == "logits" or key.startswith("pinned_logits.")]:
        model.use("routed" if key == "logits" else int(key.rpartition(".")[2]))
        errors[key] = worst(expected[key], model.logits(inputs))
    assert len(errors) == 5
    assert max(errors.values()) <= LIMIT, errors


def test_hyper_parameters_arrive(imported: tuple[str, Path]) -> None:
    name, output = imported
    hyper = json.loads((FIXTURES / "models" / name / "lime.json").read_text())
    config = json.loads((output / "adapter/adapter_config.json").read_text())
    renamed = {"rank": "r", "alpha": "lora_alpha", "use_shared_LiME": "use_shared_lime"}
    for key, value in hyper.items():
        if key != "architecture":
            assert config[renamed.get(key, key)] == value, key
    assert config.keys() <= FIELDS.keys()
    assert read_adapter(output / "adapter").routing_config.top_k == hyper["top_k"]


def test_decoders_carry_the_fingerprint_of_their_backbone(imported: tuple[str, Path]) -> None:
    name, output = imported
    config = json.loads((output / "adapter/adapter_config.json").read_text())
    if name in DECODERS:
        checkpoint = read_checkpoint(output / "backbone", output / "adapter")
        assert config["base_fingerprint"] == checkpoint.backbone.fingerprint
        assert len(checkpoint.sites) == len(checkpoint.adapter.sites)
    else:
        assert "base_fingerprint" not in config


def copy_fixture(name: str, directory: Path, hyper: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """A fixture's checkpoint in a directory of its own; returns its state for a test to change and save."""
    directory.mkdir()
    for file in ("config.json", "lime.json"):
        (directory / file).write_text((FIXTURES / "models" / name / file).read_text())
    if hyper is not None:
        (directory / "lime.json").write_text(json.dumps(hyper))
    return load_file(FIXTURES / "models" / name / "model.safetensors")


def test_hyper_parameters_from_the_command_line_and_tokenizer_files(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    state = copy_fixture("llama-dora-ngram", source)
    torch.save(state, source / "pytorch_model.bin")
    (source / "lime.json").unlink()
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(source / "tokenizer.json"))
    app = typer.Typer()
    cli_import.register(app)
    settings = [
        "variant=dora",
        "alpha=16",
        "top_k=2",
        "n_gram=3",
        "temperature=0.5",
        "gamma_routing=0.5",
        "architecture=LlamaForCausalLM",
    ]
    arguments = [str(source), "-o", str(tmp_path / "out"), "--names", "a,b,c,d", "--json"]
    for setting in settings:
        arguments += ["--set", setting]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["experts"] == ["a", "b", "c", "d"]
    adapter = read_adapter(tmp_path / "out/adapter")
    assert (adapter.variant.name, adapter.routing_config.n_gram, adapter.rank) == ("dora", 3, 2)
    assert (tmp_path / "out/backbone/tokenizer.json").is_file()
    assert read_checkpoint(tmp_path / "out/backbone", tmp_path / "out/adapter").sites.total > 0


def test_sharded_weights(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    state = copy_fixture("llama-slicefine", source)
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, source / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    import_checkpoint(source, tmp_path / "out", ImportOptions())
    assert len(read_adapter(tmp_path / "out/adapter").sites) == 8


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "dora", "slicefine"])
def test_embedding_sites(variant: str, tmp_path: Path) -> None:
    """A model whose only site is its embedding table computes what the layer fixture says."""
    layer = load_file(FIXTURES / f"layers/embedding-{variant}-soft-topk.safetensors")
    ids, expected = layer.pop("input_ids"), layer.pop("y")
    hyper = {
        "variant": variant,
        "pad_token_id": 0,
        "rank": 6 if variant == "slicefine" else 3,
        "top_k": 2,
        "temperature": 0.5,
        "use_shared_LiME": True,
        "gamma_routing": 0.6,
    }
    source = tmp_path / "checkpoint"
    source.mkdir()
    (source / "lime.json").write_text(json.dumps(hyper))
    (source / "config.json").write_text('{"model_type": "bert"}')
    save_file({f"words.{name}": tensor for name, tensor in layer.items()}, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "out", ImportOptions())
    adapter = read_adapter(tmp_path / "out/adapter")
    assert adapter.sites["words"].embedding and adapter.pad_token_id == 0
    table = load_file(tmp_path / "out/backbone/model.safetensors")["words.weight"]
    assert adapter.sites["words"].weight_shape[1] == table.shape[1] == 16

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding.from_pretrained(table)

    model = Words()
    unfold(model, adapter)
    assert worst(expected, model.words(ids)) <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_faults_of_a_state_dict_come_all_at_once(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    hyper = {"variant": "lora", "rank": 3, "num_experts": 5, "top_k": 0, "colour": 1, "rep_mode": "last"}
    state = copy_fixture("llama-lora-auto", source, hyper)
    save_file(state, source / "model.safetensors")
    with pytest.raises(LimeEdgeError) as error:
        import_checkpoint(source, tmp_path / "out", ImportOptions())
    for part in ("unknown hyper-parameter 'colour'", "top_k", "rep_mode"):
        assert part in error.value.problem
    (source / "lime.json").write_text(json.dumps({"variant": "lora", "num_experts": 5, "use_shared_LiME": False}))
    del state["model.layers.0.self_attn.k_proj.A"]
    state["model.layers.1.self_attn.k_proj.m"] = torch.zeros(32)
    save_file(state, source / "model.safetensors")
    with pytest.raises(LimeEdgeError) as error:
        import_checkpoint(source, tmp_path / "out", ImportOptions())
    for part in (
        "k_proj.A is missing",
        "k_proj.m is not a tensor",
        "num_experts: expected 5, found 4",
        "use_shared_LiME: expected False, found True",
    ):
        assert part in error.value.problem
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("fault", ["nan", "shape", "backbone", "truncated", "no-config", "rank", "variant"])
def test_a_damaged_state_dict_is_refused_and_nothing_is_left(fault: str, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    state = copy_fixture("llama-lora-auto", source)
    site = "model.layers.0.self_attn.q_proj"
    wanted = site
    if fault == "nan":
        state[f"{site}.LiMEs"][1, 2] = float("nan")
    elif fault == "shape":
        state[f"{site}.B"] = state[f"{site}.B"][:-1].clone()
    elif fault == "backbone":
        del state["model.norm.weight"]
        wanted = "model.norm.weight is missing"
    save_file(state, source / "model.safetensors")
    if fault == "truncated":
        data = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(data[: len(data) // 2])
        wanted = "not a readable safetensors file"
    elif fault == "no-config":
        (source / "config.json").unlink()
        wanted = "config.json is missing"
    wanted = "rank: expected 9, found 2" if fault == "rank" else wanted
    changed = {"rank": 9} if fault == "rank" else {"variant": "dora"} if fault == "variant" else {}
    with pytest.raises(LimeEdgeError) as error:
        import_checkpoint(source, tmp_path / "out", ImportOptions(hyper=changed))
    assert wanted in str(error.value)
    assert "partial" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["llama-dora-ngram", "llama-slicefine"])
@pytest.mark.parametrize("shape", [None, (), (3,), (3, 3), (2, 2, 2)])
def test_any_wrong_site_tensor_is_a_fault_and_never_a_crash(
    name: str, shape: tuple[int, ...] | None, tmp_path: Path
) -> None:
    site = "model.layers.0.self_attn.k_proj"
    source = tmp_path / "checkpoint"
    whole = copy_fixture(name, source)
    parts = [key for key in whole if key.startswith(f"{site}.")]
    assert len(parts) >= 5
    for key in parts:
        if shape is None and key.endswith("LiMEs"):
            continue  # then the module is no site at all: its tensors are strangers in the backbone
        state = {other: tensor for other, tensor in whole.items() if other != key}
        if shape is not None:
            state[key] = torch.zeros(shape)
        save_file(state, source / "model.safetensors")
        with pytest.raises(LimeEdgeError, match="k_proj"):
            import_checkpoint(source, tmp_path / "out", ImportOptions())
    assert sorted(tmp_path.iterdir()) == [source]


def test_prompt_tuning_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    save_file({"prompt_base": torch.zeros(5, 16)}, source / "model.safetensors")
    with pytest.raises(LimeEdgeError, match="virtual tokens cannot be imported"):
        import_checkpoint(source, tmp_path / "out", ImportOptions())


# PEFT


def make_base(directory: Path, bias: bool = False) -> nn.Module:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=bias,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def make_peft(tmp_path: Path, **options: Any) -> tuple[Path, Path, Tensor, Tensor]:
    """A base model, a trained-looking PEFT adapter for it, ids, and peft's own logits."""
    import peft

    base, directory = tmp_path / "base", tmp_path / "peft"
    model = make_base(base, options.pop("base_bias", False))
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    adapted.save_pretrained(str(directory))
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        return base, directory, ids, adapted.eval()(ids).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"layers_to_transform": [1]},
        {"rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"down_proj": 6}, "use_rslora": True, "use_dora": True},
    ],
    ids=["lora", "rslora", "dora", "one-layer", "patterns", "patterns-rslora-dora"],
)
def test_a_peft_directory_becomes_one_expert_that_equals_it(options: dict[str, Any], tmp_path: Path) -> None:
    base, directory, ids, expected = make_peft(tmp_path, **options)
    report = import_checkpoint(directory, tmp_path / "out", ImportOptions(model=base))
    assert report["experts"] == ["lora"] and report["backbone"] is None
    adapter = read_checkpoint(base, tmp_path / "out/adapter").adapter
    model = unfold(transformers.LlamaForCausalLM.from_pretrained(base), adapter)
    model.use(0)
    assert worst(expected, model.logits({"input_ids": ids})) <= LIMIT


@pytest.mark.parametrize("kind", ["per-site", "flat", "files"])
def test_expert_vectors_for_a_peft_lora(kind: str, tmp_path: Path) -> None:
    base, directory, ids, plain = make_peft(tmp_path)
    import_checkpoint(directory, tmp_path / "plain", ImportOptions(model=base))
    checkpoint = read_checkpoint(base, tmp_path / "plain/adapter")
    table, count = checkpoint.sites, 3
    flat = torch.randn(count, table.total)
    names = ["red", "green", "blue"]
    files = [tmp_path / "vectors.safetensors"]
    if kind == "per-site":
        cut = {f"{s.name}.LiMEs": flat[:, s.offset : s.offset + s.width].clone() for s in table}
        save_file(cut, files[0])
    elif kind == "flat":
        save_file({name: flat[index].clone() for index, name in enumerate(names)}, files[0])
    else:
        files = [tmp_path / f"{name}.safetensors" for name in names]
        for file, name, vector in zip(files, names, flat, strict=True):
            file.write_bytes(Expert(name, vector.numpy(), identify(checkpoint.adapter, table)).to_bytes())
    options = ImportOptions(model=base, experts=tuple(files), names=tuple(names) if kind == "per-site" else ())
    import_checkpoint(directory, tmp_path / "out", options)
    adapter = read_checkpoint(base, tmp_path / "out/adapter").adapter
    found = dict(zip(adapter.expert_names, range(count), strict=True))
    assert found.keys() == set(names)
    for site in table:
        vectors = adapter.sites[site.name].experts
        for index, name in enumerate(names):
            assert torch.equal(vectors[found[name]], flat[index, site.offset : site.offset + site.width])
    model = unfold(transformers.LlamaForCausalLM.from_pretrained(base), adapter)
    model.use(0)
    assert worst(plain, model.logits({"input_ids": ids})) > 100 * LIMIT


def test_an_expert_of_another_adapter_is_refused(tmp_path: Path) -> None:
    base, directory, _, _ = make_peft(tmp_path)
    file = tmp_path / "e.safetensors"
    for count, message in ((7, r"e: expected \(160,\), found \(7,\)"), (160, "adapter_id: expected")):
        file.write_bytes(Expert("e", torch.ones(count).numpy(), "0" * 64).to_bytes())
        with pytest.raises(LimeEdgeError, match=message):
            import_checkpoint(directory, tmp_path / "out", ImportOptions(model=base, experts=(file,)))
    assert not (tmp_path / "out").exists()
    with pytest.raises(LimeEdgeError, match="`model`"):
        import_checkpoint(directory, tmp_path / "out", ImportOptions(experts=(file,)))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"bias": "all"}, "bias"),
        ({"alpha_pattern": {"q_(proj|x)": 3}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True, "base_bias": True}, "DoRA on layers"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding_A"),
    ],
)
def test_what_the_format_cannot_carry_is_refused(options: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    base, directory, _, _ = make_peft(tmp_path, **options)
    with pytest.raises(LimeEdgeError, match=wanted):
        import_checkpoint(directory, tmp_path / "out", ImportOptions(model=base))
    assert not (tmp_path / "out").exists()


def test_our_own_adapter_needs_no_import(tmp_path: Path) -> None:
    starter = Path(__file__).parent.parent / "examples/starter_adapter/adapter"
    with pytest.raises(LimeEdgeError, match="expected LORA, found LIME") as error:
        import_checkpoint(starter, tmp_path / "out", ImportOptions())
    assert "already" in error.value.hint
