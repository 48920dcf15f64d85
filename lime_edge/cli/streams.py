"""`-` in place of a file: what comes on standard input."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lime_edge.errors import LimeEdgeError

STDIN = Path("-")
Given = TypeVar("Given", Path, Path | None)


@contextmanager
def receive(file: Given, suffix: str) -> Iterator[Given]:
    """Yield `file`, or where it is "-" a temporary file with what standard input holds.

    Args:
        suffix: of the temporary file: ".jsonl", ".safetensors".
    Raises:
        LimeEdgeError: standard input is empty.
    """
    if file != STDIN:
        yield file
        return
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    if not data:
        raise LimeEdgeError("standard input (-) is empty", "pipe something into it, or name a file")
    with tempfile.TemporaryDirectory(prefix="lime-edge.") as folder:
        path = Path(folder) / f"standard-input{suffix}"
        path.write_bytes(data)
        yield path


def read_prompt(prompt: str) -> str:
    """A prompt as typed, or where it is "-" the text of standard input without the line end at its end."""
    if prompt != str(STDIN):
        if not prompt:
            raise LimeEdgeError("the prompt is empty", "write one, pipe one into -, or leave it out to chat")
        return prompt
    try:
        given = sys.stdin.buffer.read().decode("utf-8") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
        text = given.replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise LimeEdgeError(f"standard input (-) is no UTF-8: {error}", "pipe text into it") from None
    if not text:
        raise LimeEdgeError("standard input (-) is empty", "pipe a prompt into it, or write the prompt")
    return text
