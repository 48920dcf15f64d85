"""Servers for the test-suite: a bundle whose skills are told apart by their answers, and a server in this process.

A marker bundle's skill number k answers every prompt with the k-th letter, over and over: whatever else a batch holds,
an answer shows whose expert it was.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lime_edge.serve.server import Orders, listen, run_service
from lime_edge.serve.service import Service, find_sources
from lime_edge.serve.settings import ServeOptions
from lime_edge.session.engines import SessionOptions

LETTERS = "abcdefghijklmnop"
CONTEXT = 2048
STEADY = 3.0  # what the first number of every token's embedding is: the branch's switch


def make_marker_bundle(directory: Path, skills: int = 16, context: int = CONTEXT) -> Path:
    """A float32 ONNX bundle of a tiny model, with experts named "skill-a", "skill-b", ...

    The model's first residual dimension is one constant, which the last layer's MLP passes on as its first inner
    number; the adapter's branch reads that number alone, so it is the same for every text. An expert then points at one
    dimension, and the head's row of that skill's letter reads it.
    """
    import torch
    from models import TINY, make_model
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    from lime_edge.compiler.options import CompileOptions
    from lime_edge.export.pipeline import ExportOptions, export_bundle
    from lime_edge.targets.devices import find_device

    model = make_model(directory / "model", "llama", max_position_embeddings=context)
    weights = load_file(model / "model.safetensors")
    width, inner = TINY["hidden_size"], TINY["intermediate_size"]
    assert skills < width
    weights["model.embed_tokens.weight"][:, 0] = STEADY
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0
        elif name.endswith("norm.weight"):
            weight.fill_(1.0)
    last = f"model.layers.{TINY['num_hidden_layers'] - 1}.mlp"
    for gate in ("gate_proj", "up_proj"):
        weights[f"{last}.{gate}.weight"][0] = torch.eye(width)[0]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    head = weights["lm_head.weight"]
    head.mul_(0.1)
    for number in range(skills):
        token = tokenizer.token_to_id(LETTERS[number])
        head[token] = 5.0 * torch.eye(width)[1 + number]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    adapter = directory / "adapter"
    adapter.mkdir()
    first = torch.zeros(4, inner)
    first[0, 0] = 1.0
    branch = torch.zeros(width, 4)
    branch[:, 0] = 1.0
    vectors = 100.0 * torch.eye(width)[1 : 1 + skills]
    site = f"{last}.down_proj"
    tensors = {f"{site}.A": first, f"{site}.B": branch, f"{site}.LiMEs": vectors}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LIME",
        "variant": "lora",
        "base_model_name_or_path": "model",
        "target_modules": [site],
        "r": 4,
        "lora_alpha": 8.0,
        "num_experts": skills,
        "expert_names": [f"skill-{letter}" for letter in LETTERS[:skills]],
        "use_shared_lime": False,
        "routing": "pinned",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    output = directory / "marker.lime"
    export_bundle(model, adapter, output, CompileOptions(quant="none"), find_device("cpu"), ExportOptions(("onnx",)))
    return output


def make_text_encoder(directory: Path) -> Path:
    """A float32 ONNX bundle of a tiny random BERT that pools its tokens into a sentence embedding."""
    import torch
    from models import make_adapter, write_tokenizer
    from transformers import BertConfig, BertModel

    from lime_edge.compiler.options import CompileOptions
    from lime_edge.export.pipeline import ExportOptions, export_bundle
    from lime_edge.targets.devices import find_device

    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(config).eval()
    folder = directory / "encoder"
    model.save_pretrained(folder)
    write_tokenizer(folder, 300)
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in MODULES]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    adapter = make_adapter(directory / "adapter", folder, ("query", "value"))
    output = directory / "vectors.lime"
    export_bundle(folder, adapter, output, CompileOptions(quant="none"), find_device("cpu"), ExportOptions(("onnx",)))
    return output


MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"))


@dataclass(frozen=True)
class Running:
    """A server in this process. service: what it serves, to be looked at. said: what it told."""

    url: str
    port: int
    service: Service
    said: list[str]

    @property
    def worker(self) -> Any:
        """Its rows' owner, looked into as no client can."""
        assert self.service.worker is not None
        return self.service.worker

    @property
    def api(self) -> str:
        """Where OpenAI's clients find it."""
        return f"{self.url}/v1"


@contextmanager
def serve_here(bundle: Path, embedder: Path | None = None, **settings: Any) -> Iterator[Running]:
    """A server on a free port, in a thread of this process; drained at the end.

    Args:
        settings: of ServeOptions; one thread for the engine.
    """
    options = ServeOptions(**({"port": 0, "grace": 5.0} | settings))
    service = Service(find_sources(bundle, embedder, None, None, SessionOptions(threads=1)), options)
    orders: dict[str, Any] = {}
    ready, said, failed = threading.Event(), list[str](), list[BaseException]()
    sock = listen(options)

    async def run(own: socket.socket) -> None:
        orders["loop"], orders["orders"] = asyncio.get_running_loop(), Orders()
        await service.start()
        await run_service(service, own, orders["orders"], say)

    def say(text: str) -> None:
        said.append(text)
        ready.set()

    def work() -> None:
        try:
            asyncio.run(run(sock))
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(60)
    if failed:
        sock.close()
        raise failed[0]
    port = sock.getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", port, service, said)
    finally:
        orders["loop"].call_soon_threadsafe(orders["orders"].end.set)
        thread.join(30)
        sock.close()
        service.close()
    assert not failed, failed
    assert not thread.is_alive()
