"""What a bundle of the demo's model takes, exported as README's commands export it: the sizes that README tells.

`make sizes` exports the real model twice, installs experts up to 100, adds up the files, and writes docs/sizes.json
and README's table of it. tests/test_sizes.py holds both to what a model of these widths takes today, without the real
model: a bundle grows by the same bytes with every layer and every expert.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import lime_edge
from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.change import add_experts
from lime_edge.bundle.experts import Expert
from lime_edge.cli.demo import find_backbone
from lime_edge.compiler.options import KEPT_INT8, CompileOptions
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.targets.devices import find_device

ROOT = Path(__file__).parent.parent
README, SIZES = ROOT / "README.md", ROOT / "docs" / "sizes.json"
ADAPTER = ROOT / "examples" / "demo_adapter" / "adapter"
EXPORTS = {"default": KEPT_INT8, "--keep-int8 none": ()}  # how it is called -> what int4 keeps at int8
COUNTS = (16, 100)  # experts: the demo's, and many
TABLE = re.compile(r"(<!-- table: sizes[^>]*-->\n\n).*?(?=\n\n)", re.S)


def weigh(model: Path, adapter: Path, kept: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Export with these matrices at int8, add experts, and weigh.

    `rounding` is the cheapest one: which integers are written does not change how many bytes they take.

    Returns:
        total: experts -> bytes of the whole bundle. expert: bytes of one expert's file. layers: their number.
        tokenizer: bytes of its files. sum_h: numbers in an expert.
    """
    path = folder / "weighed.lime"
    compiling = CompileOptions("int4", rounding="nearest", keep_int8=kept)
    export_bundle(model, adapter, path, compiling, find_device("cpu"), ExportOptions(force=True))
    bundle, total = Bundle.open(path), {}
    for count in COUNTS:
        bundle = grow(bundle, count)
        total[str(count)] = weigh_folder(path)
    manifest = bundle.manifest
    return {
        "total": total,
        "expert": manifest.find_expert(manifest.experts[0]).size,
        "layers": manifest.backbone.layers,
        "tokenizer": weigh_folder(path / "tokenizer"),
        "sum_h": manifest.sites.total,
    }


def grow(bundle: Bundle, count: int) -> Bundle:
    """The bundle with random experts added until there are `count`."""
    manifest, drawn = bundle.manifest, np.random.default_rng(0)
    more = [
        Expert(f"skill{index:03d}", drawn.normal(1, 0.5, manifest.sites.total).astype("<f2"), manifest.adapter_id)
        for index in range(len(manifest.experts), count)
    ]
    return add_experts(bundle.path, more) if more else bundle


def weigh_folder(path: Path) -> int:
    """Bytes of all files in it."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def write_table(readme: str, sizes: dict[str, Any]) -> str:
    """README with the table of `sizes` in its place."""
    lines = ["| exported with | 16 skills | 100 skills | every further skill |", "|---|---|---|---|"]
    for name, facts in sizes["exports"].items():
        totals = " | ".join(f"{facts['total'][str(count)] / 1e6:.0f} MB" for count in COUNTS)
        option = "default options" if name == "default" else f"`{name}`"
        lines.append(f"| {option} | {totals} | {facts['expert'] / 1e3:.0f} kB |")
    text, found = TABLE.subn(lambda match: match[1] + "\n".join(lines), readme)
    assert found == 1, "README has no place for the table of sizes"
    return text


def main() -> None:
    """Measure, and write both files."""
    with tempfile.TemporaryDirectory() as folder:
        exports = {name: weigh(find_backbone(), ADAPTER, kept, Path(folder)) for name, kept in EXPORTS.items()}
    sizes = {"model": "SmolLM2-135M-Instruct, int4", "lime_edge": lime_edge.__version__, "exports": exports}
    SIZES.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    README.write_text(write_table(README.read_text(encoding="utf-8"), sizes), encoding="utf-8")
    print(json.dumps(exports, indent=1))


if __name__ == "__main__":
    main()
