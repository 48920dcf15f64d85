"""Fixtures of the test-suite: tiny models, adapters and bundles, each made once per run.

torch is imported when something is made: the runtime's tests also run where there is none, with bundles made
beforehand (see prebuilt.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prebuilt import prebuilt_directory, serve_prebuilt

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on busy cores wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")

Make = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)


def _remember(root: Path, make: Callable[..., Path]) -> Make:
    """`make(directory, *args, **options)`, once for equal arguments."""
    made: dict[str, Path] = {}

    def get(*args: Any, **options: Any) -> Path:
        key = json.dumps([args, options], sort_keys=True, default=str)
        if key not in made:
            made[key] = make(root / str(len(made)), *args, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """tiny_model(family="llama", **config_changes): a model directory, see `models.make_model`."""

    def make(directory: Path, family: str = "llama", **changes: Any) -> Path:
        from models import make_model

        return make_model(directory, family, **changes)

    return _remember(tmp_path_factory.mktemp("models"), make)


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Make) -> Make:
    """tiny_adapter(model=None, **options): an adapter directory, see `models.make_adapter`."""

    def make(directory: Path, model: Path | None = None, **options: Any) -> Path:
        from models import make_adapter

        return make_adapter(directory, model or tiny_model(), **options)

    return _remember(tmp_path_factory.mktemp("adapters"), make)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Make, tiny_adapter: Make) -> Make:
    """tiny_bundle(model=None, adapter=None, **options): a bundle; `targets` of the export, `options` are
    CompileOptions' fields.

    Without `quant` it is a float32 bundle. It is shared: a test that writes to it copies it first.
    """
    if directory := prebuilt_directory():
        return serve_prebuilt(directory)

    def make(
        directory: Path,
        model: Path | None = None,
        adapter: Path | None = None,
        targets: tuple[str, ...] = ("onnx",),
        **options: Any,
    ) -> Path:
        from lime_edge.compiler.compile import CompileOptions
        from lime_edge.export.decoder import ExportOptions, export_bundle
        from lime_edge.targets.devices import find_device

        model = model or tiny_model()
        compiling = CompileOptions(**({"quant": "none"} | options))
        output = directory.with_suffix(".lime")
        export_bundle(
            model, adapter or tiny_adapter(model), output, compiling, find_device("cpu"), ExportOptions(targets)
        )
        return output

    return _remember(tmp_path_factory.mktemp("bundles"), make)
