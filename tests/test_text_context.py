"""How many tokens a text model takes: one answer, for the manifest, the session and every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import load_sites, make_adapter
from transformers import BertConfig, BertModel, PreTrainedModel, RobertaConfig, RobertaModel

from lime_edge.bundle.bundle import Bundle
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.encoder import find_text_context
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.exporters.executorch.encoder import choose_limits
from lime_edge.exporters.padded import choose_lengths
from lime_edge.session.open import open_encoder
from lime_edge.targets.devices import find_device

ROWS = 24  # of the position table
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": ROWS,
}
# a table without a padding row; RoBERTa's, whose padding id is 1; and one whose padding id is 0, which is an id too
MODELS: dict[str, tuple[type[PreTrainedModel], Any, int]] = {
    "bert": (BertModel, BertConfig(**SIZES), ROWS),
    "roberta": (RobertaModel, RobertaConfig(**SIZES, pad_token_id=1), ROWS - 2),
    "roberta-0": (RobertaModel, RobertaConfig(**SIZES, pad_token_id=0), ROWS - 1),
}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    kind, config, _ = MODELS[name]
    return kind(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_context_is_what_transformers_takes(name: str) -> None:
    model, context = make(name), MODELS[name][2]
    assert find_text_context(model) == context
    model(input_ids=torch.full((1, context), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, context + 1), 5))


@pytest.mark.parametrize("name", MODELS)
def test_every_target_and_the_session_agree(name: str, tmp_path: Path) -> None:
    model, context = make(name), MODELS[name][2]
    model.save_pretrained(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "model", ("query", "value"), rank=2)
    checkpoint = read_checkpoint(tmp_path / "model", adapter)
    compiled = compile_checkpoint(checkpoint, CompileOptions(quant="none"))
    assert choose_limits(compiled)["sequence"] == context
    assert choose_lengths(compiled, (8, 4096)) == (8, context)
    output = tmp_path / "x.lime"
    options = ExportOptions(tokenizer=False)
    export_bundle(tmp_path / "model", adapter, output, CompileOptions(quant="none"), find_device("cpu"), options)
    bundle = Bundle.open(output)
    assert bundle.manifest.backbone.context == context
    session = open_encoder(bundle)
    session.use(session.experts[1])
    ids = np.random.default_rng(0).integers(5, 60, (1, context + 1))
    unfolded = UnfoldedModel(model, *load_sites(adapter))
    unfolded.use(1)
    with torch.no_grad():
        wanted = unfolded.model(input_ids=torch.from_numpy(ids[:, :context]))[0].numpy()
    found = session.run(input_ids=ids[:, :context])["last_hidden_state"]
    assert np.abs(found - wanted).max() < 1e-4, f"{name}: a text of the whole context"
    with pytest.raises(LimeEdgeError, match=f"tokens: expected at most {context}, found {context + 1}"):
        session.run(input_ids=ids)


def test_a_model_without_a_position_table_says_it_in_its_config() -> None:
    model = torch.nn.Module()
    model.config = type("Config", (), {"max_position_embeddings": 77})()
    assert find_text_context(model) == 77
