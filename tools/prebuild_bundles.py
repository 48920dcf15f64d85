"""Fill a directory with the tests' tiny bundles and torch's values for them, for machines without torch.

    python tools/prebuild_bundles.py DIRECTORY
    LIME_EDGE_PREBUILT=DIRECTORY python -m pytest tests/test_golden.py tests/test_session.py     (anywhere)

tests/prebuilt.py lists the bundles; each is named by what `tiny_bundle` is asked for.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from models import make_adapter, make_model  # noqa: E402
from prebuilt import ADAPTERS, BUNDLES, ODD, name_of, write_golden  # noqa: E402

from lime_edge.compiler.formats.backbone import quiet  # noqa: E402
from lime_edge.compiler.options import CompileOptions  # noqa: E402
from lime_edge.export.pipeline import ExportOptions, export_bundle  # noqa: E402
from lime_edge.targets.devices import find_device  # noqa: E402


def main() -> None:
    """Export every bundle of the list and write its golden values beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="made if it is not there; bundles in it are replaced")
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, quiet():
        model = make_model(Path(folder) / "model", "llama")
        adapter = make_adapter(Path(folder) / "adapter", model)
        for options in BUNDLES:
            name = name_of(options)
            compiling = CompileOptions(**{"quant": "none", **options})
            export_bundle(
                model, adapter, directory / f"{name}.lime", compiling, find_device("cpu"), ExportOptions(force=True)
            )
            write_golden(directory / f"{name}.npz", model, adapter, options)
            print(f"{directory / name}.lime and .npz")
        model = make_model(Path(folder) / "odd", "llama", **ODD)
        for name, changes in ADAPTERS.items():
            adapter = make_adapter(Path(folder) / name, model, **changes)
            export_bundle(
                model,
                adapter,
                directory / f"{name}.lime",
                CompileOptions("none"),
                find_device("cpu"),
                ExportOptions(force=True),
            )
            print(f"{directory / name}.lime")


if __name__ == "__main__":
    main()
