"""Write what Kotlin and Swift must answer: tiny bundles, and beside them what Python's sessions say about each.

    python tools/write_phone_vectors.py FOLDER [--only sessions|refusals|tokenizers|coreml]

FOLDER then holds bundles, refused bundles, tokenizers, sessions.json, encoders.json, refusals.json and
manifests.json. Everything is drawn from seeds; answers depend on the ONNX Runtime that is installed, so they are
written anew for every run and never kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
from phone_vectors.bundles import write_bundles
from phone_vectors.coreml import write_coreml
from phone_vectors.refusals import write_manifests, write_refusals
from phone_vectors.sessions import record_decoder, record_demo, record_encoder
from phone_vectors.words import write_tokenizers

from lime_edge.bundle.archive import pack_bundle

PARTS = ("sessions", "refusals", "tokenizers")
COREML = "coreml"  # when asked for by name: coremltools is slow, and only Swift reads it


def main() -> None:
    """Write the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made if it is not there")
    parser.add_argument(
        "--only", choices=(*PARTS, COREML), action="append", help="some parts; refusals need the sessions' bundles"
    )
    parser.add_argument("--demo", type=Path, metavar="BUNDLE", help="greedy answers of this bundle, and nothing else")
    arguments = parser.parse_args()
    if arguments.demo:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        _write(arguments.folder / "demo.json", record_demo(arguments.demo))
        return
    folder, parts = arguments.folder, arguments.only or PARTS
    folder.mkdir(parents=True, exist_ok=True)
    if "sessions" in parts:
        write_sessions(folder)
    if "refusals" in parts:
        bundle = folder / "bundles" / "lora.lime"
        _write(
            folder / "refusals.json", write_refusals(bundle, folder / "bundles" / "foreign.lime", folder / "refused")
        )
        _write(folder / "manifests.json", write_manifests(bundle))
    if COREML in parts:
        with tempfile.TemporaryDirectory() as work:
            _write(folder / "coreml.json", write_coreml(folder / "bundles", Path(work)))
    if "tokenizers" in parts:
        _write(folder / "tokenizers.json", {"names": write_tokenizers(folder / "tokenizers")})


def write_sessions(folder: Path) -> None:
    """Export the bundles and record what Python answers."""
    with tempfile.TemporaryDirectory() as work:
        decoders, encoders = write_bundles(folder / "bundles", Path(work))
    (folder / "lora-int4.tar").unlink(missing_ok=True)
    pack_bundle(folder / "bundles" / "lora-int4.lime", folder / "lora-int4.tar")
    answers = {name: record_decoder(folder / "bundles" / f"{name}.lime") for name in decoders}
    _write(folder / "sessions.json", {"onnxruntime": onnxruntime.__version__, "bundles": answers})
    _write(folder / "encoders.json", {name: record_encoder(folder / "bundles" / f"{name}.lime") for name in encoders})


def _write(file: Path, document: Any) -> None:
    file.write_text(json.dumps(document), encoding="utf-8")
    print(file, f"{file.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
