"""The session of an encoder or vision bundle: arrays in, arrays out; experts switched without reloading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import ROUTED, ExpertBank, Selection
from lime_edge.errors import Faults, LimeEdgeError
from lime_edge.session.engines import EncoderEngine, blame_engine
from lime_edge.session.switching import ExpertSwitch
from lime_edge.targets.facts import Input


class EncoderSession(ExpertSwitch):
    """An opened encoder or vision bundle on one target, for one thread at a time (see `hand_over`).

    `use` switches the expert of the calls that follow. Nothing is kept between calls.
    """

    def __init__(self, bundle: Bundle, engine: EncoderEngine, bank: ExpertBank, target: str):
        self._engine = engine
        super().__init__(bundle, engine, bank, target)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs `run` takes."""
        return tuple(entry.name for entry in self._facts.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs `run` gives."""
        return tuple(self._facts.outputs)

    def run(self, **inputs: Any) -> dict[str, np.ndarray]:
        """Run the model once.

        Args:
            inputs: by name, arrays or nested lists: token ids (B, T), or pixels (B, C, H, W) float. An
                attention mask that is left out is ones, token types are zeros.
        Returns:
            Every output by name, float32: `logits`, or `last_hidden_state`, `sentence_embedding` (B, H), ...
        Raises:
            LimeEdgeError: an input is missing, unknown, of the wrong shape, or holds ids out of range.
        """
        self._owner.check()
        return self._run(self._check(inputs))

    def run_many(self, selections: Sequence[Selection], **inputs: Any) -> dict[str, np.ndarray]:
        """Run a batch in which every row has an expert of its own; the selection in use stays.

        Rows of one expert share a call, so that B rows of E experts take E calls. A routed row is a call of its own:
        routing weighs over everything it is given.

        Args:
            selections: one for each of the B rows, as for `use`. inputs: as for `run`.
        Returns:
            As `run`: row i is what `use(selections[i])` and a run would give.
        Raises:
            LimeEdgeError: see `run` and `use`; another number of selections than of rows. Nothing is computed then.
        """
        self._owner.check()
        checked, before = self._check(inputs), self._selection
        rows = len(next(iter(checked.values())))
        if len(selections) != rows:
            raise LimeEdgeError(f"run_many: expected {rows} selections, one for each row, found {len(selections)}")
        groups: dict[Any, list[int]] = {}
        for row, selection in enumerate(selections):
            filler = self.identify(selection)[1]
            groups.setdefault((filler, row if selection == ROUTED else None), []).append(row)
        found: dict[str, np.ndarray] = {}
        try:
            for members in groups.values():
                self._apply(selections[members[0]])
                for name, array in self._run({key: value[members] for key, value in checked.items()}).items():
                    found.setdefault(name, np.empty((rows, *array.shape[1:]), array.dtype))[members] = array
        finally:
            self._apply(before)
        return found

    def _run(self, checked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return self._engine.run(checked)
        except LimeEdgeError:
            raise
        except Exception as error:
            raise blame_engine(self.target, error) from error

    def _check(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Complete arrays in the dtypes of the graph; all faults at once."""
        checked: dict[str, np.ndarray] = {}
        axes: dict[str, int] = {}
        with Faults("run", f"this model takes {', '.join(self.inputs)}") as faults:
            for name in sorted(given.keys() - set(self.inputs)):
                faults.add(f"unknown input {name!r}")
            for entry in self._facts.inputs:
                name = entry.name
                if given.get(name) is not None:
                    array = _read_array(name, given[name], entry, faults)
                    if array is not None and _fits(name, array, entry, axes, faults):
                        checked[name] = array
                elif not entry.default:
                    faults.add(f"input {name!r} is missing")
            if "sequence" in axes and axes["sequence"] > self.bundle.manifest.backbone.context:
                faults.add("tokens", f"at most {self.bundle.manifest.backbone.context}", axes["sequence"])
        for entry in self._facts.inputs:
            if entry.name not in checked:
                shape = [axes[size] if isinstance(size, str) else size for size in entry.shape]
                checked[entry.name] = np.full(shape, int(entry.default == "ones"), entry.dtype)
        return checked

    def __enter__(self) -> EncoderSession:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _read_array(name: str, value: Any, entry: Input, faults: Faults) -> np.ndarray | None:
    try:
        array = np.asarray(value)
    except ValueError as error:
        faults.add(f"{name}: not an array: {error}")
        return None
    kinds = "iub" if entry.dtype == "int64" else "fiu"
    if array.dtype.kind not in kinds:
        faults.add(f"{name}: dtype", entry.dtype, array.dtype)
        return None
    return np.ascontiguousarray(array, dtype=entry.dtype)


def _fits(name: str, array: np.ndarray, entry: Input, axes: dict[str, int], faults: Faults) -> bool:
    """Check shape and ids; notes the size of every dynamic axis in `axes`."""
    wanted = tuple(axes.get(size, size) if isinstance(size, str) else size for size in entry.shape)
    shown = "(" + ", ".join(map(str, wanted)) + ")"
    sizes: list[tuple[int | str, int]] = list(zip(wanted, array.shape, strict=False))
    if len(wanted) != array.ndim or any(isinstance(size, int) and size != found for size, found in sizes):
        faults.add(f"{name}: shape", shown, array.shape)
        return False
    if array.size == 0:
        faults.add(f"{name}: shape", f"{shown}, nothing empty", array.shape)
        return False
    axes.update({str(size): found for size, found in sizes if isinstance(size, str)})
    if entry.limit and (array.min() < 0 or array.max() >= entry.limit):
        faults.add(name, f"0..{entry.limit - 1}", f"{array.min()}..{array.max()}")
        return False
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        faults.add(f"{name} holds NaN or infinite values")
        return False
    return True
