"""ExecuTorch: one loaded program with its cache inside, the expert an argument of every call.

ExecuTorch's Python binding is made of torch tensors and imports torch itself; nothing else here needs it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.residual import Subtract
from lime_edge.errors import EXIT_MISSING, LimeEdgeError, need
from lime_edge.session.engines import SessionOptions, choose_capacity
from lime_edge.session.features import open_features
from lime_edge.targets.entries import ExecutorchFacts


class SwitchedProgram:
    """A loaded program whose expert can be switched: what language models and encoders share.

    A routed bundle has a second method on the same weights: it is loaded at the first `set_routed`.
    """

    operators: bool | None = None  # it knows none
    subtract: Subtract | None = None  # numpy's

    def __init__(self, bundle: Bundle, options: SessionOptions):
        facts = bundle.manifest.facts_of(ExecutorchFacts)
        self.provider = check_provider(facts.providers, options.providers)
        self._program = load_program(bundle, options.threads)
        self._file = bundle.path / facts.file
        self._pinned = self._method = load_method(self._program, "forward", self._file)
        self._routed: Any = None
        self._residual = np.zeros(bundle.manifest.sites.total, np.float32)
        self._expert = wrap(self._residual)

    @property
    def _routing(self) -> bool:
        return self._method is not self._pinned

    def set_expert(self, residual: np.ndarray) -> None:
        """Pass another residual d (sum_H,) float32 from the next call on.

        Raises:
            LimeEdgeError: another length or dtype.
        """
        wanted = self._residual.shape
        if residual.shape != wanted or residual.dtype != np.float32:
            raise LimeEdgeError(f"expert: expected {wanted} float32, found {residual.shape} {residual.dtype}")
        self._method = self._pinned
        np.copyto(self._residual, residual)

    def set_routed(self) -> None:
        """Weigh the frozen bank per token from now on; the first time loads the routed method."""
        if self._routed is None:
            self._routed = load_method(self._program, "routed", self._file)
        self._method = self._routed


class ExecutorchEngine(SwitchedProgram):
    """A loaded program; implements lime_edge.session.decoder.Engine. Both methods share one cache.

    ExecuTorch checks neither positions nor lengths, so that is done here.

    Raises:
        LimeEdgeError: a length beyond the exported cache, a missing backend or package, or a program that
            cannot be loaded.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions):
        facts = bundle.manifest.facts_of(ExecutorchFacts)
        most, rows, prompt = facts.max_length, facts.rows, facts.prompt_length
        assert most and rows and prompt, "the manifest is checked: a language model's facts have them"
        self.capacity = choose_capacity(options, most)
        self.length = 0
        self._vocab = bundle.manifest.backbone.vocab
        self._virtual, self._rows, self._prompt = facts.virtual_tokens, rows, prompt
        self._takes_expert: bool = facts.expert_input
        self.features = open_features(bundle)
        super().__init__(bundle, options)

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens; the cache is overwritten later.

        Raises:
            LimeEdgeError: a negative length.
        """
        if length < 0:
            raise LimeEdgeError(f"position: expected 0..{self.capacity}, found {length}")
        self.length = min(self.length, length)

    def feed(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Run S tokens after those in the cache. ids: (S,) int64. Returns (keep or S, V) float32.

        Raises:
            LimeEdgeError: the tokens do not fit into the cache. The program is not called then.
        """
        total = self.length + ids.size
        if ids.size < 1 or self.length < 0 or total > self.capacity:
            raise LimeEdgeError(
                f"position: expected 1..{self.capacity - self.length} tokens after {self.length}, found {ids.size}"
            )
        keep = min(keep, ids.size) if keep else ids.size
        feed = self._feed_whole if self._routing else self._feed_pieces
        logits = feed(ids, keep)
        self.length = total
        return logits

    def _feed_pieces(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Long prompts in pieces: few rows with logits a piece, and no more tokens than were planned for."""
        parts, start, first = [], 0, ids.size - keep
        while start < ids.size:
            if start < first and ids.size - start > self._prompt - self._virtual:
                stop = min(start + self._prompt - self._virtual, first)
            else:
                stop = min(ids.size, max(first, start) + self._rows, start + self._prompt - self._virtual)
            wanted = np.arange(max(first, start), stop) - start
            rows = self._call(ids[start:stop], self.length + start, wanted if wanted.size else np.zeros(1, np.int64))
            parts += [rows] if wanted.size else []
            start = stop
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _feed_whole(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Routing needs the prompt in one call: for more rows than one call gives, the call is repeated."""
        first = ids.size - keep
        starts = range(first, ids.size, self._rows)
        parts = [self._call(ids, self.length, np.arange(i, min(i + self._rows, ids.size))) for i in starts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _call(self, ids: np.ndarray, position: int, rows: np.ndarray) -> np.ndarray:
        """Logits (K, V) of some rows of one call."""
        if self._virtual and position == 0:
            ids, rows = np.concatenate([np.arange(self._virtual) + self._vocab, ids]), rows + self._virtual
        elif self._virtual:
            position += self._virtual
        inputs = [wrap(ids[None]), wrap(np.array([position], np.int64)), wrap(rows)]
        if self.features is not None:
            inputs[0], seen = self._see_ids(ids)
            inputs.append(seen)
        if self._takes_expert and not self._routing:
            inputs.append(self._expert)
        return self._method.execute(inputs)[0].numpy()[0]

    def _see_ids(self, ids: np.ndarray) -> tuple[Any, Any]:
        """Ids (1, S) that are all `vocab` where a picture's row stands, and rows (1, S, hidden) at those places."""
        assert self.features is not None
        chosen = ids >= self._vocab
        seen = np.zeros((1, ids.size, self.features.hidden), np.float32)
        seen[0, chosen] = self.features.resolve(ids[None])[1]
        return wrap(np.where(chosen, self._vocab, ids)[None]), wrap(seen)


def wrap(array: np.ndarray) -> Any:
    """A torch tensor over the array's own memory."""
    return sys.modules["torch"].from_numpy(np.ascontiguousarray(array))


def start_runtime() -> Any:
    """ExecuTorch's runtime, its operators for language models and quantized tables registered.

    Raises:
        LimeEdgeError: the package is missing.
    """
    with collect_errors():  # it complains about engines of other processors
        try:
            import executorch.extension.llm.custom_ops.custom_ops
            import executorch.kernels.quantized  # noqa: F401
            from executorch.runtime import Runtime
        except ImportError as error:
            raise need((error.name or "executorch").split(".")[0], "executorch") from error
        return Runtime.get()


def check_provider(made_for: Sequence[str], wanted: tuple[str, ...]) -> str:
    """The backend a program was lowered to, when it is there and not excluded by the caller.

    Raises:
        LimeEdgeError: it is missing, or the caller asked for others.
    """
    provider = made_for[0]
    if wanted and provider not in wanted:
        raise LimeEdgeError(
            f"none of the execution providers {', '.join(wanted)} is available",
            f"this program was lowered to {provider}",
            EXIT_MISSING,
        )
    registry = start_runtime().backend_registry
    with collect_errors():  # a backend whose library is missing says so when asked
        names = [name for name in registry.registered_backend_names if registry.is_available(name)]
    if provider not in names and provider != "portable":
        raise LimeEdgeError(
            f"the backend {provider} is not available", f"this executorch has {', '.join(names)}", EXIT_MISSING
        )
    return provider


def load_program(bundle: Bundle, threads: int | None, name: str | None = None) -> Any:
    """Open the bundle's .pte; nothing is prepared yet.

    Args:
        threads: of the process's one pool, None for the bundle's default. name: of another file than the artifact.
    Raises:
        LimeEdgeError: ExecuTorch refuses the file.
    """
    runtime, facts = start_runtime(), bundle.manifest.facts_of(ExecutorchFacts)
    file = bundle.path / (name or facts.file)
    size_pool(threads, facts.threads)
    with collect_errors() as errors:
        try:
            return runtime.load_program(file)
        except (RuntimeError, MemoryError) as error:
            raise refuse(file, error, errors) from None


def load_method(program: Any, name: str, file: Path) -> Any:
    """Prepare one method of an opened program.

    Raises:
        LimeEdgeError: an operator or a backend is missing, or the file is damaged.
    """
    with collect_errors() as errors:
        try:
            return program.load_method(name)
        except (RuntimeError, KeyError, MemoryError) as error:
            raise refuse(file, error, errors) from None


_pool: list[int] = []  # threads of the process's pool once a program was loaded


def size_pool(threads: int | None, default: int | None) -> None:
    """Set the process's pool before the first program is loaded; afterwards that would abort the process.

    Later sessions get what the first one chose, and a warning where they ask for something else.
    """
    if _pool:
        if threads and threads != _pool[0]:
            warnings.warn(
                f"threads: ExecuTorch's one pool of this process has {_pool[0]}, asked for {threads}: the "
                "first session decides",
                RuntimeWarning,
                stacklevel=2,
            )
        return
    from executorch.extension.pybindings import portable_lib

    wanted = threads or default
    with collect_errors():
        if wanted and wanted != portable_lib._threadpool_get_thread_count():
            portable_lib._unsafe_reset_threadpool(wanted)
        _pool.append(portable_lib._threadpool_get_thread_count())


def refuse(file: Path, error: Exception, lines: list[str]) -> LimeEdgeError:
    """What ExecuTorch said when it could not load something."""
    said = next((line.split("] ", 1)[-1] for line in reversed(lines) if line.startswith("[")), "")
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return LimeEdgeError(
        f"{file}: ExecuTorch cannot load it: {first}{f' ({said})' if said else ''}",
        "lime-edge inspect BUNDLE --verify compares the hashes",
    )


@contextmanager
def collect_errors() -> Iterator[list[str]]:
    """Take what the C++ side prints on standard error, which is mostly about reading the processor's name."""
    lines: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
