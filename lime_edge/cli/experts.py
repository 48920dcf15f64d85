"""lime-edge experts: list, add, pack, remove, blend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from lime_edge import terminal
from lime_edge.cli.command import App
from lime_edge.cli.options import BundlePath, Json
from lime_edge.cli.streams import receive
from lime_edge.errors import LimeEdgeError

if TYPE_CHECKING:
    from lime_edge.bundle.experts import Expert

experts_app = App(no_args_is_help=True, help="The experts of a bundle: list, add, pack, remove, blend.")


@experts_app.command("list")
def list_experts(bundle: BundlePath, as_json: Json = False) -> None:
    """Names, sizes and how far each is from the folded reference."""
    from lime_edge.bundle.bundle import Bundle

    opened = Bundle.open(bundle)
    bank = opened.open_bank()
    rows = [
        {
            "name": name,
            "file": opened.manifest.expert_files[name],
            "bytes": opened.manifest.find_expert(name).size,
            "dtype": str(bank.vector(name).dtype),
            "residual_rms": float(np.sqrt(np.mean(bank.residual(name) ** 2))),
        }
        for name in bank.names
    ]
    if as_json:
        terminal.print_json(rows)
        return
    cells = [
        [str(r["name"]), terminal.show_size(float(str(r["bytes"]))), str(r["dtype"]), f"{r['residual_rms']:.4f}"]
        for r in rows
    ]
    columns = {"expert": "left", "size": "right", "dtype": "left", "rms of d = p - p_ref": "right"}
    terminal.print_table(f"{len(rows)} experts in {bundle}", columns, cells)


@experts_app.command(
    "add",
    epilog="\n[bold]Examples[/bold]\n\n lime-edge experts add my.lime new-skill.safetensors\n\n"
    " lime-edge experts add my.lime examples/demo_adapter/new_expert",
)
def add(
    bundle: BundlePath,
    file: Annotated[
        Path,
        typer.Argument(
            help="An expert file (.safetensors; - reads one from standard input), or a folder of vectors "
            "(adapter_config.json)."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Store it under this name.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an expert of the same name.")] = False,
    as_json: Json = False,
) -> None:
    """Add an expert to a bundle: delivered skills need no new export."""
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.bundle.change import add_experts
    from lime_edge.bundle.experts import read_expert
    from lime_edge.bundle.vectors import read_vectors

    opened = Bundle.open(bundle)
    with receive(file, ".safetensors") as given:
        experts = read_vectors(given, opened) if given.is_dir() else [read_expert(given, opened.manifest.sites.total)]
    if name:
        experts = [replace(_only(experts, None, file), name=name)]
    opened = add_experts(bundle, experts, replace=force)
    names = [expert.name for expert in experts]
    if as_json:
        terminal.print_json({"bundle": str(bundle), "added": names, "experts": list(opened.manifest.experts)})
        return
    added = ", ".join(map(repr, names))
    terminal.tell(f"added {added}: {len(opened.manifest.experts)} experts in {bundle}")


@experts_app.command("pack")
def pack(
    folder: Annotated[Path, typer.Argument(help="A folder of vectors, as training a new expert leaves it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The expert file to write (.safetensors).")],
    bundle: Annotated[Path, typer.Option(help="A bundle of the same backbone and shared adapter.")],
    expert: Annotated[str | None, typer.Option(help="Which one, where the folder holds several.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Make a folder of vectors into one file to deliver: session.install and experts add take it."""
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.bundle.staging import write_file
    from lime_edge.bundle.vectors import read_vectors

    if output.exists() and not force:
        raise LimeEdgeError(f"{output}: already exists", "choose another name or pass --force")
    chosen = _only(read_vectors(folder, Bundle.open(bundle)), expert, folder)
    data = chosen.to_bytes()
    write_file(output, data)
    if as_json:
        terminal.print_json({"file": str(output), "expert": chosen.name, "bytes": len(data)})
        return
    terminal.tell(f"{output}: expert {chosen.name!r}, {terminal.show_size(len(data))}")


def _only(experts: list[Expert], name: str | None, where: Path) -> Expert:
    chosen = [expert for expert in experts if name in (None, expert.name)]
    if len(chosen) != 1:
        known = ", ".join(expert.name for expert in experts)
        raise LimeEdgeError(f"{where}: expected one expert, found {len(chosen)}", f"it holds {known}")
    return chosen[0]


@experts_app.command("remove")
def remove(
    bundle: BundlePath,
    name: Annotated[str, typer.Argument(help="The expert to take out.")],
    as_json: Json = False,
) -> None:
    """Take an expert out of a bundle."""
    from lime_edge.bundle.bundle import Bundle
    from lime_edge.bundle.change import remove_expert

    before = Bundle.open(bundle).manifest.default
    changed = remove_expert(bundle, name)
    if as_json:
        terminal.print_json({"bundle": str(bundle), "removed": [name], "experts": list(changed.manifest.experts)})
        return
    terminal.tell(f"removed {name!r}: {len(changed.manifest.experts)} experts in {bundle}")
    if changed.manifest.default != before:
        terminal.note(f"the bundle opened with {before!r}; now it opens with {changed.manifest.default!r}")


@experts_app.command(
    "blend", epilog="\n[bold]Example[/bold]\n\n lime-edge experts blend my.lime movie=0.7,intent=0.3 --name mix"
)
def blend(
    bundle: BundlePath,
    recipe: Annotated[str, typer.Argument(help="NAME=WEIGHT,NAME=WEIGHT; weights sum to 1.")],
    name: Annotated[str, typer.Option(help="Name of the new expert.")],
    force: Annotated[bool, typer.Option(help="Replace an expert of the same name.")] = False,
    as_json: Json = False,
) -> None:
    """Write a fixed mixture of experts as a new expert."""
    from lime_edge.bundle.change import add_blend
    from lime_edge.bundle.experts import describe_selection, parse_selection

    selection = parse_selection(recipe)
    changed = add_blend(bundle, selection, name, replace=force)
    if as_json:
        terminal.print_json({"bundle": str(bundle), "added": [name], "experts": list(changed.manifest.experts)})
        return
    terminal.tell(f"added {name!r}, a blend of {describe_selection(selection)}")
