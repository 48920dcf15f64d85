"""What ONNX offers the export."""

from __future__ import annotations

from lime_edge.exporters.onnx.decoder import write_decoder
from lime_edge.exporters.onnx.encoder import write_encoder
from lime_edge.exporters.onnx.genai import check_genai, write_genai
from lime_edge.exporters.onnx.vision import write_vision
from lime_edge.exporters.onnx.weights import choose_block
from lime_edge.targets.entries import OnnxOptions

WRITERS = {"decoder": write_decoder, "encoder": write_encoder, "vision-language": write_vision}
COMPANIONS = {"genai": (check_genai, write_genai)}


def check_options(kind: str, options: OnnxOptions, quant: str, group: int) -> None:
    """Nothing that can be asked for is refused here: what this target needs is checked on the model."""


def weigh_matrix(rows: int, columns: int, bits: int, group: int, table: bool) -> int:
    """Bytes of a matrix as MatMulNBits stores it: float32 scales, an int8 row's in every block of it."""
    block = group if bits == 4 else choose_block(columns)
    blocks = -(-columns // block)
    return rows * blocks * (block * bits // 8 + 4)
