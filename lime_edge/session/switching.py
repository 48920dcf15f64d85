"""Switching experts: what every session does, whatever it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from lime_edge.bundle.bundle import Bundle
from lime_edge.bundle.experts import (
    ALWAYS_ON,
    NONE,
    ROUTED,
    ExpertBank,
    Selection,
    check_name,
    describe_selection,
    read_expert,
)
from lime_edge.errors import LimeEdgeError
from lime_edge.session.engines import Placement, SwitchableEngine, blame_engine
from lime_edge.session.owner import Owner

BLEND = "write a blend as {NAME: WEIGHT, NAME: WEIGHT}; the weights sum to 1"


class ExpertSwitch:
    """The experts of an opened bundle on one target, and which of them is in use.

    "routed" mixes the experts of the checkpoint: that bank is frozen in the artifact, and experts
    installed later are pinned or blended, never routed to.
    """

    def __init__(self, bundle: Bundle, engine: SwitchableEngine, bank: ExpertBank, target: str):
        self.bundle, self.target = bundle, target
        self._switchable, self._bank = engine, bank
        self._facts: Any = bundle.manifest.targets[target]  # the kind's session knows which
        self._single: str | None = bundle.manifest.adapter.single
        self._variant: str = bundle.manifest.adapter.variant
        self._selection: Selection = None
        self._owner = Owner()
        default = bundle.manifest.default
        known = default in (*bank.names, NONE, ROUTED)  # another process may have removed it meanwhile
        self._apply(default if known else next(iter(bank.names), None))

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the installed experts."""
        return self._bank.names

    @property
    def selection(self) -> Selection:
        """What is in use: an expert's name, a blend, "routed", or None."""
        return self._selection

    @property
    def provider(self) -> str:
        """The execution provider the engine took."""
        return self._switchable.provider

    @property
    def operators(self) -> bool | None:
        """Whether the graph's functions run as compiled operators; None where the engine knows none."""
        return self._switchable.operators

    @property
    def placement(self) -> Placement | None:
        """Where the pinned graph's nodes run: execution provider -> type of node -> how many; None: nobody knows."""
        return getattr(self._switchable, "placement", None)

    def use(self, selection: Selection) -> None:
        """Switch the expert; nothing is reloaded ("routed" loads its graph once).

        Args:
            selection: an expert's name, {name: weight} summing to 1, None for the original model, or
                "routed": the experts of the checkpoint weighed per token and site.
        Raises:
            LimeEdgeError: unknown name, bad weights, a single-expert bundle, a bundle without routing,
                or None for a variant that cannot be switched off.
        """
        self._owner.check()
        self._apply(selection)

    def hand_over(self) -> None:
        """Give the session to the next thread that uses it; only its own thread may, or anyone once that has ended.

        Raises:
            LimeEdgeError: it belongs to another thread, which still runs.
        """
        self._owner.release()

    def identify(self, selection: Selection) -> tuple[np.ndarray | None, bytes]:
        """A selection's own numbers, for an engine that runs several.

        Returns:
            d (sum_H,) float32 of its own (None: routed), and what tells it from others in a cache.
        Raises:
            LimeEdgeError: see `use`.
        """
        selection = self._check_selection(selection)
        if selection == ROUTED:
            return None, ROUTED.encode()
        residual = self._bank.mix(selection) - self._bank.reference
        return residual, hashlib.blake2b(residual.tobytes(), digest_size=16).digest()

    def _apply(self, selection: Selection) -> None:
        selection = self._check_selection(selection)
        if selection == ROUTED:
            self._load_routed()
        else:
            self._switchable.set_expert(self._bank.residual(selection))
        self._selection = selection

    def _check_selection(self, selection: Selection) -> Selection:
        """The selection as it is kept, or a refusal; names and weights are left to the bank."""
        if selection == NONE:
            selection = None  # as the command line has it; no expert can have that name
        if not (selection is None or isinstance(selection, (str, Mapping))):
            raise LimeEdgeError(
                f"expert: expected a name, a blend or None, found {selection!r}",
                f"the names are {', '.join(self._bank.names)}",
            )
        if isinstance(selection, Mapping) and not all(isinstance(weight, Real) for weight in selection.values()):
            raise LimeEdgeError(f"blend: expected a number for each name, found {dict(selection)}", BLEND)
        if self._single is not None and selection != self._single:
            asked = describe_selection(selection)
            raise LimeEdgeError(
                f"this bundle holds {self._single!r} alone (`single`), asked for {asked!r}",
                "export it without `single`",
            )
        if selection == ROUTED and not self._facts.routed:
            hint = "pick an expert, a blend or none, or export an adapter that was trained with routing"
            raise LimeEdgeError("this bundle has no routed graph", hint)
        if selection is None and self._variant in ALWAYS_ON:
            raise LimeEdgeError(
                f"a {self._variant} adapter cannot be switched off: no expert vector gives the original model",
                "pick an expert or a blend, or use the original model",
            )
        return dict(selection) if isinstance(selection, Mapping) else selection

    def _load_routed(self) -> None:
        """The first time loads a graph, of which anything may be said."""
        try:
            self._switchable.set_routed()
        except LimeEdgeError:
            raise
        except Exception as error:
            raise blame_engine(self.target, error) from error

    def install(self, path: Path | str, name: str | None = None) -> str:
        """Add an expert file while running; returns its name. Nothing is written; routing does not know it.

        A name that the session has already stands for the new vector until the session ends; `experts add`, which
        changes the bundle, asks for --force instead.

        Raises:
            LimeEdgeError: damaged, NaN, wrong length, made for another adapter, or a name that is none.
        """
        self._owner.check()
        if name is not None and (problem := check_name(name)):
            raise LimeEdgeError(f"install: {problem}", "give it another name")
        expert = read_expert(Path(path), self._bank.total)
        expert = replace(expert, name=name) if name is not None else expert
        if self._single is not None:
            raise LimeEdgeError(f"this bundle holds {self._single!r} alone (`single`)", "export it without `single`")
        self._bank.install(expert, str(path))
        if self._uses(expert.name):
            self.reset()
            self._apply(self._selection)
        return expert.name

    def remove(self, name: str) -> None:
        """Forget an installed expert; the one in use cannot be removed."""
        self._owner.check()
        if self._uses(name):
            raise LimeEdgeError(f"expert {name!r} is in use", "switch to another one first")
        self._bank.remove(name)

    def _uses(self, name: str) -> bool:
        used = self._selection
        return name == used if isinstance(used, str) else used is not None and name in used

    def reset(self) -> None:
        """Forget what earlier calls left behind: nothing, unless the session keeps a cache."""
