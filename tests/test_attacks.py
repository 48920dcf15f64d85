"""What hostile or broken files once did to readers: hang, fill memory, end with a traceback, run code.

Bundles, experts, sessions, templates and operators have files of their own; here is what a workstation reads (models,
adapters, checkpoints, GGUF), what stock GenAI would run, what a terminal would show, and numbers out of range.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Make
from manifests import make_bundle, make_expert, reseal
from safetensors.torch import load_file, save_file
from test_cli import Cli

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.change import add_experts
from lime_edge.bundle.companions import GENAI_CONFIG, find_code
from lime_edge.bundle.vectors import read_vectors
from lime_edge.compiler.formats.adapter import read_adapter
from lime_edge.compiler.formats.decoder import read_decoder_backbone
from lime_edge.compiler.formats.encoder import read_encoder_backbone
from lime_edge.compiler.formats.files import read_weights
from lime_edge.compiler.formats.gguf import check_gguf
from lime_edge.errors import LimeEdgeError
from lime_edge.session.engines import SessionOptions
from lime_edge.session.generate import GenerationOptions

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

from readers import make_encoder, make_gguf

DEEP = "[" * 100_000
SOON = 5.0  # seconds; each of these took minutes, or all memory


@pytest.fixture
def lime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture
def model(tiny_model: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model(), tmp_path / "model"))


@pytest.fixture
def adapter(tiny_adapter: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapter(), tmp_path / "adapter"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refuse(read: Callable[[Path], Any], path: Path, message: str) -> None:
    """One clear error, soon, in a few lines."""
    begin = time.monotonic()
    with pytest.raises(LimeEdgeError, match=message) as error:
        read(path)
    assert time.monotonic() - begin < SOON and len(str(error.value)) < 4000


# models


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 4000},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": {"x": 1}},
        {"vocab_size": [300]},
        {"hidden_size": 10**9},
        {"vocab_size": -1},
        {"max_position_embeddings": 10**9},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"intermediate_size": None},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": 1e999},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": [1]},
        {"model_type": ["llama"]},
        {"model_type": "nothing"},
        {"architectures": {"a": 1}},
        {"eos_token_id": "</s>"},
        {"hidden_act": {"x": 1}},
        {"layer_types": ["full_attention"] * 3},
        {"more": 10**300},
    ],
    ids=str,
)
def test_a_hostile_model_config(model: Path, changes: dict[str, Any]) -> None:
    (model / "generation_config.json").unlink()
    if "model_type" not in changes and "layer_types" not in changes and "architectures" not in changes:
        edit(model / "config.json", **changes)
        refuse(read_decoder_backbone, model, re.escape(str(model)))
        return
    edit(model / "config.json", **changes)  # some of these say nothing that a llama reads
    try:
        read_decoder_backbone(model)
    except LimeEdgeError as error:
        assert str(model) in error.problem


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", [DEEP, "{", "[]", '"x"', "\x00", '{"eos_token_id": [[1]]}', '{"eos_token_id": "x"}'])
def test_json_that_is_none(model: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    refuse(read_decoder_backbone, model, str(model))


def test_an_index_names_files_beside_it_only(model: Path, tmp_path: Path) -> None:
    shutil.move(model / "model.safetensors", tmp_path / "outside.safetensors")
    cases: tuple[Any, ...] = (
        {"a": "../outside.safetensors"},
        {"a": str(tmp_path / "outside.safetensors")},
        {"a": 3},
        [],
        None,
    )
    for names in cases:
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        refuse(read_decoder_backbone, model, "is no file beside it|no weight_map")


def test_an_encoder_larger_than_its_weights_is_not_built(tmp_path: Path) -> None:
    make_encoder(tmp_path)
    whole = (tmp_path / "model/config.json").read_text()
    for changes in ({"hidden_size": 60000}, {"num_hidden_layers": 4000}, {"vocab_size": 1 << 23}):
        (tmp_path / "model/config.json").write_text(whole)
        edit(tmp_path / "model/config.json", **changes)
        refuse(read_encoder_backbone, tmp_path / "model", "larger model than its weights|not a readable model")


@pytest.mark.parametrize("architecture", ["__version__", "AutoConfig", "os.system", "BertConfig", "", None, 3])
def test_an_architecture_that_is_none(tmp_path: Path, architecture: Any) -> None:
    make_encoder(tmp_path)
    edit(tmp_path / "model/config.json", architectures=[architecture])
    refuse(read_encoder_backbone, tmp_path / "model", "is no class of transformers")


# GGUF


def test_a_truncated_gguf(tmp_path: Path) -> None:
    make_gguf(tmp_path)
    file = tmp_path / "model.gguf"
    data = file.read_bytes()
    assert read_decoder_backbone(file).decoder.hidden == 16
    for kept in (3, 4, 23, 24, 30, 100, 1000, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:kept])
        refuse(read_decoder_backbone, file, "GGUF")


@pytest.mark.parametrize("place", [8, 16, 24], ids=["tensors", "fields", "length of a key"])
def test_a_gguf_that_counts_too_far(tmp_path: Path, place: int) -> None:
    make_gguf(tmp_path)
    file = tmp_path / "model.gguf"
    data = bytearray(file.read_bytes())
    for count in (10**9, 2**63, 2**64 - 1):
        data[place : place + 8] = struct.pack("<Q", count)
        file.write_bytes(data)
        refuse(check_gguf, file, "not a readable GGUF file")


def test_a_gguf_that_describes_another_model_than_it_holds(tmp_path: Path) -> None:
    """The model would be built, at its full size, before anyone noticed."""
    make_gguf(tmp_path)
    file = tmp_path / "model.gguf"
    data = file.read_bytes()
    for key in (b"llama.block_count", b"llama.embedding_length", b"llama.feed_forward_length", b"llama.vocab_size"):
        for value in (4000, 2**31):
            place = data.index(key) + len(key) + 4
            file.write_bytes(data[:place] + struct.pack("<I", value) + data[place + 4 :])
            refuse(read_decoder_backbone, file, key.decode())


# adapters and checkpoints


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 10**9},
        {"num_experts": 0, "expert_names": []},
        {"r": 10**9},
        {"r": True},
        {"lora_alpha": 10**300},
        {"lora_alpha": float("nan")},
        {"license": "\x1b[31m"},
        {"base_model_name_or_path": "x" * 10**6},
        {"expert_names": ["con", "CON"] * 2},
        {"expert_names": [["a"], {"b": 1}, None, 3]},
        {"target_modules": [{"a": 1}]},
        {"embedding_modules": [None]},
        {"base_sketch": {"names": 3}},
        {"top_k": 10**12, "routing": "soft_topk"},
        {"temperature": 1e999, "routing": "soft_topk"},
    ],
    ids=lambda changes: f"{changes!s:.40}",
)
def test_a_hostile_adapter_config(adapter: Path, tiny_model: Make, changes: dict[str, Any]) -> None:
    from lime_edge.compiler.formats.checkpoint import pair

    edit(adapter / "adapter_config.json", **changes)
    backbone = read_decoder_backbone(tiny_model())
    refuse(lambda path: pair(backbone, read_adapter(path)), adapter, str(adapter))


def test_many_experts_are_not_believed_without_their_vectors(adapter: Path) -> None:
    """A routed adapter that names 10^9 experts and holds no vectors made zeros for all of them."""
    tensors = {name: t for name, t in load_file(adapter / "adapter_model.safetensors").items() if "LiMEs" not in name}
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit(adapter / "adapter_config.json", num_experts=2**31, routing="soft_topk", top_k=2, soft_topk=True)
    refuse(read_adapter, adapter, "num_experts")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_named(adapter: Path, dtype: torch.dtype) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    refuse(read_adapter, adapter, "expected float32, float16 or bfloat16, found float8")


@pytest.mark.parametrize("text", [DEEP, "{", "[]", "\x00"])
def test_an_adapter_config_that_is_none(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    refuse(read_adapter, adapter, "adapter_config.json")


def test_a_pickle_may_not_claim_more_than_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1).expand(10**12)}, file)
    refuse(read_weights, file, "is more than the file holds")
    torch.save({"a": torch.zeros(3).to_sparse()}, file)
    refuse(read_weights, file, "pytorch_model.bin")
    torch.save({3: torch.zeros(3)}, file)
    refuse(read_weights, file, "expected a state dict")
    torch.save({"a": torch.zeros(3)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    refuse(read_weights, file, "its archive is compressed")


class Evil:
    """What a pickle that runs code looks like."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.write_text, (self.file, "ran")


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    refuse(read_weights, tmp_path, "not a readable state dict")
    assert not (tmp_path / "ran").exists()


