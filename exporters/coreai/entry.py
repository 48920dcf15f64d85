"""What Core AI offers the export."""

from __future__ import annotations

from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.coreai.decoder import write_decoder
from lime_edge.exporters.coreai.encoder import write_encoder
from lime_edge.targets.entries import CoreaiOptions

WRITERS = {"decoder": write_decoder, "encoder": write_encoder}


def check_options(kind: str, options: CoreaiOptions, quant: str, group: int) -> None:
    """Refuse lengths that hold nothing, before anything is compiled.

    Args:
        quant, group: not read, every width and group can be written.
    Raises:
        LimeEdgeError: no positive length.
    """
    if not options.prompt_lengths or min(options.prompt_lengths) < 1:
        found = ",".join(map(str, options.prompt_lengths))
        raise LimeEdgeError(f"`prompt_lengths`: expected positive integers, found {found!r}", "for example 32,128")
    if kind == "decoder" and options.max_seq_len < 1:
        raise LimeEdgeError(
            f"`max_seq_len`: for Core AI expected at least 1, found {options.max_seq_len}",
            "prompt and answer have to fit into it; 1024 is the default",
        )


def weigh_matrix(rows: int, columns: int, bits: int, group: int, table: bool) -> int:
    """Bytes of a matrix as it is stored, float16 scales."""
    return rows * columns * bits // 8 + 2 * (rows * columns // group)
