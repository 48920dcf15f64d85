"""A .aimodel loaded by Apple's package: its functions, which are coroutines, as plain calls on numpy arrays.

On a Mac of version 27 the system's Core AI runs it; elsewhere the runtime inside the package interprets it, on one
core, exactly in float32 and coarsely in float16.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lime_edge.errors import EXIT_MISSING, LimeEdgeError, need

try:
    from coreai.authoring import AIModelAsset
    from coreai.runtime import NDArray, SpecializationOptions
except ImportError as error:
    raise need((error.name or "coreai").split(".")[0], "coreai") from error

SYSTEM, INTERPRETER = "CoreAI", "CoreAI-interpreter"  # "CoreAI:cpu" prefers a unit
UNITS = ("gpu", "cpu", "neural_engine")
T = TypeVar("T")


@cache
def start_loop() -> asyncio.AbstractEventLoop:
    """One event loop for all models of this process, in a thread of its own: who calls may have a loop running."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="Core AI", daemon=True).start()
    return loop


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end."""
    return asyncio.run_coroutine_threadsafe(work, start_loop()).result()


def choose_provider(wanted: Sequence[str]) -> str:
    """The system's Core AI where there is one, else the interpreter; or the first of those asked for that is there.

    Raises:
        LimeEdgeError: what is asked for is not there.
    """
    system = [SYSTEM, *(f"{SYSTEM}:{unit}" for unit in UNITS)] if SpecializationOptions.is_supported() else []
    known = [*system, INTERPRETER]
    for name in wanted or known:
        if name in known:
            return name
    raise LimeEdgeError(
        f"none of the providers {', '.join(wanted)} is available",
        f"this machine has {', '.join(known)}" + (": USE_OS_COREAI=1 adds CoreAI" if sys.platform == "darwin" else ""),
        EXIT_MISSING,
    )


class Model:
    """One loaded file.

    Args:
        path: .aimodel. compute_unit: of UNITS, to prefer where the provider names none; only the system's Core AI does.
    Raises:
        LimeEdgeError: Core AI refuses the file.
    """

    def __init__(self, path: Path, provider: str, compute_unit: str):
        self._path, self._functions = path, dict[str, Any]()
        options = None if provider == INTERPRETER else prefer(provider.partition(":")[2] or compute_unit)
        with collect_errors():
            try:
                self._model = wait_for(load(path, options))
            except (RuntimeError, ValueError, OSError) as error:
                raise self._refuse(error) from None

    def _refuse(self, error: Exception) -> LimeEdgeError:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        return LimeEdgeError(
            f"{self._path}: Core AI cannot load it: {first}", "lime-edge inspect BUNDLE --verify compares the hashes"
        )

    def find(self, name: str) -> Any:
        """A function of the file, loaded at its first use."""
        if name not in self._functions:
            with collect_errors():
                try:
                    self._functions[name] = self._model.load_function(name)
                except (RuntimeError, KeyError) as error:
                    raise self._refuse(error) from None
        return self._functions[name]

    def run(self, name: str, inputs: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """All outputs by name.

        Args:
            inputs: arrays, or what `wrap` made of them. state: by name, of `wrap`; written in place.
        """
        given = {key: value if isinstance(value, NDArray) else wrap(value) for key, value in inputs.items()}
        found = wait_for(self.find(name)(given, state=dict(state)))
        return {key: np.array(value.numpy()) for key, value in found.items()}


def wrap(array: np.ndarray) -> Any:
    """An array as Core AI takes it."""
    return NDArray(np.ascontiguousarray(array))


async def load(path: Path, options: Any) -> Any:
    """The executable model. What it is compiled to lies in a folder that is gone when this returns; it was read."""
    async with AIModelAsset.load(path).executable(options) as model:
        return model


def prefer(compute_unit: str) -> Any:  # pragma: no cover - needs a Mac
    """The system's options."""
    from coreai.runtime import ComputeUnitKind

    return SpecializationOptions.from_preferred_compute_unit_kind(getattr(ComputeUnitKind, compute_unit)())


@contextmanager
def collect_errors() -> Iterator[None]:
    """Keep what the runtime prints about loading off standard error."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
