"""The workstation's seam for the kind of model: found once, one way from the checkpoint to the bundle for all."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model
from test_variants import make_prompt_adapter

from lime_edge.bundle.experts import ALWAYS_ON
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.adapter_checks import FIELDS
from lime_edge.compiler.formats.hyper import ImportOptions
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.kinds import DECODER, ENCODER, KINDS, find_kind, kind_of, read_checkpoint
from lime_edge.compiler.maths.variants import LAYER_VARIANTS, VARIANTS, find_variant
from lime_edge.compiler.model.encoder import CompiledEncoder
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export import calibration, pipeline
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.targets.devices import find_device

Make = Callable[..., Path]
FIXTURES = Path(__file__).parent / "fixtures" / "conformance" / "models"
TARGETS = ("onnx", "executorch", "coreml")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kinds") / "bert"
    import_checkpoint(FIXTURES / "bert-lora-cls", path, ImportOptions())
    return path


def test_every_model_has_one_kind(bert: Path, tiny_model: Make, tiny_adapter: Make, tmp_path: Path) -> None:
    assert find_kind(bert / "backbone") is ENCODER and find_kind(tiny_model()) is DECODER
    assert find_kind(tmp_path / "model.gguf") is DECODER  # reading it says what is wrong with it
    for kind, checkpoint in (
        (ENCODER, read_checkpoint(bert / "backbone", bert / "adapter")),
        (DECODER, read_checkpoint(tiny_model(), tiny_adapter())),
    ):
        assert kind_of(checkpoint.backbone) is kind
        assert isinstance(checkpoint.backbone, kind.backbone)
        assert [isinstance(checkpoint.backbone, other.backbone) for other in KINDS].count(True) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_writes_every_kind(target: str) -> None:
    folder = Path(importlib.import_module("lime_edge.exporters").__path__[0]) / target
    for kind in KINDS:
        assert (folder / f"{kind.name}.py").is_file()


def test_prompt_tuning_on_an_encoder_is_refused(bert: Path, tmp_path: Path) -> None:
    adapter = make_prompt_adapter(tmp_path / "adapter", bert / "backbone")
    with pytest.raises(LimeEdgeError, match="a prompt_tuning adapter does not fit: the model takes no virtual tokens"):
        read_checkpoint(bert / "backbone", adapter)


def test_an_export_folds_once_reads_its_text_once_and_loads_exporters_once(
    tiny_model: Make, tiny_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, int] = {}

    def count(module: Any, name: str) -> None:
        true = getattr(module, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return true(*arguments, **named)

        monkeypatch.setattr(module, name, counted)

    count(pipeline, "fold_checkpoint")
    count(pipeline, "load_exporters")
    count(calibration, "built_in_calibration")
    folding = sys.modules["lime_edge.compiler.compile"]
    count(folding, "fold_sites")
    options = CompileOptions(quant="int4", keep_int8=("head",))
    bundle = tmp_path / "x.lime"
    export_bundle(tiny_model(), tiny_adapter(), bundle, options, find_device("cpu"), ExportOptions())
    assert counts == dict.fromkeys(("fold_checkpoint", "load_exporters", "built_in_calibration", "fold_sites"), 1)
    assert json.loads((bundle / "lime.json").read_text())["quantization"]["survival"]["sites"]


def test_a_compiled_encoder_holds_no_second_copy_of_what_it_does_not_change(bert: Path) -> None:
    """The transformers model is shared: its own weights where nothing was folded, its norms always."""
    checkpoint = read_checkpoint(bert / "backbone", bert / "adapter")
    compiled = compile_checkpoint(checkpoint, CompileOptions(quant="none"))
    assert isinstance(compiled, CompiledEncoder)
    original = {tensor.data_ptr() for tensor in checkpoint.backbone.model.state_dict().values()}
    for name, tensor in compiled.module.model.state_dict().items():
        layer = name.split(".product.")[0]
        if name.endswith(".product.weight"):
            assert (tensor.data_ptr() in original) == (compiled.sites.find(layer) is None), name
        elif "LayerNorm" in name:
            assert tensor.data_ptr() in original, name
    assert checkpoint.backbone.model.get_submodule("classifier") is not compiled.module.model.get_submodule(
        "classifier"
    )


def test_a_head_tied_to_an_adapted_table_keeps_the_old_one(
    tiny_model: Make, tiny_adapter: Make, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    with_table, without = (
        compile_checkpoint(read_checkpoint(model, tiny_adapter(model, targets=targets)), CompileOptions(quant="none"))
        for targets in (("embed_tokens", "q_proj"), ("q_proj",))
    )
    table = without.weight("model.embed_tokens.weight")
    assert without.head_name == "model.embed_tokens.weight" and with_table.head_name == "lm_head.weight"
    assert torch.equal(with_table.weight("lm_head.weight"), table)
    assert not torch.equal(with_table.weight("model.embed_tokens.weight"), table)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_says_of_itself_what_its_layers_do(name: str) -> None:
    """Neutral and off, tried on the authors' formulas: what is added is neutral at 0, what is multiplied at 1."""
    variant = find_variant(name)
    assert variant.switches_off == (name not in ALWAYS_ON)
    if not variant.adapts_layers:
        assert name not in LAYER_VARIANTS and variant.folds
        return
    random = torch.Generator().manual_seed(2)
    tensors = {
        "weight": torch.randn(6, 5, generator=random),
        "A": torch.randn(2, 5, generator=random),
        "B": torch.randn(6, 2, generator=random),
        "m": torch.rand(6, generator=random) + 0.5,
        "part_T": torch.randn(2, 5, generator=random),
    }
    tensors["part_F"] = tensors["weight"][2:]
    x = torch.randn(3, 5, generator=random)
    parts = variant.find_form(embedding=False).unfold(tensors, x, 2.0)
    frozen = parts.base + parts.delta * variant.neutral
    torch.testing.assert_close(frozen, parts.frozen)
    off = torch.allclose(parts.base, x @ tensors["weight"].T, atol=1e-5)  # p = 0 against the original layer
    assert off == variant.switches_off
    assert (parts.route_delta is None) == (variant.routing_reads == 1)
    kept = parts.route_on - parts.frozen
    torch.testing.assert_close(kept, variant.routing_keeps * parts.delta)


def test_the_table_of_variants_is_what_an_adapter_may_name() -> None:
    assert "variant" in FIELDS and tuple(VARIANTS) == (*LAYER_VARIANTS, "prompt_tuning")
    with pytest.raises(LimeEdgeError, match="variant: expected one of lora, lora_fa, dora, slicefine, prompt_tuning"):
        find_variant("lokr")
