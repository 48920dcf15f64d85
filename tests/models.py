"""Tiny random models and adapters for the test-suite: seeded, built in milliseconds, loud enough to hear.

Weights are drawn so that logits differ by whole units and the adapter's branch moves them by as much:
a term left out shows as an error of about 1, not of 1e-3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lime_edge.compiler.formats.adapter_checks import name_selection
from lime_edge.compiler.maths.routing import RoutingConfig

VOCAB = 300
CONTEXT = 64
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, START, STOP)
EOS = SPECIAL.index(STOP)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EMBEDDING = "model.embed_tokens"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """One model to prove: family, changes to its config, and which linears its adapter targets."""

    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ATTENTION
    shared: bool = False


def _rope(kind: str, **values: float) -> dict[str, Any]:
    """rope_parameters of one scaling; the original context lies inside the tests' sequences."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


_SLIDING = {"use_sliding_window": True, "sliding_window": 6}
# Powers of two: folding them into float32 weights rounds nothing, so that float64 shows what is wrong.
GRANITE = {
    "embedding_multiplier": 4.0,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.5,
}
CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama-tied": Case("llama", {"tie_word_embeddings": True}, ALL_LINEARS, shared=True),
    "llama-linear": Case("llama", _rope("linear", factor=2.0), ("q_proj", "v_proj")),
    "llama-llama3": Case(
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama-yarn": Case("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-yarn-factor": Case(
        "llama",
        _rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.8, beta_fast=8.0, beta_slow=2.0
        ),
    ),
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True}, ALL_LINEARS),
    "llama-head-dim": Case("llama", {"head_dim": 32}, ALL_LINEARS, shared=True),
    "llama-one-kv-head": Case("llama", {"num_key_value_heads": 1}, ("k_proj", "up_proj")),
    "llama-gelu": Case("llama", {"hidden_act": "gelu"}, ("gate_proj",)),
    "llama-gelu-tanh": Case("llama", {"hidden_act": "gelu_pytorch_tanh"}, ("gate_proj", "up_proj", "down_proj")),
    "mistral": Case("mistral", {"sliding_window": None}),
    "mistral-window": Case("mistral", {"sliding_window": 5, "head_dim": 32}),
    "mistral-window-2": Case("mistral", {"sliding_window": 2}, ("q_proj", "v_proj")),
    "qwen2": Case("qwen2", {}, ("q_proj", "v_proj")),
    "qwen2-sliding": Case("qwen2", {**_SLIDING, "max_window_layers": 1, "num_hidden_layers": 3}, ALL_LINEARS),
    "qwen2-tied": Case("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}, ("gate_proj",)),
    "qwen3": Case("qwen3", {"head_dim": 32, "tie_word_embeddings": True}, ALL_LINEARS, shared=True),
    "qwen3-sliding": Case("qwen3", {**_SLIDING, "max_window_layers": 1, "head_dim": 16, "attention_bias": True}),
    "smollm2": Case(
        "llama",
        {
            "tie_word_embeddings": True,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 96,
            **_rope("default"),
        },
    ),
    "seed_oss": Case("seed_oss", {"head_dim": 32, "attention_bias": True, "attention_out_bias": False}, ALL_LINEARS),
    "granite": Case("granite", GRANITE, ALL_LINEARS, shared=True),
    "granite-tied": Case("granite", {**GRANITE, "tie_word_embeddings": True, "attention_bias": True}, ALL_LINEARS),
    "smollm3": Case("smollm3", {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 1], "num_hidden_layers": 3}),
    "smollm3-sliding": Case(
        "smollm3",
        {**_SLIDING, "no_rope_layers": [1, 0, 1], "num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True},
        ALL_LINEARS,
    ),
}


