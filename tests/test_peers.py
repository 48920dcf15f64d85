"""tools/peers: it runs from end to end on a toy model, and the graphs it cuts out of ours compute what they should."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from lime_edge.bundle.bundle import Bundle
from lime_edge.compiler.formats.architecture import read_decoder
from lime_edge.compiler.model.compiled import Branch, CompiledModel
from lime_edge.compiler.model.decoder import DecoderModule

PEERS = Path(__file__).parent.parent / "tools" / "peers"
IDS = [1203, 4711, 9, 20000, 31]
SPEC: dict[str, Any] = {"threads": 1, "capacity": 64}


@pytest.fixture(scope="module")
def tools() -> Any:
    """Its modules by name, as the tool itself imports them."""
    sys.path.insert(0, str(PEERS))
    yield importlib.import_module
    sys.path.remove(str(PEERS))


@pytest.fixture(scope="module")
def toy(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompiledModel, Path]:
    """The toy model and its branchless bundle."""
    bundles, path = tools("bundles"), tmp_path_factory.mktemp("toy") / "single.lime"
    bundles.make_random("toy", "expert_0", {True: path})
    config = LlamaConfig(**bundles.SHAPES["toy"], max_position_embeddings=4096, tie_word_embeddings=True)
    return replace(bundles.draw_model(read_decoder(config, "toy")), branches={}, single="expert_0"), path


def compare(found: np.ndarray, wanted: np.ndarray, base: np.ndarray) -> None:
    """Near the oracle (activations are rounded to int8), and far from the model without the expert."""
    near, far = np.corrcoef(found, wanted)[0, 1], np.corrcoef(found, base)[0, 1]
    assert near > 0.99 > far + 0.02, f"correlation {near:.4f} with the oracle, {far:.4f} with the model without it"


def test_lora_graph(tools: Any, toy: tuple[CompiledModel, Path]) -> None:
    """A and B as inputs compute what the oracle computes with the same LoRA as its branches."""
    model, bundle = toy
    methods = tools("methods")
    methods.write_lora_graph(bundle)
    (file,) = methods.draw_experts(bundle, "lora", bundle.parent / "lora", 1)
    loud = {name: (tensor * 15).astype(np.float16) for name, tensor in load_file(file).items()}
    save_file(loud, file)
    peer = methods.LoraGraph(SPEC | {"path": str(bundle), "files": [str(file)]})
    peer.start(IDS)
    branches = {}
    for layer in range(len(model.decoder.layers)):
        for group, parts in (("qkv", "qkv"), ("o", "o")):
            path = f"/model/layers.{layer}/attn/{group}_proj/lora"
            a = np.split(loud[f"{path}/A"].astype(np.float32), len(parts), axis=1)
            for part, own in zip(parts, a, strict=True):
                b = torch.from_numpy(loud[f"{path}/B_{part}"].astype(np.float32).T.copy())
                name = f"model.layers.{layer}.self_attn.{part}_proj"
                branches[name] = Branch(torch.from_numpy(own.T.copy()), b)
    ids = torch.tensor([IDS])
    lora = DecoderModule(replace(model, branches=branches, single=None))
    wanted = lora(ids, torch.ones(model.sites.total))[0, -1].numpy()
    compare(peer.peek(), wanted, DecoderModule(model)(ids, None)[0, -1].numpy())


def test_prompt_graph(tools: Any, toy: tuple[CompiledModel, Path]) -> None:
    """Virtual tokens that are the embeddings of real ones do what the real ones do; then the sequence goes on."""
    model, bundle = toy
    methods = tools("methods")
    methods.write_prompt_graph(bundle)
    (file,) = methods.draw_experts(bundle, "prompt", bundle.parent / "prompt", 1)
    before = list(range(100, 100 + methods.TOKENS))
    table = model.weight("model.embed_tokens.weight")
    save_file({"virtual": table[before][None].numpy()}, file)
    peer = methods.PromptGraph(SPEC | {"path": str(bundle), "files": [str(file)]})
    peer.start(IDS)
    oracle = DecoderModule(model)
    compare(
        peer.peek(),
        oracle(torch.tensor([before + IDS]), None)[0, -1].numpy(),
        oracle(torch.tensor([IDS]), None)[0, -1].numpy(),
    )
    token = peer.step()
    compare(
        peer.peek(),
        oracle(torch.tensor([[*before, *IDS, token]]), None)[0, -1].numpy(),
        oracle(torch.tensor([[*IDS, token]]), None)[0, -1].numpy(),
    )


def test_the_whole_tool(tmp_path: Path) -> None:
    """All parts on the toy model; what has no room is named; the page is made of the numbers."""
    command = [
        sys.executable,
        str(PEERS),
        "--models",
        "toy",
        "--engines",
        "ours",
        "--threads",
        "1",
        "--rounds",
        "1",
        "--prompt-tokens",
        "16",
        "--gen-tokens",
        "4",
        "--counts",
        "1,2",
        "--scaling-prompt",
        "16",
        "--scaling-rounds",
        "1",
        "--disk-gb",
        "0.003",
        "--folder",
        str(tmp_path / "models"),
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(next(tmp_path.glob("benchmarks-*.json")).read_text())
    (run,), (scaling,) = facts["decode"], facts["scaling"]
    assert list(run["rows"]) == ["ours-merged", "ours-pinned", "ours-routed", "ours-in-genai"] and not run["left_out"]
    for row in run["rows"].values():
        assert row["decode_ms"] > 0 and row["ttft_ms"] > 0 and row["reload_ms"] > 0 and row["rss_bytes"] > 0
    assert {name for name, row in run["rows"].items() if "switch_us" in row} == {"ours-pinned", "ours-in-genai"}
    found = {(row["method"], row["experts"]) for row in scaling["rows"]}
    methods = ("copies", "lora", "lime", "prompt")
    assert found == {(method, count) for method in methods for count in (1, 2)} - {("copies", 2)}
    assert list(scaling["left_out"]) == ["copies, 2"] and "--disk-gb" in scaling["left_out"]["copies, 2"]
    page = (tmp_path / "benchmarks.md").read_text()
    assert f"{run['rows']['ours-pinned']['decode_ms']:.2f}" in page and "left out: copies, 2" in page
    assert max(map(len, page.splitlines())) < 250


def test_executorch_beside_onnx(tmp_path: Path) -> None:
    """The same integers in both runtimes: rows of the same table, a switch timed in each."""
    pytest.importorskip("executorch")
    words = "--models toy --engines ours,executorch --part decode,switch --threads 1 --rounds 1 --prompt-tokens 8"
    command = [sys.executable, str(PEERS), *words.split(), "--gen-tokens", "4"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "models"), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = json.loads(next(tmp_path.glob("benchmarks-*.json")).read_text())["decode"]
    rows = run["rows"]
    assert [name for name in rows if name.startswith("executorch")] == ["executorch-merged", "executorch-pinned"]
    assert not run["left_out"]
    assert 0.5 < rows["executorch-pinned"]["bytes"] / rows["ours-pinned"]["bytes"] < 2
    assert rows["executorch-pinned"]["switch_us"]["p50"] > 0 and rows["executorch-merged"]["decode_ms"] > 0
    hashes = [
        Bundle.open(tmp_path / "models" / "toy" / folder / "int4.lime").manifest.quantization.weight_hash
        for folder in (".", "executorch")
    ]
    assert hashes[0] == hashes[1]
    assert "lime_edge on ExecuTorch, pinned" in (tmp_path / "benchmarks.md").read_text()


def test_an_engine_that_is_missing_is_named(tools: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the command that brings it; the others go on."""
    decode, prepare = tools("decode"), tools("prepare")
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else name)
    for name in ("int4.lime", "int4-single.lime", "q4_0.gguf"):
        (tmp_path / name).mkdir()
    able, missing = decode.sort_out(decode.CONTENDERS["smollm2"], prepare.Models(tmp_path))
    assert [one.name for one in able] == ["ours-merged", "ours-pinned", "ours-routed"]
    assert "pip install 'llama-cpp-python" in missing["llama"] and "could not be made" in missing["genai"]
