"""What lies beside the artifacts: the tokenizer of a text model, the preprocessor's numbers of a vision model."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from lime_edge.bundle.prompts import TextCodec
from lime_edge.compiler.formats.backbone import quiet
from lime_edge.compiler.formats.decoder import find_gguf
from lime_edge.compiler.formats.files import reading
from lime_edge.compiler.model.oracle import Encode
from lime_edge.errors import LimeEdgeError

TOKENIZER, PREPROCESSOR = "tokenizer", "preprocessor"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
PREPROCESSOR_FILE = "preprocessor_config.json"


def copy_preprocessor(model: Path, directory: Path) -> None:
    """Put the numbers of a vision model's preprocessor (mean, deviation, size) into `directory`, where it has any."""
    if (model / PREPROCESSOR_FILE).is_file():
        directory.mkdir()
        shutil.copyfile(model / PREPROCESSOR_FILE, directory / PREPROCESSOR_FILE)


def copy_tokenizer(model: Path, directory: Path) -> None:
    """Put what a device needs to tokenize into `directory`.

    Raises:
        LimeEdgeError: the model has no tokenizer.
    """
    from transformers import AutoTokenizer

    directory.mkdir()
    gguf = find_gguf(model)
    hint = "add tokenizer.json to the model directory, or pass `tokenizer=False` to feed token ids only"
    if gguf is None and (model / "tokenizer.json").is_file():
        for name in TOKENIZER_FILES:
            if (model / name).is_file():
                shutil.copyfile(model / name, directory / name)
        return
    if gguf is None and not (model / "tokenizer.model").is_file():
        raise LimeEdgeError(f"{model}: tokenizer.json is missing", hint)
    source = gguf.parent if gguf else model
    with reading(f"{source}: no readable tokenizer", hint), quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name if gguf else None, local_files_only=True)
        tokenizer.save_pretrained(directory)
    if not (directory / "tokenizer.json").is_file():
        raise LimeEdgeError(f"{source}: the tokenizer has no fast (tokenizer.json) form", hint)


def read_tokenizer(directory: Path) -> Encode | None:
    """Text to token ids as the model reads them, special tokens added; None for a bundle without a tokenizer."""
    return partial(TextCodec(directory).encode, add_special_tokens=True) if directory.is_dir() else None


def read_plainly(directory: Path) -> Encode | None:
    """Text to token ids as it is written, none added; None for a bundle without a tokenizer."""
    return TextCodec(directory).encode if directory.is_dir() else None
