"""Tiny random vision-language models with a tokenizer, a chat template and an image processor's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import EOS, write_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

VOCAB = 300
IMAGE, VIDEO = "<image>", "<video>"
IMAGE_TOKEN, VIDEO_TOKEN = 297, 298
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% else %}<{{ part['type'] }}>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_act": "gelu_pytorch_tanh",
}
GRIDS = [[28, 28], [28, 56], [56, 28], [56, 56], [28, 84]]
SETTINGS: dict[str, dict[str, Any]] = {
    "llava_onevision": {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 28, "width": 28},
        "image_grid_pinpoints": GRIDS,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
    },
    "smolvlm": {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
        "do_image_splitting": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 1,
        "rescale_factor": 1 / 255,
    },
}
SETTINGS["idefics3"] = SETTINGS["smolvlm"]


def describe_model(family: str, tied: bool = False) -> dict[str, Any]:
    """The config of a tiny model of a family."""
    text = {**TEXT, "tie_word_embeddings": tied}
    if family == "llava_onevision":
        vision = {
            **TOWER,
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        }
        return {
            "text_config": {**text, "model_type": "qwen2"},
            "vision_config": vision,
            "image_token_index": IMAGE_TOKEN,
            "video_token_index": VIDEO_TOKEN,
            "image_grid_pinpoints": GRIDS,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "tie_word_embeddings": tied,
        }
    return {
        "text_config": {**text, "model_type": "llama"},
        "vision_config": {**TOWER, "image_size": 32, "patch_size": 8},
        "image_token_id": IMAGE_TOKEN,
        "scale_factor": 2,
        "tie_word_embeddings": tied,
    }


def make_vision_model(directory: Path, family: str, seed: int = 0, tied: bool = False) -> Path:
    """Write a tiny random model of `llava_onevision`, `smolvlm` or `idefics3`."""
    config = AutoConfig.for_model(family, **describe_model(family, tied))
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    redraw(model, seed)
    model.tie_weights()
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(directory)
    write_vision_tokenizer(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(SETTINGS[family], indent=1), encoding="utf-8")
    return directory


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Random weights that keep activations near 1; norms differ from 1. Drawn in the order of names."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=random)
        if "norm" in name and name.endswith("weight"):
            values = 1.0 + 0.2 * values
        elif parameter.ndim == 1:
            values = 0.3 * values
        else:
            values = (
                values * (2.0 if "embed_tokens" in name or "lm_head" in name else 1.0) / parameter[0].numel() ** 0.5
            )
        parameter.copy_(values)


def write_vision_tokenizer(directory: Path) -> None:
    """The tiny tokenizer, its unused tokens at the placeholders' ids called what the placeholders are called."""
    write_tokenizer(directory, VOCAB)
    file = directory / "tokenizer.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    vocab = facts["model"]["vocab"]
    names = {index: token for token, index in vocab.items()}
    for token, index in ((IMAGE, IMAGE_TOKEN), (VIDEO, VIDEO_TOKEN)):
        old = names[index]
        facts["model"]["merges"] = [pair for pair in facts["model"]["merges"] if "".join(pair) != old]
        del vocab[old]
        vocab[token] = index
        facts["added_tokens"].append({**facts["added_tokens"][0], "id": index, "content": token})
    facts["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    file.write_text(json.dumps(facts), encoding="utf-8")
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def draw_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: a gradient with noise, different for every seed."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    return np.clip(ramp + random.integers(0, 56, (height, width, 3)) * random.random(3), 0, 255).astype(np.uint8)
