"""The readers that are fuzzed: what each is given, how it is damaged, and what it answers.

`work(folder, seed)` of a reader damages a sample by that seed and reads it. It gives an outcome:
same (as undamaged), refused (one clear error), other (taken, another answer), odd (must not be: said why).
Every exception that is no LimeEdgeError comes out, and is a bug.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from damage import damage_bytes, damage_json, damage_safetensors
from manifests import make_bundle, make_expert, reseal, seal

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import read_expert
from lime_edge.bundle.golden import Golden, read_golden
from lime_edge.bundle.manifest import MANIFEST
from lime_edge.errors import LimeEdgeError

SAME, REFUSED, OTHER, ODD = "same", "refused", "other", "odd"
PROMPT = [5, 6, 7, 8]
ROUTING = {"top_k": 1, "soft_topk": True}


@dataclass(frozen=True)
class Reader:
    """make: fills a folder with an undamaged sample. files: which ones are damaged, as patterns. read: of the folder.

    sealed: hashes are made to fit the damage. may_differ: a damaged file may be a good one that says something else.
    """

    name: str
    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    sealed: bool = False
    may_differ: bool = False

    def work(self, folder: Path, seed: int, wanted: Any) -> str:
        """Damage the sample by a seed, read it, put it right again.

        Args:
            folder: the sample. wanted: what `read` gives undamaged.
        """
        draw = random.Random(f"{self.name} {seed}")
        found = sorted({file for pattern in self.files for file in folder.glob(pattern) if file.is_file()})
        file, manifests = draw.choice(found), sorted(folder.glob(f"**/{MANIFEST}"))
        kept = {path: path.read_bytes() for path in {file, *manifests}}
        try:
            data = damage(file.name, kept[file], draw)
            file.write_bytes(data)
            if self.sealed:
                fit_hashes(manifests[0].parent, file, data)
            return self.judge(folder, wanted)
        finally:
            for path, data in kept.items():
                path.write_bytes(data)

    def judge(self, folder: Path, wanted: Any) -> str:
        """Read it: what comes out."""
        try:
            answer = self.read(folder)
        except LimeEdgeError as error:
            assert error.problem and "\x1b" not in str(error) and len(str(error)) < 60_000, "an error for a terminal"
            return REFUSED
        if answer == wanted:
            return SAME
        return OTHER if self.may_differ or self.sealed else f"{ODD}: another answer"


def damage(name: str, data: bytes, draw: random.Random) -> bytes:
    """Damage by what kind of file it is."""
    if name.endswith(".safetensors"):
        return damage_safetensors(data, draw)
    if name.endswith(".json"):
        return damage_json(data, draw)
    if name.endswith((".gguf", ".onnx", ".pte", ".mlmodel")):
        return damage_bytes(data, draw, draw.choice((64, 1024, None)))
    return damage_bytes(data, draw)


def fit_hashes(bundle: Path, file: Path, data: bytes) -> None:
    """Make every hash in a bundle fit its damaged file; of a damaged manifest its own."""
    if file.name != MANIFEST:
        reseal(bundle)
        return
    with suppress(ValueError, RecursionError, TypeError):  # no JSON any more: it has no hash to fit
        file.write_bytes(seal(json.loads(data)))


# bundles without an engine


def make_plain(folder: Path) -> None:
    """Two experts, a graph of five bytes."""
    make_bundle(folder / "x.lime")


def answer_bank(folder: Path) -> dict[str, bytes]:
    """Every expert's residual, as float32 bytes; all within what every target holds."""
    bank = Bundle.open(folder / "x.lime").open_bank()
    found = {name: bank.residual(name).tobytes() for name in bank.names}
    for data in found.values():
        assert np.abs(np.frombuffer(data, np.float32)).max(initial=0) <= 65504
    return found


def make_expert_file(folder: Path) -> None:
    """One expert file."""
    (folder / "one.safetensors").write_bytes(make_expert("one", 3).to_bytes())


def answer_expert(folder: Path) -> Any:
    """Its parts; no hash here: whatever it says, a target can hold it."""
    expert = read_expert(folder / "one.safetensors", 64)
    assert expert.vector.ndim == 1 and 1 <= expert.vector.size <= 64 and np.isfinite(expert.vector).all()
    return expert.name, expert.vector.tobytes(), expert.adapter_id, expert.note, expert.license


# what a workstation reads


