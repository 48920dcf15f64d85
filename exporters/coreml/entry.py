"""What Core ML offers the export."""

from __future__ import annotations

from lime_edge.errors import LimeEdgeError
from lime_edge.exporters.coreml.decoder import write_decoder
from lime_edge.exporters.coreml.encoder import write_encoder
from lime_edge.exporters.coreml.graph import read_minimum
from lime_edge.exporters.half import weigh_matrix
from lime_edge.exporters.padded import check_lengths
from lime_edge.targets.entries import CoremlOptions

__all__ = ["COMPUTE_UNITS", "WRITERS", "check_options", "weigh_matrix"]
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
    check_lengths("Core ML", kind, options)