def make_model(directory: Path, family: str, seed: int = 0, **config_changes: Any) -> Path:
    """Write a tiny random Hugging Face model with a working tokenizer and chat template.

    Args:
        directory: made; family: a `transformers` model_type. config_changes: on top of TINY.
    Returns:
        The directory.
    """
    config = AutoConfig.for_model(family, **(TINY | config_changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    redraw_weights(model, seed)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(directory)
    write_tokenizer(directory, config.vocab_size)
    return directory


@torch.no_grad()
def redraw_weights(model: nn.Module, seed: int) -> None:
    """Random weights that keep activations near 1 and give logits of about +-2; norms differ from 1."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=random)
        if name.endswith("norm.weight") or (parameter.ndim == 1 and name.endswith(".weight")):
            values = 1.0 + 0.2 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif name.startswith(("model.embed_tokens", "lm_head")):
            values = 2.0 * values / parameter.shape[1] ** 0.5
        else:
            values = values / parameter.shape[1] ** 0.5
        parameter.copy_(values)


def write_tokenizer(directory: Path, vocab: int) -> None:
    """A byte-level BPE of exactly `vocab` tokens (at least 259): specials, bytes, then letter pairs."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    pairs = [(first, second) for first in letters for second in letters][: vocab - len(tokens)]
    tokens += [first + second for first, second in pairs]
    tokens += [f"<|unused{index}|>" for index in range(vocab - len(tokens))]
    assert len(tokens) == vocab, f"a byte-level vocabulary has at least {len(tokens)} tokens"
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": START,
        "eos_token": STOP,
        "pad_token": END,
        "unk_token": END,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


def make_adapter(
    directory: Path,
    model_dir: Path,
    targets: tuple[str, ...] = ATTENTION,
    rank: int = 4,
    experts: int = 4,
    shared: bool = False,
    spread: float = 0.5,
    seed: int = 0,
    variant: str = "lora",
    routing: Mapping[str, Any] | None = None,
    rounded: bool = False,
    activation: Mapping[str, Any] | None = None,
) -> Path:
    """Write a random LiME adapter for a model: its experts are N(1, spread) and its branch is loud.

    Args:
        directory: made. model_dir: a directory of `make_model`. targets: module names or their last parts.
        shared: add a shared vector and its gamma. variant: lora, lora_fa, dora or slicefine.
        routing: hyper-parameters of routing; None makes an adapter whose experts are pinned only.
        rounded: to what float16 can hold. activation: on which tokens it acts, as the format has it.
    Returns:
        The directory.
    """
    random = torch.Generator().manual_seed(1000 + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    tensors: dict[str, Tensor] = {}
    for key, weight in sorted(load_file(model_dir / "model.safetensors").items()):
        name = key.removesuffix(".weight")
        if not key.endswith(".weight") or not {name, name.rsplit(".", 1)[-1]} & set(targets):
            continue
        width, depth = weight.shape
        if name == EMBEDDING:
            tensors |= draw_embedding(weight, rank, experts, spread, shared, variant, random)
            continue
        if variant == "slicefine":
            tensors[f"{name}.part_T"] = weight[:rank] + 0.3 * draw(rank, depth) / depth**0.5
        else:
            tensors[f"{name}.A"] = draw(rank, depth) / depth**0.5
            tensors[f"{name}.B"] = 0.15 * draw(width, rank)
        if variant == "dora":
            tensors[f"{name}.m"] = weight.norm(dim=1) * (1.0 + 0.2 * draw(width))
        tensors[f"{name}.LiMEs"] = 1.0 + spread * draw(experts, width)
        if shared:
            tensors[f"{name}.LiME_shared"] = draw(width)
            tensors[f"{name}.gamma"] = torch.tensor([0.3])
    config = {
        "peft_type": "LIME",
        "variant": variant,
        "base_model_name_or_path": model_dir.name,
        "target_modules": list(targets),
        "r": rank,
        "lora_alpha": 2.0 * rank,
        "num_experts": experts,
        "expert_names": [f"expert{index}" for index in range(experts)],
        "use_shared_lime": shared,
        "routing": "pinned" if routing is None else name_selection(RoutingConfig(**routing)),
    } | dict(routing or {})
    if activation:
        config["activation"] = dict(activation)
    if "embed_tokens" in targets:
        config["embedding_modules"] = ["embed_tokens"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if rounded:
        tensors = {name: tensor.half().float() for name, tensor in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def draw_embedding(
    weight: Tensor, rank: int, experts: int, spread: float, shared: bool, variant: str, random: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of a site on the embedding table (V, H)."""
    vocab, width = weight.shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    parts = {"LiMEs": 1.0 + spread * draw(experts, width)}
    if variant == "slicefine":
        parts["part_T"] = weight[:, :rank] + 0.3 * draw(vocab, rank)
    else:
        parts["A"] = draw(rank, width) / width**0.5
        parts["B"] = 0.15 * draw(width if variant == "lora" else vocab, rank)
    if variant == "dora":
        parts["m"] = weight.norm(dim=0) * (1.0 + 0.2 * draw(width))
    if shared:
        parts |= {"LiME_shared": draw(width), "gamma": torch.tensor([0.3])}
    return {f"{EMBEDDING}.{name}": tensor for name, tensor in parts.items()}


def load_sites(adapter: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """An adapter as `UnfoldedModel` takes it: module name -> tensors, and hyper-parameters."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    sites: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        name, part = key.rsplit(".", 1)
        sites.setdefault(name, {})[part] = tensor
    return sites, {**config, "alpha": config["lora_alpha"]}


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The `transformers` model of a directory, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()


def draw_ids(count: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """(1, count) random token ids, no special ones."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), vocab, (1, count), generator=random)