def make_checkpoint(folder: Path) -> None:
    """A model directory and its adapter, with a sketch."""
    from models import make_adapter, make_model
    from msgspec import structs

    from lime_edge.compiler.formats.decoder import read_decoder_backbone
    from lime_edge.compiler.formats.sketch import draw_sketch

    sizes = {"vocab_size": 272, "num_hidden_layers": 1, "hidden_size": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_model(folder / "model", "llama", **sizes)
    adapter = make_adapter(folder / "adapter", model, experts=2, shared=True, routing=ROUTING)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_sketch"] = structs.asdict(draw_sketch(read_decoder_backbone(model), model))
    config |= {"license": "MIT", "training": {"seed": 1}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def make_variant(variant: str) -> Callable[[Path], None]:
    """The same with an adapter of another variant, on the token table too where it may be."""

    def make(folder: Path) -> None:
        from models import ATTENTION, make_adapter

        make_checkpoint(folder)
        shutil.rmtree(folder / "adapter")
        targets = (*ATTENTION, "embed_tokens") if variant in ("lora", "dora") else ATTENTION
        make_adapter(folder / "adapter", folder / "model", targets, experts=2, variant=variant, routing=ROUTING)

    return make


def make_peft(folder: Path) -> None:
    """A LoRA as PEFT writes it."""
    import torch
    from safetensors.torch import save_file

    (folder / "source").mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, folder / "source/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    config |= {"use_dora": False, "use_rslora": True, "rank_pattern": {}, "base_model_name_or_path": "tiny"}
    (folder / "source/adapter_config.json").write_text(json.dumps(config))


def make_vectors(folder: Path) -> None:
    """A bundle, and a folder of vectors trained for it."""
    make_running(folder, "onnx", keep=True)


def answer_vectors(folder: Path) -> Any:
    """The experts in it."""
    from lime_edge.bundle.vectors import read_vectors

    experts = read_vectors(folder / "adapter", Bundle.open(folder / "x.lime"))
    assert all(np.isfinite(expert.vector).all() for expert in experts)
    return [(expert.name, expert.vector.tobytes(), expert.license) for expert in experts]


def make_gguf(folder: Path) -> None:
    """A llama of one layer as float32 GGUF."""
    import gguf

    make_checkpoint(folder)
    from safetensors.numpy import load_file

    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    tensors, config = (
        load_file(folder / "model/model.safetensors"),
        json.loads((folder / "model/config.json").read_text()),
    )
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    vocabulary = json.loads((folder / "model/tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_types([1] * len(vocabulary["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module in top:
            writer.add_tensor(f"{top[module]}.weight", tensor)
        else:
            _, _, layer, rest = module.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{names[rest]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "adapter")


def answer_backbone(path: Path) -> Any:
    """Shape and options of a model, and a digest of its numbers."""
    from lime_edge.compiler.kinds import find_kind

    backbone = find_kind(path).read(path)
    return backbone.name, backbone.fingerprint, repr(backbone.decoder), backbone.eos


def answer_model(folder: Path) -> Any:
    """Of a model directory."""
    return answer_backbone(folder / "model")


def answer_gguf(folder: Path) -> Any:
    """Of a GGUF file, and of the tokenizer in it."""
    from lime_edge.bundle.prompts import TextCodec
    from lime_edge.export.beside import copy_tokenizer

    found = answer_backbone(folder / "model.gguf")
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    copy_tokenizer(folder / "model.gguf", folder / "tokenizer")
    return found, TextCodec(folder / "tokenizer").encode("the nights")


def answer_adapter(folder: Path) -> Any:
    """An adapter, paired with the model it was made for."""
    from lime_edge.compiler.formats.adapter import read_adapter
    from lime_edge.compiler.formats.checkpoint import pair
    from lime_edge.export.describe import identify

    checkpoint = pair(_keep_backbone(folder / "model"), read_adapter(folder / "adapter"))
    adapter = checkpoint.adapter
    experts = [site.experts.numpy().tobytes() for site in adapter.sites.values()]
    return identify(adapter, checkpoint.sites), adapter.expert_names, experts, checkpoint.fit


_kept: dict[Path, Any] = {}


def _keep_backbone(path: Path) -> Any:
    """A model that is not damaged is read once."""
    from lime_edge.compiler.formats.decoder import read_decoder_backbone

    if path not in _kept:
        _kept[path] = read_decoder_backbone(path)
    return _kept[path]


FIXTURES = Path(__file__).parent.parent / "fixtures/conformance/models"


def make_authors(folder: Path) -> None:
    """A checkpoint of the authors' code: a full state dict, once as safetensors and once as PyTorch's pickle."""
    shutil.copytree(FIXTURES / "llama-dora-ngram", folder / "source")


def make_pickle(folder: Path) -> None:
    """The same as PyTorch's pickle."""
    import torch

    make_authors(folder)
    from lime_edge.compiler.formats.files import read_weights

    state = read_weights(folder / "source")
    for file in (folder / "source").glob("*.safetensors*"):
        file.unlink()
    torch.save(dict(list(state.items())[:6]), folder / "source/pytorch_model.bin")


def answer_import(folder: Path) -> Any:
    """What an import writes."""
    from lime_edge.compiler.formats.hyper import ImportOptions
    from lime_edge.compiler.formats.importing import import_checkpoint

    shutil.rmtree(folder / "out", ignore_errors=True)
    facts = import_checkpoint(folder / "source", folder / "out", ImportOptions())
    return facts["variant"], facts["sites"], (folder / "out/adapter/adapter_model.safetensors").read_bytes()


def answer_pickle(folder: Path) -> Any:
    """The state dict."""
    from lime_edge.compiler.formats.files import read_weights

    return {name: tensor.float().numpy().tobytes() for name, tensor in read_weights(folder / "source").items()}


def make_encoder(folder: Path) -> None:
    """A tiny BERT classifier."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=40, max_position_embeddings=32, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder / "model")


def answer_encoder(folder: Path) -> Any:
    """Task, inputs, layers and numbers."""
    from lime_edge.compiler.formats.encoder import read_encoder_backbone

    backbone = read_encoder_backbone(folder / "model")
    return backbone.task, backbone.inputs, list(backbone.called), backbone.fingerprint


def make_tokenizer(folder: Path) -> None:
    """tokenizer.json, its configuration, a generation configuration."""
    from models import write_tokenizer

    write_tokenizer(folder, 400)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')


def answer_tokenizer(folder: Path) -> Any:
    """Ids of a text and back; end tokens; whether it chats; what is told of it."""
    from lime_edge.bundle.prompts import TextCodec
    from lime_edge.compiler.formats.tokenizer import describe_tokenizer

    codec = TextCodec(folder)
    ids = codec.encode("The 3 nights, 文字")
    facts = describe_tokenizer(folder)
    (folder / "classes.json").unlink(missing_ok=True)
    return ids, codec.decode(ids), codec.eos, codec.template, codec.special_names, repr(facts)


# bundles that run


def make_running(folder: Path, *targets: str, keep: bool = False) -> None:
    """A tiny language model, exported with everything that a bundle may hold."""
    from lime_edge.compiler.options import CompileOptions
    from lime_edge.export.pipeline import ExportOptions, export_bundle
    from lime_edge.targets.devices import find_device

    make_checkpoint(folder)
    out, options = folder / "x.lime", ExportOptions(targets)
    export_bundle(folder / "model", folder / "adapter", out, CompileOptions(quant="int8"), find_device("cpu"), options)
    if not keep:
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "adapter")


def flatten(golden: Golden | None) -> Any:
    """Golden outputs as values that can be compared."""
    if golden is None:
        return None
    calls = {name: array.tobytes() for name, array in golden.calls.items()}
    outputs = {name: one.expected.values.tobytes() for name, one in golden.outputs.items()}
    return golden.selections, golden.steps, calls, outputs


def answer_session(folder: Path) -> Any:
    """Opened and asked: logits under every expert, a text, the golden outputs."""
    from lime_edge.session.open import open_decoder

    bundle = Bundle.open(folder / "x.lime")
    session = open_decoder(bundle)
    answer: list[Any] = []
    for name in (*session.experts, *(["routed"] if bundle.manifest.targets[session.target].routed else [])):
        session.use(name)
        answer.append(session.logits(PROMPT, keep=1).tobytes())
    answer.append("".join(session.generate("the nights", max_new_tokens=3)))
    golden = read_golden(bundle)
    return answer, flatten(golden)


def answer_facts(folder: Path) -> Any:
    """What is read of a bundle besides running it: everything that inspect and verify read."""
    from lime_edge.bundle.prompts import TextCodec
    from lime_edge.checks.inspect import describe_bundle

    bundle = Bundle.open(folder / "x.lime", verify=True)
    codec = TextCodec(bundle.path / "tokenizer", bundle.manifest.prompts)
    golden = read_golden(bundle)
    described = describe_bundle(bundle)
    described.pop("path")
    return codec.encode("the nights"), flatten(golden), repr(described), answer_bank(folder)


def make_running_encoder(folder: Path) -> None:
    """One of the authors' classifiers, exported."""
    from encoder_conformance import export_fixture

    shutil.move(export_fixture(FIXTURES / "bert-lora-cls", folder / "made"), folder / "x.lime")
    shutil.rmtree(folder / "made")


def answer_encoding(folder: Path) -> Any:
    """Its outputs under every expert."""
    from lime_edge.session.open import open_encoder

    session = open_encoder(Bundle.open(folder / "x.lime"))
    answer = []
    for name in session.experts:
        session.use(name)
        found = session.run(input_ids=np.array([PROMPT]))
        answer.append({key: value.tobytes() for key, value in found.items()})
    return answer


def make_onnx(folder: Path) -> None:
    """For ONNX Runtime."""
    make_running(folder, "onnx")


def make_executorch(folder: Path) -> None:
    """For ExecuTorch."""
    make_running(folder, "executorch")


def make_coreml(folder: Path) -> None:
    """For Core ML."""
    make_running(folder, "coreml")


SMALL_FILES = (
    "x.lime/tokenizer/*",
    "x.lime/verify/*",
    "x.lime/experts/*",
    "x.lime/reference.safetensors",
    "x.lime/lime.json",
)
MODEL_FILES = ("model/config.json", "model/generation_config.json", "model/*.safetensors")
READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("manifest", make_plain, ("x.lime/lime.json",), answer_bank),
        Reader("sealed-manifest", make_plain, ("x.lime/lime.json",), answer_bank, sealed=True),
        Reader("bundle", make_plain, ("x.lime/**/*",), answer_bank),
        Reader("sealed-bundle", make_plain, ("x.lime/experts/*", "x.lime/*.safetensors"), answer_bank, sealed=True),
        Reader("expert", make_expert_file, ("*",), answer_expert, may_differ=True),
        Reader("adapter", make_checkpoint, ("adapter/*",), answer_adapter, may_differ=True),
        Reader("model", make_checkpoint, MODEL_FILES, answer_model, may_differ=True),
        Reader("gguf", make_gguf, ("*.gguf",), answer_gguf, may_differ=True),
        Reader("encoder", make_encoder, ("model/*",), answer_encoder, may_differ=True),
        Reader("authors", make_authors, ("source/*.json", "source/*.safetensors"), answer_import, may_differ=True),
        *(
            Reader(f"adapter-{variant}", make_variant(variant), ("adapter/*",), answer_adapter, may_differ=True)
            for variant in ("lora", "dora", "slicefine")
        ),
        Reader("peft", make_peft, ("source/*",), answer_import, may_differ=True),
        Reader("vectors", make_vectors, ("adapter/*",), answer_vectors, may_differ=True),
        Reader("encoder-bundle", make_running_encoder, ("x.lime/**/*",), answer_encoding),
        Reader("sealed-encoder", make_running_encoder, ("x.lime/onnx/*", *SMALL_FILES), answer_encoding, sealed=True),
        Reader("pickle", make_pickle, ("source/*.bin",), answer_pickle, may_differ=True),
        Reader("tokenizer", make_tokenizer, ("*",), answer_tokenizer, may_differ=True),
        Reader("facts", make_onnx, ("x.lime/**/*",), answer_facts),
        Reader("sealed-facts", make_onnx, SMALL_FILES, answer_facts, sealed=True),
        Reader("onnx", make_onnx, ("x.lime/**/*",), answer_session),
        Reader("sealed-onnx", make_onnx, ("x.lime/onnx/*", *SMALL_FILES), answer_session, sealed=True),
        Reader("sealed-executorch", make_executorch, ("x.lime/executorch/*",), answer_session, sealed=True),
        Reader("sealed-coreml", make_coreml, ("x.lime/coreml/**/*",), answer_session, sealed=True),
    )
}
QUICK = ("manifest", "sealed-manifest", "bundle", "sealed-bundle", "expert")  # these need no torch
