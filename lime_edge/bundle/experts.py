"""Expert files and the bank of experts a session switches between. numpy only."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lime_edge.bundle.names import RESERVED, check_name
from lime_edge.bundle.residual import Subtract, subtract_reference
from lime_edge.bundle.sites import SiteTable
from lime_edge.errors import Faults, LimeEdgeError, suggest

FORMAT = "lime-edge-expert"
SCHEMA = 1
ROUTED, NONE = "routed", "none"
ALWAYS_ON = ("dora", "slicefine", "prompt_tuning")  # variants: no p gives the original model back
DTYPES = {"float16": np.float16, "float32": np.float32}
Selection = str | Mapping[str, float] | None
READY_BYTES = 1 << 20  # fp32 residuals kept ready for a switch back, per session


def parse_selection(text: str) -> Selection:
    """Read a selection as typed: NAME, none, routed, or a blend NAME=WEIGHT,NAME=WEIGHT."""
    if text.lower() in RESERVED:
        return None if text.lower() == "none" else text.lower()
    if "=" not in text:
        return text
    blend: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            blend[name.strip()] = blend.get(name.strip(), 0.0) + float(weight)
        except ValueError:
            hint = "write a blend as NAME=WEIGHT,NAME=WEIGHT"
            raise LimeEdgeError(f"{part!r} in the blend {text!r}: {weight!r} is not a number", hint) from None
    return blend


def describe_selection(selection: Selection) -> str:
    """The selection as one would type it."""
    if selection is None or isinstance(selection, str):
        return selection or "none"
    return ",".join(f"{name}={weight:g}" for name, weight in selection.items())


@dataclass(frozen=True)
class Expert:
    """One expert: its full vector p (sum_H,), gamma * p_shared included, float16 or float32."""

    name: str
    vector: np.ndarray = field(repr=False)
    fingerprint: str
    sites_hash: str
    note: str = ""

    def to_bytes(self) -> bytes:
        """The expert file: safetensors with tensor `expert` and a header that says what it fits."""
        header = {
            "format": FORMAT,
            "schema": str(SCHEMA),
            "name": self.name,
            "fingerprint": self.fingerprint,
            "sites": self.sites_hash,
            "note": self.note,
        }
        return save({"expert": np.ascontiguousarray(self.vector)}, metadata=header)


def read_expert(path: Path) -> Expert:
    """Read one expert file.

    Raises:
        LimeEdgeError: missing, truncated, not an expert file, of a newer schema, wrong dtype or shape,
            NaN or infinite values.
    """
    if not path.is_file():
        raise LimeEdgeError(f"{path}: no such expert file", "an expert is one .safetensors file")
    try:
        with safe_open(path, framework="np") as opened:
            header = opened.metadata() or {}
            vector = opened.get_tensor("expert") if "expert" in opened.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        hint = "copy the file again: it may be truncated"
        raise LimeEdgeError(f"{path}: not a readable expert file: {error}", hint) from None
    if header.get("format") != FORMAT or vector is None:
        raise LimeEdgeError(f"{path}: not a LiME expert file", "export one with lime-edge")
    if not header.get("schema", "").isdigit() or int(header["schema"]) > SCHEMA:
        hint = "upgrade lime-edge"
        raise LimeEdgeError(f"{path}: schema: expected at most {SCHEMA}, found {header.get('schema')}", hint)
    with Faults(str(path), "write it anew with lime-edge experts pack") as faults:
        if vector.dtype not in (np.float16, np.float32):
            faults.add("dtype", "float16 or float32", vector.dtype)
        elif vector.ndim != 1:
            faults.add("shape", "one axis", vector.shape)
        elif not np.isfinite(vector).all():
            faults.add("the vector holds NaN or infinite values")
        problem = check_name(header.get("name"))
        if problem:
            faults.add(f"name: {problem}")
    return Expert(
        header["name"], vector, header.get("fingerprint", ""), header.get("sites", ""), header.get("note", "")
    )


class ExpertBank:
    """The experts of one opened bundle, and the residual d = p - p_ref for any selection of them.

    Vectors stay in their stored dtype (2 bytes a number in a quantized bundle); residuals are made
    on demand and the last few, READY_BYTES in all, are kept so that switching back costs nothing.

    Args:
        sites: the bundle's site table. fingerprint: of the original backbone.
        reference: p_ref (sum_H,) float32. subtract: how p - p_ref is computed.
    """

    def __init__(
        self, sites: SiteTable, fingerprint: str, reference: np.ndarray, subtract: Subtract = subtract_reference
    ):
        self.sites = sites
        self.fingerprint = fingerprint
        self.reference = np.ascontiguousarray(reference, dtype=np.float32)
        self._subtract = subtract
        self._vectors: dict[str, np.ndarray] = {}
        self._ready: OrderedDict[object, np.ndarray] = OrderedDict()  # oldest use first
        self._free: list[np.ndarray] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Installed experts in the order they came."""
        return tuple(self._vectors)

    def vector(self, name: str) -> np.ndarray:
        """The stored vector of an expert (sum_H,).

        Raises:
            LimeEdgeError: no such expert.
        """
        try:
            return self._vectors[name]
        except KeyError:
            known = ", ".join(self._vectors) or "none"
            hint = f"{suggest(name, self._vectors)} installed experts: {known}".strip()
            raise LimeEdgeError(f"unknown expert {name!r}", hint) from None

    def check(self, expert: Expert, where: str) -> None:
        """Refuse an expert of another backbone or another site table.

        Raises:
            LimeEdgeError: with expected and found.
        """
        hint = "an expert fits every quantization of the backbone it was trained on, and no other"
        with Faults(where, hint) as faults:
            if expert.vector.shape != (self.sites.total,):
                faults.add("length", self.sites.total, expert.vector.shape[0])
            if expert.fingerprint != self.fingerprint:
                faults.add("backbone fingerprint", self.fingerprint[:16], expert.fingerprint[:16] or "none")
            if expert.sites_hash != self.sites.hash:
                faults.add("site table", self.sites.hash[:16], expert.sites_hash[:16] or "none")

    def install(self, expert: Expert, where: str = "") -> None:
        """Add an expert, or replace the one of the same name."""
        self.check(expert, where or f"expert {expert.name!r}")
        self._vectors[expert.name] = np.array(expert.vector)
        self._forget_ready()

    def remove(self, name: str) -> None:
        """Forget an expert."""
        self.vector(name)
        del self._vectors[name]
        self._forget_ready()

    def mix(self, selection: Selection) -> np.ndarray:
        """p of a selection: one expert, a blend whose weights sum to 1, or zeros for None.

        Returns:
            (sum_H,) float32.
        Raises:
            LimeEdgeError: unknown name, weights that do not sum to 1 or are not finite.
        """
        mixed = np.empty_like(self.reference)
        self._mix_into(mixed, selection)
        return mixed

    def _mix_into(self, out: np.ndarray, selection: Selection) -> None:
        if selection is None:
            out.fill(0.0)
        elif isinstance(selection, str):
            np.copyto(out, self.vector(selection))
        else:
            total = sum(selection.values())
            if not selection or not math.isfinite(total) or abs(total - 1.0) > 1e-6:
                hint = "scale the weights so that they sum to 1 (else the shared vector would be scaled)"
                raise LimeEdgeError(f"blend weights sum to {total:g}, expected 1", hint)
            mixed = np.zeros(out.shape, np.float64)
            for name, weight in selection.items():
                mixed += np.multiply(weight, self.vector(name), dtype=np.float64)  # weight * float16 would be float16
            np.copyto(out, mixed, casting="same_kind")

    def residual(self, selection: Selection) -> np.ndarray:
        """d = p - p_ref for a selection.

        Returns:
            (sum_H,) float32, read-only. It lies in one of a few buffers that are used over and over
            (memory stays flat): it holds until other selections, at least one, have been asked for.
        """
        key = selection if selection is None or isinstance(selection, str) else tuple(selection.items())
        if key not in self._ready:
            slot = self._free_slot()
            try:
                if isinstance(selection, str):
                    self._subtract(self.vector(selection), self.reference, slot)
                else:
                    self._mix_into(slot, selection)
                    slot -= self.reference
            except LimeEdgeError:
                self._free.append(slot)
                raise
            self._ready[key] = slot
        self._ready.move_to_end(key)
        view = self._ready[key].view()
        view.flags.writeable = False
        return view

    def _free_slot(self) -> np.ndarray:
        """A buffer to write to: never the one that was asked for last."""
        if self._free:
            return self._free.pop(0)
        if len(self._ready) < max(2, READY_BYTES // max(1, self.reference.nbytes)):
            return np.empty_like(self.reference)
        return self._ready.popitem(last=False)[1]

    def _forget_ready(self) -> None:
        """An expert changed: nothing that was made is valid; the buffer in use is the last to be reused."""
        self._free.extend(self._ready.values())
        self._ready.clear()
