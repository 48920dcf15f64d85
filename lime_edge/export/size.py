"""A bundle of a size: what its matrices may take once everything else is in, and whether it kept to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lime_edge.compiler.model.compiled import Compiled, CompiledModel
from lime_edge.compiler.options import CompileOptions
from lime_edge.compiler.rounding.spending import Budget
from lime_edge.errors import LimeEdgeError
from lime_edge.targets.registry import Exporter

ROOM = 500_000  # graph, manifest, character classes
ROOM_PER_EXPERT = 20_000  # golden outputs, an expert file's header


def plan_budget(
    folded: Compiled, compiling: CompileOptions, exporters: Mapping[str, Exporter], tokenizer: Path
) -> Budget:
    """What the matrices may take. Of several targets, each alone with what they share is to keep to the size.

    Args:
        tokenizer: its staged directory, which may not exist.
    Raises:
        LimeEdgeError: a target that cannot say what it stores.
    """

    scales = {name: one.weigh_matrix for name, one in exporters.items()}
    if silent := [name for name, one in scales.items() if one is None]:
        raise LimeEdgeError(f"target {', '.join(silent)} does not say what a matrix weighs", "take `keep_int8`")

    def weigh(rows: int, columns: int, bits: int, group: int, table: bool) -> int:
        return max(one(rows, columns, bits, group, table) for one in scales.values() if one is not None)

    rest = estimate_rest(folded, weigh_folder(tokenizer))
    return Budget(None if compiling.size is None else compiling.size - rest, weigh, rest)


def estimate_rest(folded: Compiled, tokenizer: int) -> int:
    """Bytes of a decoder's bundle that are no matrices: experts, branches, vectors, rotations, tokenizer and graph."""
    total, count = folded.sites.total, len(folded.experts)
    size = tokenizer + ROOM + count * (2 * total + ROOM_PER_EXPERT) + 4 * total
    size += 4 * sum(vector.numel() for vector in folded.vectors.values())
    if isinstance(folded, CompiledModel):
        size += 4 * folded.decoder.context * folded.decoder.head_dim * len(folded.decoder.rotations)
        for branch in folded.all_branches():
            size += 2 * sum(matrix.numel() for matrix in (branch.a, branch.b) if matrix is not None)
    return size


def check_size(stage: Path, compiling: CompileOptions, targets: Mapping[str, Exporter]) -> None:
    """Refuse a staged bundle that is larger than was asked for.

    Raises:
        LimeEdgeError: with what it weighs, for each target alone.
    """
    if compiling.size is None:
        return
    artifacts = {name: weigh_folder(stage / name) for name in targets}
    shared = weigh_folder(stage) - sum(artifacts.values())
    for name, size in artifacts.items():
        if shared + size > compiling.size:
            raise LimeEdgeError(
                f"`size`: the bundle for {name} takes {(shared + size) / 1e6:.2f}MB, asked for were "
                f"{compiling.size / 1e6:.2f}MB",
                f"nothing was written; with size={(2 * compiling.size - shared - size) / 1e6:.1f}MB it should fit",
            )


def weigh_folder(folder: Path) -> int:
    """Bytes of all files in it; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