# what stock GenAI would run


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"decoder": {"session_options": {"custom_ops_library": "libevil.so"}}}},
        {"model": {"decoder": {"session_options": {"provider_options": [{"qnn": {"backend_path": "x/evil.dll"}}]}}}},
        {"model": {"decoder": {"filename": "../../other/model.onnx"}}},
        {"model": {"decoder": {"filename": "/model.onnx"}}},
        {"model": {"decoder": {"pipeline": [{"embeddings": {"filename": "a/../../x.onnx"}}]}}},
        {"Custom_Ops_Library": ""},
    ],
)
def test_a_genai_config_that_would_run_code_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    """Sealed or not: the bundle does not open, so nobody hands it on as whole."""
    path = make_bundle(tmp_path / "x.lime")
    (path / "onnx" / GENAI_CONFIG).write_text(json.dumps(config))

    def add(body: dict[str, Any]) -> None:
        import hashlib

        data = (path / "onnx" / GENAI_CONFIG).read_bytes()
        body["files"][f"onnx/{GENAI_CONFIG}"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    reseal(path, add)
    for verify in (False, True):
        with pytest.raises(LimeEdgeError, match=f"{GENAI_CONFIG}: names .*: stock GenAI would load it"):
            Bundle.open(path, verify)
    (path / "onnx" / GENAI_CONFIG).write_text('{"model": {"decoder": {"filename": "model.onnx"}}}')
    reseal(path)
    assert Bundle.open(path, verify=True).manifest.experts == ("one", "two")


def test_both_of_a_doubled_key_are_looked_at() -> None:
    assert find_code(b'{"custom_ops_library": "a.so", "custom_ops_library": null}') == [
        "names 'custom_ops_library': 'a.so'",
        "names 'custom_ops_library': 'None'",
    ]
    assert find_code(b'{"\\u0063ustom_ops_library": "a"}') and find_code(DEEP.encode()) == ["not readable JSON"]


# numbers


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.5},
        {"temperature": 10**400},
        {"temperature": float("nan")},
        {"temperature": np.float32("inf")},
        {"temperature": -0.1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 1e9},
        {"max_new_tokens": True},
        {"max_new_tokens": None},
        {"stop": 3},
        {"stop": ["", "x"]},
    ],
    ids=lambda changes: f"{changes!s:.40}",
)
def test_generation_options_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(LimeEdgeError, match=next(iter(changes))):
        GenerationOptions(**changes)


