"""What ExecuTorch offers the export."""

from __future__ import annotations

from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.executorch.decoder import write_decoder
from lime_edge.exporters.executorch.encoder import write_encoder
from lime_edge.exporters.executorch.lower import check_backend
from lime_edge.exporters.executorch.vision import write_vision
from lime_edge.exporters.executorch.weights import check_group
from lime_edge.targets.entries import ExecutorchOptions

WRITERS = {"decoder": write_decoder, "encoder": write_encoder, "vision-language": write_vision}


def check_options(kind: str, options: ExecutorchOptions, quant: str, group: int) -> None:
    """Refuse, before anything is compiled, what this target does not take.

    Raises:
        LimeEdgeError: the backend, the group size, the cache's length, or a stock runner for pictures.
    """
    check_backend(options.backend, quant)
    if quant == "int4":
        check_group(group)
    if kind == "vision-language" and options.stock_runner:
        raise LimeEdgeError("`stock_runner`: stock runners of text give a model no pictures", "leave it out")
    if kind != "encoder" and options.max_seq_len < 2:
        raise LimeEdgeError(
            f"`max_seq_len`: for ExecuTorch expected at least 2, found {options.max_seq_len}",
            "prompt and answer have to fit into it; 1024 is the default",
        )


def weigh_matrix(rows: int, columns: int, bits: int, group: int, table: bool) -> int:
    """Bytes of a matrix as XNNPACK stores it, a group's scale in bfloat16; of a table also its rows to look up."""
    codes, scales = rows * columns * bits // 8, rows * columns // group
    product = codes + scales * (2 if bits == 4 else 4)
    return product + (codes + 4 * scales if table else 0)
