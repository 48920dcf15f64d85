"""Fixtures of the test-suite: tiny models, adapters and bundles, each made once per run, whichever worker asks first.

torch is imported when something is made: the runtime's tests also run where there is none, with bundles made
beforehand (see prebuilt.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prebuilt import prebuilt_directory, serve_prebuilt

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on busy cores wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COLUMNS"] = "200"  # of a terminal: rich reads it when it is imported, and pytest-xdist sets it to less

Make = Callable[..., Path]
FIXTURES = Path(__file__).parent / "fixtures" / "conformance" / "models"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of this run for all its workers: pytest-xdist gives each a folder inside the run's."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


def remember(folder: Path, make: Make) -> Make:
    """`make(directory, *args, **options)`, once for equal arguments; other workers wait and take what was made.

    Args:
        folder: for the directories, named by a hash of the arguments. make: returns what it made, in `folder`.
    """
    folder.mkdir(exist_ok=True)

    def get(*args: Any, **options: Any) -> Path:
        key = hashlib.sha256(json.dumps([args, options], sort_keys=True, default=str).encode()).hexdigest()[:12]
        done = folder / f"{key}.done"
        with _lock(folder / f"{key}.lock"):
            if not done.exists():
                shutil.rmtree(folder / key, ignore_errors=True)  # of a test that failed half-way
                done.write_text(str(make(folder / key, *args, **options).relative_to(folder)))
            return folder / done.read_text()

    return get


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def tiny_model(shared_folder: Path) -> Make:
    """tiny_model(family="llama", **config_changes): a model directory, see `models.make_model`."""

    def make(directory: Path, family: str = "llama", **changes: Any) -> Path:
        from models import make_model

        return make_model(directory, family, **changes)

    return remember(shared_folder / "models", make)


@pytest.fixture(scope="session")
def tiny_adapter(shared_folder: Path, tiny_model: Make) -> Make:
    """tiny_adapter(model=None, **options): an adapter directory, see `models.make_adapter`."""

    def make(directory: Path, model: Path | None = None, **options: Any) -> Path:
        from models import make_adapter

        return make_adapter(directory, model or tiny_model(), **options)

    return remember(shared_folder / "adapters", make)


@pytest.fixture(scope="session")
def tiny_bundle(shared_folder: Path, tiny_model: Make, tiny_adapter: Make) -> Make:
    """tiny_bundle(model=None, adapter=None, **options): a bundle; `targets` and `companions` of the export, `options`
    are CompileOptions' fields.

    Without `quant` it is a float32 bundle. It is shared: a test that writes to it copies it first.
    """
    if directory := prebuilt_directory():
        return serve_prebuilt(directory)

    def make(
        directory: Path,
        model: Path | None = None,
        adapter: Path | None = None,
        targets: tuple[str, ...] = ("onnx",),
        companions: tuple[str, ...] = (),
        **options: Any,
    ) -> Path:
        from lime_edge.compiler.options import CompileOptions
        from lime_edge.export.pipeline import ExportOptions, export_bundle
        from lime_edge.targets.devices import find_device

        model = model or tiny_model()
        compiling = CompileOptions(**({"quant": "none"} | options))
        output = directory.with_suffix(".lime")
        wanted = ExportOptions(targets, companions=companions)
        export_bundle(model, adapter or tiny_adapter(model), output, compiling, find_device("cpu"), wanted)
        return output

    return remember(shared_folder / "bundles", make)


@pytest.fixture(scope="session")
def encoder_bundle(shared_folder: Path) -> Make:
    """encoder_bundle(fixture="bert-lora-cls", targets=("onnx",), **options): one of the authors' encoders, exported.

    Options and sharing as in `tiny_bundle`; the imported checkpoint lies beside the bundle, in `imported`.
    """

    def make(directory: Path, fixture: str = "bert-lora-cls", **options: Any) -> Path:
        from encoder_conformance import export_fixture

        return export_fixture(FIXTURES / fixture, directory, **options)

    return remember(shared_folder / "encoders", make)


@pytest.fixture(scope="session")
def marker_bundle(shared_folder: Path) -> Path:
    """A bundle of 16 skills that are told apart by their answers, see `serving.make_marker_bundle`."""

    def make(directory: Path) -> Path:
        from serving import make_marker_bundle

        return make_marker_bundle(directory)

    return remember(shared_folder / "markers", make)()


@pytest.fixture(scope="session")
def text_encoder(shared_folder: Path) -> Path:
    """The bundle of a tiny encoder that gives sentence embeddings, see `serving.make_text_encoder`."""

    def make(directory: Path) -> Path:
        from serving import make_text_encoder

        return make_text_encoder(directory)

    return remember(shared_folder / "text-encoders", make)()