@pytest.mark.parametrize("changes", [{"threads": 10**6}, {"threads": "2"}, {"threads": 0}, {"max_length": 10**9}])
def test_session_options_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(LimeEdgeError, match=next(iter(changes))):
        SessionOptions(**changes)


# what a terminal shows


def test_names_and_paths_are_shown_as_they_are(lime: Cli, tmp_path: Path) -> None:
    """Square brackets are no markup, control characters no commands to the terminal, and bytes that are no UTF-8 no
    traceback."""
    for name in ("[red]x[/]", "[/nothing]", "a\x1b[31mb", "\u202etxt", "caf\udce9"):
        path = make_bundle(tmp_path / f"{name}.lime")
        shown = lime("experts", "list", path)
        assert shown.code == 0 and "one" in shown.out
        assert name.split("\x1b")[0].split("\u202e")[0].split("\udce9")[0] in shown.out
        wrong = lime.refuse("experts", "remove", path, "nobody\x1b[2J")
        assert "unknown expert" in wrong and "Traceback" not in wrong
        for text in (shown.out, wrong):
            assert not any(letter in text for letter in "\x1b\u202e\udce9"), repr(text)


@pytest.mark.parametrize(
    "data",
    [
        *(b"\xff\xfe\x00", DEEP.encode(), b"null", b"", b"[]", b"{}", b'{"prompt": 3}'),
        b'{"prompt": "a", "answer": 3, "labels": [[]]}',
        b'{"schema": 2, "switch_us": 1, "runs": [1], "machine": {"a": 1}, "fingerprint": "x"}',
    ],
    ids=lambda data: f"{data!s:.30}",
)
def test_documents_that_a_user_hands_in(lime: Cli, tmp_path: Path, data: bytes) -> None:
    from lime_edge.bench.compare import compare_files
    from lime_edge.checks.evaluate import read_examples
    from lime_edge.cli.conversation import load
    from lime_edge.compiler.rounding.calibrate import read_calibration

    file = tmp_path / "given.jsonl"
    file.write_bytes(data)
    readers: tuple[Callable[[Path], Any], ...] = (
        read_examples,
        load,
        lambda path: compare_files(path, path),
        lambda path: read_calibration(path, lambda text: [1], ["one"]),
    )
    for read in readers:
        refuse(read, file, re.escape(str(file)))
        refuse(read, tmp_path, re.escape(str(tmp_path)))
        refuse(read, tmp_path / "none", "none")


def test_paths_that_are_none(lime: Cli, tmp_path: Path) -> None:
    """A pipe that nobody writes to is not waited for, and a name too long is no traceback."""
    path, long = make_bundle(tmp_path / "x.lime"), tmp_path / ("x" * 5000)
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for given in (pipe, long, Path("/dev/zero"), tmp_path / "no\0thing"):
        assert "error" in lime.refuse("experts", "add", path, given)
        assert "error" in lime.refuse("inspect", given)
        refuse(read_decoder_backbone, given, "no such file|found a|xxxx")
    os.mkfifo(tmp_path / "adapter_config.json")
    refuse(lambda folder: read_vectors(folder, Bundle.open(path)), tmp_path, "adapter_config.json")


def test_a_path_leads_nowhere_else(lime: Cli, tmp_path: Path) -> None:
    path, victim = make_bundle(tmp_path / "x.lime"), tmp_path / "victim"
    victim.write_text("precious")
    assert "unknown expert" in lime.refuse("experts", "remove", path, "../../victim")
    assert victim.read_text() == "precious"
    with pytest.raises(LimeEdgeError, match="letter case"):
        add_experts(path, [make_expert("ONE")], replace=True)
