"""The encoder and vision fixtures through an exported bundle: imported, exported in float32, run by a session.

`tests/conformance.py --target onnx` takes `check_exported_encoder` for what `is_encoder_fixture` says is one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lime_edge.bundle.bundle import Bundle
from lime_edge.compiler.formats.encoder import TASKS
from lime_edge.compiler.formats.hyper import ImportOptions
from lime_edge.compiler.formats.importing import import_checkpoint
from lime_edge.compiler.maths.layers import Mode
from lime_edge.compiler.options import CompileOptions
from lime_edge.export.pipeline import ExportOptions, export_bundle
from lime_edge.session.encoder import EncoderSession
from lime_edge.session.engines import SessionOptions
from lime_edge.session.open import open_encoder
from lime_edge.targets.devices import find_device
from lime_edge.targets.entries import CoreaiOptions

ONNX_MODEL_LIMIT = 1e-3
EXACT = {"coreai": CoreaiOptions(activations="float32")}  # where a target rounds activations unless told otherwise


def is_encoder_fixture(hyper: Mapping[str, Any]) -> bool:
    """Whether models/<name>/lime.json describes an encoder or vision model."""
    return str(hyper["architecture"]).endswith(tuple(TASKS))


class OnnxEncoderEngine:
    """What `conformance.Engine` offers, for the opened bundle of one encoder fixture."""

    def __init__(self, session: EncoderSession):
        self.session = session

    def logits(self, mode: Mode, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits of one call; a mode of `conformance` becomes a selection."""
        self.session.use(name_mode(self.session, mode))
        found = self.session.run(**{name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(found["logits"])

    def generate(self, mode: Mode, inputs: Mapping[str, Tensor], new_tokens: int) -> Tensor:
        """Encoders do not generate."""
        raise NotImplementedError


def export_fixture(fixture: Path, directory: Path, targets: tuple[str, ...] = ("onnx",), **options: Any) -> Path:
    """Import a fixture into `directory`/imported and export it; returns the bundle.

    Args:
        targets: of the export.
        options: fields of CompileOptions; float32 unless they say otherwise.
    """
    imported = directory / "imported"
    if not imported.exists():
        import_checkpoint(fixture, imported, ImportOptions())
    compiling = CompileOptions(**({"quant": "none"} | options))
    output = directory / f"{compiling.quant}.lime"
    export_bundle(
        imported / "backbone",
        imported / "adapter",
        output,
        compiling,
        find_device("cpu"),
        ExportOptions(targets, tokenizer=False, force=True, target_options=EXACT),
    )
    return output


def name_mode(session: EncoderSession, mode: Mode) -> Any:
    """`conformance`'s mode (indices) as a session's selection (names)."""
    if isinstance(mode, Mapping):
        return {session.experts[index]: weight for index, weight in mode.items()}
    return session.experts[mode] if isinstance(mode, int) else mode


def check_exported_encoder(path: Path, target: str) -> Iterator[Any]:
    """Compare one encoder fixture with its exported program: `conformance.Check` by `conformance.Check`."""
    from conformance import check_model, read_model

    with tempfile.TemporaryDirectory() as directory:
        bundle = Bundle.open(export_fixture(path, Path(directory), (target,)), verify=True)
        session = open_encoder(bundle, options=SessionOptions(threads=1))
        yield from check_model(read_model(path), OnnxEncoderEngine(session), ONNX_MODEL_LIMIT)  # type: ignore[arg-type]
