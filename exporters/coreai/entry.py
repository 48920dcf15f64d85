"""What Core AI offers the export."""

from __future__ import annotations

from lime_edge.exporters.coreai.decoder import write_decoder
from lime_edge.exporters.coreai.encoder import write_encoder
from lime_edge.exporters.half import weigh_matrix
from lime_edge.exporters.padded import check_lengths
from lime_edge.targets.entries import CoreaiOptions

__all__ = ["WRITERS", "check_options", "weigh_matrix"]
WRITERS = {"decoder": write_decoder, "encoder": write_encoder}


def check_options(kind: str, options: CoreaiOptions, quant: str, group: int) -> None:
    """Refuse lengths that hold nothing, before anything is compiled.

    Args:
        quant, group: not read, every width and group can be written.
    Raises:
        LimeEdgeError: no positive length.
    """
    check_lengths("Core AI", kind, options)
