"""What Core ML offers the export."""

from __future__ import annotations

from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.coreml.decoder import write_decoder
from lime_edge.exporters.coreml.encoder import write_encoder
from lime_edge.exporters.coreml.graph import read_minimum
from lime_edge.targets.entries import CoremlOptions

WRITERS = {"decoder": write_decoder, "encoder": write_encoder}
COMPUTE_UNITS = ("all", "cpu_and_ne", "cpu_and_gpu", "cpu_only")


def check_options(kind: str, options: CoremlOptions, quant: str, group: int) -> None:
    """Refuse what Core ML has no word for, before anything is compiled.

    Args:
        quant, group: not read, every width and group can be written.
    Raises:
        LimeEdgeError: unknown compute units or oldest system, no positive length.
    """
    if options.compute_units not in COMPUTE_UNITS:
        raise LimeEdgeError(
            f"`compute_units`: expected {' or '.join(COMPUTE_UNITS)}, found {options.compute_units!r}",
            "all leaves the choice to Core ML",
        )
    read_minimum(options.minimum_os)
    if not options.prompt_lengths or min(options.prompt_lengths) < 1:
        found = ",".join(map(str, options.prompt_lengths))
        raise LimeEdgeError(f"`prompt_lengths`: expected positive integers, found {found!r}", "for example 32,128")
    if kind == "decoder" and options.max_seq_len < 1:
        raise LimeEdgeError(
            f"`max_seq_len`: for Core ML expected at least 1, found {options.max_seq_len}",
            "prompt and answer have to fit into it; 1024 is the default",
        )


def weigh_matrix(rows: int, columns: int, bits: int, group: int, table: bool) -> int:
    """Bytes of a matrix as it is stored, float16 scales."""
    return rows * columns * bits // 8 + 2 * (rows * columns // group)
